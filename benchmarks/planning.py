"""Planning with every rule, on one core: the modules of a 70B Llama, and 100,000."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from benchmarks.timing import Row, at_most
from rankwise import allocation as plan

COSTS = (16384, 9216, 9216, 16384, 36864, 36864, 36864)
"""q, k, v, o, gate, up and down of Llama-3-70B: d_in + d_out."""
R_MAX = 256


def measure(*, quick: bool) -> list[Row]:
    """Processor seconds of one plan at LoRA r = 8's budget, the best of some runs."""
    rows = []
    for modules, runs, limit, unit, scale in (
        (560, 9, 20.0, "ms", 1e3),
        (100_000, 1 if quick else 3, 2.0, "s", 1.0),
    ):
        for name, rule in _rules(modules).items():
            seconds = min(_processor_seconds(rule) for _ in range(runs))
            rows.append(
                at_most(f"planning {modules:,} modules, {name}", seconds * scale, limit, unit)
            )
    return rows


def _processor_seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def _rules(modules: int) -> dict[str, Callable[[], dict[str, int]]]:
    generator = np.random.default_rng(0)
    names = [f"model.layers.{i // 7}.kind.{i % 7}" for i in range(modules)]
    costs = {name: COSTS[i % 7] for i, name in enumerate(names)}
    odd = dict(zip(names, generator.integers(500, 9000, modules).tolist(), strict=True))
    limits = dict.fromkeys(names, (0, R_MAX))
    scores = dict(zip(names, generator.random(modules).tolist(), strict=True))
    ties = {name: (score,) for name, score in scores.items()}
    spectra = -np.sort(-generator.random((modules, R_MAX)), axis=1)
    energies = dict(zip(names, spectra, strict=True))
    budget = 8 * sum(costs.values())
    shares = plan.smoothed_shares(scores, costs)
    return {
        "uniform": lambda: plan.uniform_ranks(costs, budget, limits),
        "proportional": lambda: plan.proportional_ranks(scores, costs, budget, limits),
        "GARD": lambda: plan.proportional_ranks(
            scores, costs, budget, limits, offset=1, rounding="nearest", ties=ties
        ),
        "sensitivity": lambda: plan.proportional_ranks(shares, costs, budget, limits),
        "sensitivity as printed": lambda: plan.sensitivity_ranks(scores, costs, 8, (4, 16)),
        "water-filling": lambda: plan.water_filling_ranks(energies, costs, budget, limits),
        "water-filling, odd shapes": lambda: plan.water_filling_ranks(
            energies, odd, 8 * sum(odd.values()), limits
        ),
    }
