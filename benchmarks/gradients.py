"""GIDs and Gram matrices of SmolLM2 against the published procedures, in time and memory."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.text import LENGTH
from benchmarks.timing import Row, at_most
from benchmarks.worker import Cost, cost_of


def measure(*, quick: bool) -> list[Row]:
    """Each way in a process of its own; the smaller sizes of `quick` have no targets."""
    return _gid(quick=quick) + _gram(quick=quick)


def _gid(*, quick: bool) -> list[Row]:
    count, size, rounds = (2, 4, 1) if quick else (8, 8, 2)
    costs: dict[str, list[Cost]] = {"released": [], "hooks": [], "sweep": []}
    for _ in range(rounds):
        for way, found in costs.items():
            found.append(cost_of(way, count, size))
    shape = f"{count} x ({size} x {LENGTH})"
    baseline = _best(costs["released"])
    rows = [Row(f"GIDs, {shape}, the released way", baseline.seconds, "s")]
    rows.append(Row(f"GIDs, {shape}, the released way, extra memory", _mb(baseline), "MB"))
    for way in ("hooks", "sweep"):
        ours = _best(costs[way])
        rows += [
            _row(
                f"GIDs, {shape}, {way}, time",
                ours.seconds / baseline.seconds,
                None if quick else 0.87,
                "of the released way",
            ),
            _row(
                f"GIDs, {shape}, {way}, extra memory",
                ours.extra_bytes / baseline.extra_bytes,
                None if quick else 0.70,
                "of the released way",
            ),
        ]
        worst = max(
            abs(float(ours.arrays[name]) / float(gid) - 1) for name, gid in baseline.arrays.items()
        )
        rows.append(Row(f"GIDs, {shape}, {way}, largest difference", worst, "of the released way"))
    return rows


def _gram(*, quick: bool) -> list[Row]:
    """The naive way keeps M gradients of every layer, 27 GB at M = 64: it is run with fewer."""
    few, many = (2, 4) if quick else (16, 64)
    naive, same, more = (
        cost_of("gram-naive", few, 1),
        cost_of("gram-sweep", few, 1),
        cost_of("gram-sweep", many, 1),
    )
    of_naive = f"of naive at M = {few}"
    worst = max(_distance(same.arrays[name], exact) for name, exact in naive.arrays.items())
    return [
        Row(f"Gram, M = {few} of 1 x {LENGTH}, naive", naive.seconds, "s"),
        Row(f"Gram, M = {few} of 1 x {LENGTH}, naive, extra memory", _mb(naive), "MB"),
        Row(f"Gram, M = {few}, sweep, time", same.seconds / naive.seconds, of_naive),
        Row(
            f"Gram, M = {few}, sweep, extra memory", same.extra_bytes / naive.extra_bytes, of_naive
        ),
        _row(
            f"Gram, M = {many}, sweep, time a batch",
            more.seconds / many / (naive.seconds / few),
            None if quick else 1.0,
            f"{of_naive}, a batch",
        ),
        _row(
            f"Gram, M = {many}, sweep, extra memory",
            more.extra_bytes / (naive.extra_bytes * many / few),
            None if quick else 0.1,
            f"{of_naive} times {many // few}",
        ),
        at_most(f"Gram, M = {few}, sweep, worst relative error", worst, 1e-5, "against naive fp64"),
    ]


def _row(name: str, value: float, limit: float | None, unit: str) -> Row:
    return Row(name, value, unit) if limit is None else at_most(name, value, limit, unit)


def _best(costs: list[Cost]) -> Cost:
    """The fastest of the rounds; a busy machine only ever adds time."""
    return min(costs, key=lambda cost: cost.seconds)


def _mb(cost: Cost) -> float:
    return cost.extra_bytes / 1e6


def _distance(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))
