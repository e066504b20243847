"""GARD's budget of 2,570 parameters, where it can be spent exactly and where it cannot."""

from __future__ import annotations

import pytest

from rankwise.allocation import (
    parameters,
    proportional_ranks,
    rank_limits,
    uniform_ranks,
    water_filling_ranks,
)

KINDS = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576),
         "gate": (576, 1536), "up": (576, 1536), "down": (1536, 576)}  # fmt: skip
SHAPES = {f"layers.{i}.{kind}": shape for i in range(30) for kind, shape in KINDS.items()}
COSTS = {name: sum(shape) for name, shape in SHAPES.items()}
LIMITS = rank_limits({name: min(shape) for name, shape in SHAPES.items()}, 0, 64)


@pytest.mark.parametrize("first", ["gate", "q", "k"])
def test_smollm2_spends_2304(first: str) -> None:
    """Ranks take 768, 1,152 or 2,112: the largest total is 2,304, also where 2,112 comes first."""
    scores = {name: 9.0 if name == f"layers.3.{first}" else 1.0 for name in SHAPES}
    for ranks in (
        proportional_ranks(scores, COSTS, 2570, LIMITS),
        proportional_ranks(scores, COSTS, 2570, LIMITS, rounding="nearest"),
        uniform_ranks(COSTS, 2570, LIMITS),
    ):
        assert parameters(ranks, COSTS) == 2304


def test_water_filling_spends_less_where_it_holds_more() -> None:
    energies = {name: [1.0] * 64 for name in SHAPES}
    energies["layers.3.gate"] = [99.0] + [1.0] * 63
    ranks = water_filling_ranks(energies, COSTS, 2570, LIMITS)
    assert {name: rank for name, rank in ranks.items() if rank} == {"layers.3.gate": 1}
    energies["layers.3.gate"] = [1.0] * 64
    assert parameters(water_filling_ranks(energies, COSTS, 2570, LIMITS), COSTS) == 2304


def test_reached_exactly() -> None:
    costs = {name: 514 for name in "abc"}
    ranks = uniform_ranks(costs, 2570, dict.fromkeys(costs, (0, 4)))
    assert parameters(ranks, costs) == 2570
