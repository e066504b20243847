"""How much rank do I need: captured gradient energy against the parameter budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rankwise.allocation import parameters, rank_limits, water_filling_ranks
from rankwise.errors import PlanError
from rankwise.methods.base import caps_of, costs_of, energies_of
from rankwise.methods.spectral import WaterFill
from rankwise.profiling import GradientProfile
from rankwise.tables import make_table, render

_FLAT = 1e-4
"""Differences of captured energy below a hundredth of a point are none."""


@dataclass(frozen=True)
class BudgetPoint:
    """What one budget captures of the mean gradients' energy `sum_l sum_i sigma_{l,i}^2`.

    Attributes:
        r: LoRA rank that takes this budget everywhere.
        parameters: The budget, in trainable parameters.
        uniform: Share captured by rank r in every module, in [0, 1].
        water_fill: Share captured by the best ranks at this budget, in [0, 1].
    """

    r: int
    parameters: int
    uniform: float
    water_fill: float


@dataclass(frozen=True)
class BudgetCurve:
    """Budgets that double from point to point, and the one that is recommended.

    Captured energy is what the best update of that size keeps of the *measured mean gradient*, and
    training follows many gradients: it answers where more rank stops buying a better first step,
    not what the loss will be.
    """

    points: tuple[BudgetPoint, ...]
    batches: int

    @property
    def average_gain(self) -> float:
        """What a doubling adds on average, from the smallest to the largest budget."""
        doublings = max(len(self.points) - 1, 1)
        return (self.points[-1].water_fill - self.points[0].water_fill) / doublings

    @property
    def knee(self) -> BudgetPoint:
        """The budget where doublings stop buying more than an average one.

        The point farthest above the chord between the curve's ends, captured energy over the
        logarithm of the budget: before it a doubling adds more than `average_gain`, after it less.
        It needs no threshold, but it depends on the range of budgets looked at.
        """
        first = self.points[0].water_fill
        above = [p.water_fill - first - i * self.average_gain for i, p in enumerate(self.points)]
        if self.average_gain < _FLAT:
            return self.points[0]
        # the curve of an even spectrum lies below its chord: nothing but its end is a choice
        return self.points[above.index(max(above))] if max(above) > _FLAT else self.points[-1]

    def recommendation(self) -> str:
        """The recommended budget and its reason, in words that can be quoted."""
        knee = self.knee
        later = self.points[self.points.index(knee) + 1 :]
        captured = (
            f"r = {knee.r} ({knee.parameters:,} parameters, budget=r={knee.r}) can capture "
            f"{knee.water_fill:.1%} of the gradient energy measured over {self.batches} batches"
        )
        if len(self.points) == 1:
            return f"{captured}; it is the only budget looked at."
        if not later:
            return (
                f"{captured}, and no doubling up to here adds less than the ones before it: the "
                "gradients ask for more rank than the largest budget looked at."
            )
        gain = later[0].water_fill - knee.water_fill
        return (
            f"{captured}; equal ranks of this size capture {knee.uniform:.1%}. It is the knee of "
            f"the curve: doubling the budget once more would add {gain * 100:.1f} percentage "
            f"points, where an average doubling from r = {self.points[0].r} to "
            f"r = {self.points[-1].r} adds {self.average_gain * 100:.1f}. Energy says where more "
            "rank stops buying a better first step; training follows many gradients, so take it "
            "as where to start, not as what the loss will be."
        )

    def __str__(self) -> str:
        rows = [
            (p.r, f"{p.parameters:,}", f"{p.uniform:.1%}", f"{p.water_fill:.1%}", _gain(p, after))
            for p, after in zip(self.points, (*self.points[1:], None), strict=True)
        ]
        columns = ["LoRA r", "parameters", "uniform", "water-fill", "doubling adds"]
        title = "share of the gradient energy that a budget can capture"
        return render(make_table(columns, rows, title=title))


def budget_curve(profile: GradientProfile, ranks: Sequence[int] | None = None) -> BudgetCurve:
    """Captured gradient energy of uniform and of water-filled ranks, budget by budget.

    Args:
        profile: Measured gradients.
        ranks: LoRA ranks whose budgets are looked at, each twice the one before; default 1, 2,
            4, ... up to the largest rank of the smaller modules.

    Raises:
        PlanError: No rank is given, one is not positive, or they do not double.
    """
    costs, caps, energies = costs_of(profile), caps_of(profile), energies_of(profile)
    kept = {name: np.cumsum(energy) for name, energy in energies.items()}
    total = sum(float(energy[-1]) for energy in kept.values())
    if ranks is None:
        ranks = [2**i for i in range(_common_cap(caps, costs).bit_length())]
    if not ranks or min(ranks) < 1:
        raise PlanError(f"ranks={list(ranks)!r} must be whole numbers of at least 1.")
    if any(after != 2 * r for r, after in pairwise(ranks)):
        raise PlanError(f"ranks={list(ranks)!r}: each must be twice the one before.")
    points = []
    for r in ranks:
        even = {name: min(r, cap) for name, cap in caps.items()}
        budget = parameters(even, costs)
        limits = rank_limits(caps, 0, WaterFill(r=r).bounds[1])
        best = water_filling_ranks(energies, costs, budget, limits)
        shares = (
            sum(float(kept[name][rank - 1]) for name, rank in chosen.items() if rank) / total
            for chosen in (even, best)
        )
        points.append(BudgetPoint(r, budget, *shares))
    return BudgetCurve(tuple(points), profile.provenance.batches)


def _common_cap(caps: Mapping[str, int], costs: Mapping[str, int]) -> int:
    """The smallest largest rank, but for the smallest modules, which take a twentieth of a budget.

    A gate with one output cannot have more than rank 1, and says nothing about the others.
    """
    seen, total = 0, sum(costs.values())
    for name in sorted(caps, key=lambda name: caps[name]):
        seen += costs[name]
        if 20 * seen > total:
            return caps[name]
    return max(caps.values())


def _gain(point: BudgetPoint, doubled: BudgetPoint | None) -> str:
    return "" if doubled is None else f"{(doubled.water_fill - point.water_fill) * 100:.1f} points"
