"""Taking units of rank in the order of a rule until a budget is spent.

A *unit* is the k-th rank of a module. A rule gives every unit a priority that does not rise within
a module; units go by priority, then the lower rank first, then by the place of the module. Units
that are not affordable are passed over, so the result follows one fixed sequence, first fit.

First fit never takes fewer parameters from a larger budget. With a sequence of costs a_1, a_2, ...
the total is `f_i(B) = a_i + f_{i+1}(B - a_i)` where `a_i <= B`, else `f_{i+1}(B)`. If `f_{i+1}`
never falls, neither does `f_i`: on both sides of `B = a_i` it is `f_{i+1}` shifted, below it is at
most `B < a_i`, and from there on at least `a_i`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_LARGEST_BITS = int(np.array(np.finfo(np.float64).max).view(np.int64))


@dataclass(frozen=True)
class Modules:
    """The modules as arrays, one entry each.

    Attributes:
        names: Sorted names.
        cost: Parameters of one unit of rank.
        low: Smallest ranks.
        high: Largest ranks.
        place: Place of each module among those of equal claim, the first first.
    """

    names: Sequence[str]
    cost: Ints
    low: Ints
    high: Ints
    place: Ints

    def total(self, ranks: Ints) -> int:
        """Trainable parameters."""
        return int(ranks @ self.cost)

    def named(self, ranks: Ints) -> dict[str, int]:
        """Rank per name."""
        return dict(zip(self.names, ranks.tolist(), strict=True))


class Order(Protocol):
    """Priorities of units, non-negative and not rising within a module."""

    def priority(self, members: Ints, units: Ints) -> Floats:
        """Of the `units[i]`-th rank, counted from 1, of module `members[i]`."""

    def above(self, level: float, least: Ints, most: Ints) -> Ints:
        """Ranks made of all units of priority above a level, known to be between two others."""


def take_prefix(modules: Modules, order: Order, budget: int) -> Ints:
    """Units in their order up to the first that is not affordable."""
    ranks, most = modules.low, modules.high
    feasible, infeasible = _LARGEST_BITS, -1
    if modules.total(found := order.above(0.0, ranks, most)) <= budget:
        ranks, feasible = found, 0
    # non-negative floats are ordered as their bits are, so this ends after 63 steps
    while feasible - infeasible > 1 and feasible > 0:
        middle = (feasible + infeasible) // 2
        found = order.above(float(np.int64(middle).view(np.float64)), ranks, most)
        if modules.total(found) <= budget:
            feasible, ranks = middle, found
        else:
            infeasible, most = middle, found
    return _first_fit(modules, order, ranks, budget, pass_over=False)


def take_all(modules: Modules, order: Order, ranks: Ints, budget: int) -> Ints:
    """Further units in their order, passing over what is not affordable."""
    return _first_fit(modules, order, ranks, budget, pass_over=True)


def _first_fit(
    modules: Modules, order: Order, ranks: Ints, budget: int, *, pass_over: bool
) -> Ints:
    ranks = ranks.copy()
    left = budget - modules.total(ranks)
    growing = np.flatnonzero(ranks < modules.high)
    while True:
        growing = growing[ranks[growing] < modules.high[growing]]
        if pass_over:
            growing = growing[modules.cost[growing] <= left]
        if not growing.size:
            return ranks
        priority = order.priority(growing, ranks[growing] + 1)
        first = growing[priority == priority.max()]
        first = first[ranks[first] == ranks[first].min()]
        first = first[np.argsort(modules.place[first])]
        spent = np.cumsum(modules.cost[first])
        fit = int(np.searchsorted(spent, left, side="right"))
        if fit:
            ranks[first[:fit]] += 1
            left -= int(spent[fit - 1])
        if fit < first.size and not pass_over:
            return ranks
