"""What moving ranks costs: dynamic training of SmolLM2-135M against static LoRA."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable

import torch

import rankwise as rw
from benchmarks.text import Batch, frozen_model, text_batches
from benchmarks.timing import Row, at_most
from rankwise.adapters.factors import lora_factors
from rankwise.methods import Method

INTERVAL, WINDOW = 100, 8
_OUTSIDE = 4


def measure(*, quick: bool) -> list[Row]:
    """Steps outside a window, inside it, and the event, weighed as an interval of 100 has them."""
    base = frozen_model()
    batch = text_batches(1, 4 if quick else 8)[0]
    plan = rw.Lora(r=8).plan(rw.find_targets(base))
    methods: list[Method] = [rw.Gard(r_max=16), rw.WaterFill(r_min=1, r_max=16)]
    return [row for method in methods for row in _against_static(base, plan, method, batch)]


def _against_static(
    base: torch.nn.Module, plan: rw.RankPlan, method: Method, batch: Batch
) -> list[Row]:
    static = rw.attach(copy.deepcopy(base), plan).train()
    model = rw.attach(copy.deepcopy(base), plan).train()
    options = rw.DynamicOptions(interval=WINDOW + _OUTSIDE, window=WINDOW)
    optimizer = _adamw(model)
    ranks = rw.DynamicRanks(model, plan, method, options, optimizer=optimizer)
    other = _adamw(static)

    def dynamic_step() -> None:
        with ranks.observe():
            model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def static_step() -> None:
        static(**batch, use_cache=False).loss.backward()
        other.step()
        other.zero_grad()

    static_step()  # the first step also makes the optimizer state; the dynamic runs take medians
    seconds: dict[str, list[float]] = {"static": [], "outside": [], "inside": []}
    event, held = 0.0, 0
    for step in range(1, WINDOW + _OUTSIDE + 1):
        seconds["static"].append(_seconds(static_step))
        where = "inside" if options.is_measured(step, WINDOW) else "outside"
        seconds[where].append(_seconds(dynamic_step))
        if step == WINDOW + _OUTSIDE:
            held = _bytes(ranks.window.statistics.arrays().values())
        event = _seconds(ranks.step)
    assert [e.step for e in ranks.events] == [WINDOW + _OUTSIDE]
    median = {where: statistics.median(values) for where, values in seconds.items()}
    outside = (INTERVAL - WINDOW) * median["outside"]
    ratio = (outside + WINDOW * median["inside"] + event) / (INTERVAL * median["static"])
    what = f"SmolLM2 dynamic {method.name}, {batch['input_ids'].numel()} tokens"
    return [
        at_most(f"{what}, interval {INTERVAL}, window {WINDOW}", ratio, 1.05, "of static LoRA"),
        Row(
            f"{what}: step with 16 slots for rank 8", median["outside"] / median["static"], "of it"
        ),
        Row(f"{what}: step in the window", median["inside"] / median["static"], "of it"),
        Row(f"{what}: event", event / median["static"], "static steps"),
        Row(f"{what}: empty slots and their moments", _empty_bytes(ranks) / 2**20, "MiB"),
        Row(f"{what}: what a window holds at its end", held / 2**20, "MiB"),
    ]


def _adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _empty_bytes(ranks: rw.DynamicRanks) -> int:
    """Memory of slots that no module uses: parameter, gradient and two moments each."""
    factors = lora_factors(ranks.model)
    allocated = sum(f.slots * ranks.controller.costs[n] for n, f in factors.items())
    return 4 * 4 * (allocated - ranks.plan.parameters)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Memory of tensors, of which modules with one input share some."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
