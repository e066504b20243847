"""The rules: which unit of rank comes next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rankwise.allocation.exact import QUANTUM_BITS, complete, kinds_of
from rankwise.allocation.limits import Limits, check_feasible, check_scores
from rankwise.allocation.order import Floats, Ints, Modules, Order, take_all, take_prefix
from rankwise.errors import PlanError

_ROUNDING = 1 + 1e-12
"""Keeps a product that is a whole number on paper from being floored to the one below."""
_NEGLIGIBLE = 1e-100
"""A weight this much smaller than the largest counts as zero."""


def sensitivity_ranks(
    sensitivities: Mapping[str, float],
    costs: Mapping[str, int],
    r_ref: int,
    bounds: tuple[int, int],
) -> dict[str, int]:
    """RaLoRA-Pro's ranks as printed, whose total is only near the budget.

    `r_l = clip(floor(P a_l / sqrt(d_in + d_out)), r_min, r_max)` with `a_l = I_l / sum I` and
    `P = r_ref sum_l sqrt(d_in + d_out)` (RaLoRA Eq. 6-8, floor as in the released code). The
    square root evens out shapes but does not preserve `sum r (d_in + d_out)`: the paper's own
    settings run up to 15 % over LoRA's count.

    Args:
        sensitivities: `I_l = mean(|W * G|)`, non-negative.
        costs: `d_in + d_out` per module.
        r_ref: Reference LoRA rank.
        bounds: `(r_min, r_max)`.

    Raises:
        PlanError: A sensitivity is negative or not finite, or all are zero.
    """
    weights = smoothed_shares(sensitivities, costs)
    total = r_ref * math.fsum(math.sqrt(cost) for cost in costs.values())
    low, high = bounds
    return {
        name: min(max(math.floor(total * weights[name] * _ROUNDING), low), high) for name in costs
    }


def smoothed_shares(
    sensitivities: Mapping[str, float], costs: Mapping[str, int]
) -> dict[str, float]:
    """Share of rank each module deserves: `a_l / sqrt(d_in + d_out)` (RaLoRA Eq. 6 and 8).

    Raises:
        PlanError: A sensitivity is missing, negative or not finite, or all are zero.
    """
    check_scores(sensitivities, costs, "sensitivity")
    total = math.fsum(sensitivities[name] for name in costs)
    if total == 0:
        raise PlanError("every sensitivity is zero; there is nothing to share ranks by.")
    return {name: sensitivities[name] / total / math.sqrt(costs[name]) for name in costs}


def uniform_ranks(costs: Mapping[str, int], budget: int, limits: Limits) -> dict[str, int]:
    """Ranks as equal as the budget allows; the first by name are one larger where it must be.

    Args:
        costs: `d_in + d_out` per module.
        budget: Trainable parameters that may not be exceeded.
        limits: `(smallest, largest)` rank per module.

    Raises:
        PlanError: The budget cannot pay for the smallest ranks.
    """
    return proportional_ranks(dict.fromkeys(costs, 1.0), costs, budget, limits)


def proportional_ranks(
    weights: Mapping[str, float],
    costs: Mapping[str, int],
    budget: int,
    limits: Limits,
    *,
    offset: int = 0,
    rounding: Literal["floor", "nearest"] = "floor",
    ties: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, int]:
    """Ranks proportional to weights, within a parameter budget that is never exceeded.

    `r_l = clip(round(offset + c w_l))` with the largest `c` for which
    `sum_l r_l (d_in + d_out) <= budget`. GARD takes `offset = r_min` and rounds to nearest (GARD
    section 3.2); RaLoRA-Pro's exact budget keeps the floor of its Eq. 8.

    What rounding left over is spent in the same order: the unit that a growing c would reach next
    comes next, ties by the lower rank, by `ties` and then by name, passing over what is not
    affordable. Where the modules share few costs, a few units are then exchanged so that the total
    of the modules that have a weight is the largest that whole ranks reach within the budget
    (`rankwise.allocation.exact`). Either way the total never falls when the budget rises, and what
    is left is less than the cheapest rank still allowed. (A fill by the fraction that rounding cut
    off, per parameter, keeps the budget as well, but follows no fixed sequence, on which the first
    of these rests.)

    A module of weight zero grows only when the others are full or no longer affordable.

    Args:
        weights: Non-negative finite weight per module.
        costs: `d_in + d_out` per module.
        budget: Trainable parameters that may not be exceeded.
        limits: `(smallest, largest)` rank per module.
        offset: Real rank of a module of weight zero.
        rounding: How real ranks become whole.
        ties: Numbers per module that decide between equal claims, the larger first.

    Raises:
        PlanError: A weight is missing, negative or not finite, or the budget cannot pay for the
            smallest ranks; the feasible range is stated.
    """
    check_scores(weights, costs, "weight")
    check_feasible(costs, budget, limits)
    modules = _modules(costs, limits, ties)
    weight = np.array([weights[name] for name in modules.names], dtype=np.float64)
    top = weight.max(initial=0.0)
    weight = np.where(weight > _NEGLIGIBLE * top, weight / (top or 1.0), 0.0)
    order = _Proportional(modules, weight, offset + (0.5 if rounding == "nearest" else 0.0))
    return _in_input_order(_spend(modules, order, budget), costs)


def water_filling_ranks(
    energies: Mapping[str, Sequence[float] | Floats],
    costs: Mapping[str, int],
    budget: int,
    limits: Limits,
) -> dict[str, int]:
    """Ranks that capture the most gradient energy per parameter: spectral water-filling.

    Maximises `sum_l sum_{i <= r_l} e_{l,i}` under `sum_l r_l (d_in + d_out) <= budget`, where
    `e_{l,i} = sigma_{l,i}^2` falls with i: the next unit of rank goes to the module whose next
    direction has the largest `e_{l, r_l + 1} / (d_in + d_out)`, ties by the lower rank, then by
    name.

    Why greedy: the gains of a module fall, so the best fractional solution takes directions in the
    order of energy per parameter until the budget is spent, and needs at most a fraction of one
    further direction, the first that is not affordable. Whole ranks therefore lose at most
    `e / (d_in + d_out)` of that direction times the parameters then left, which is less than its
    energy e; with equal costs nothing is lost. Where the modules share few costs, as in every
    transformer, the best exchange of units around that point is then found exactly, so that nothing
    is lost at all (`rankwise.allocation.exact`; energies are compared to 2^-44 of the largest).
    Elsewhere cheaper directions use what is left.

    Args:
        energies: Squared singular values per module, largest first.
        costs: `d_in + d_out` per module.
        budget: Trainable parameters that may not be exceeded.
        limits: `(smallest, largest)` rank per module; the largest at most the spectrum's length.

    Raises:
        PlanError: A spectrum is missing, too short, negative, not finite or not falling, or the
            budget cannot pay for the smallest ranks.
    """
    check_feasible(costs, budget, limits)
    modules = _modules(costs, limits, None)
    order = _energy_order(modules, energies)
    return _in_input_order(_spend(modules, order, budget), costs)


def finds_largest_total(costs: Mapping[str, int], limits: Limits) -> bool:
    """Whether costs are few enough that the rules spend what is left exactly, at any budget."""
    return kinds_of(_modules(costs, limits, None)) is not None


@dataclass(frozen=True)
class _Proportional:
    """A unit's priority is `1 / c` at the c where rounding reaches it: `w / (k - shift)`."""

    modules: Modules
    weight: Floats
    shift: float

    def priority(self, members: Ints, units: Ints) -> Floats:
        weight, distance = self.weight[members], units - self.shift
        reached = distance <= 0  # before c has grown at all, if it has any weight
        found: Floats = weight / np.where(reached, 1.0, distance)
        found[reached & (weight > 0)] = np.inf
        return found

    def above(self, level: float, least: Ints, most: Ints) -> Ints:
        found = least.copy()
        open_ = np.flatnonzero((least < most) & (self.weight > 0))
        low, high = least[open_], most[open_]
        with np.errstate(divide="ignore", over="ignore"):
            real = self.shift + self.weight[open_] / level
        guess = np.ceil(np.clip(real, low, high)).astype(np.int64)
        # the guess may be off by one, where dividing by one and by the other round differently
        guess -= (guess > low) & (self.priority(open_, guess) <= level)
        guess += (guess < high) & (self.priority(open_, guess + 1) > level)
        found[open_] = guess
        return found


@dataclass(frozen=True)
class _ByEnergy:
    """A unit's priority is its energy per parameter."""

    modules: Modules
    energies: Floats
    """All spectra up to the largest ranks, one after the other."""
    start: Ints

    def priority(self, members: Ints, units: Ints) -> Floats:
        return self.energies[self.start[members] + units - 1] / self.modules.cost[members]

    def above(self, level: float, least: Ints, most: Ints) -> Ints:
        low, high = least.copy(), most.copy()
        open_ = np.flatnonzero(low < high)
        while open_.size:
            middle = (low[open_] + high[open_] + 1) // 2
            over = self.priority(open_, middle) > level
            low[open_[over]] = middle[over]
            high[open_[~over]] = middle[~over] - 1
            open_ = open_[low[open_] < high[open_]]
        return low

    def quanta(self, members: Ints, units: Ints) -> Ints:
        """Energies as whole numbers, so that sums of them compare exactly."""
        largest = float(self.energies.max(initial=0.0)) or 1.0
        parts = self.energies[self.start[members] + units - 1] / largest
        found: Ints = np.rint(np.ldexp(parts, QUANTUM_BITS)).astype(np.int64)
        return found


def _spend(modules: Modules, order: Order, budget: int) -> dict[str, int]:
    ranks = take_prefix(modules, order, budget)
    living = _without_dead(modules, order)
    kinds = kinds_of(living)
    if kinds is not None:
        energy = order.quanta if isinstance(order, _ByEnergy) else None
        ranks = complete(living, order, ranks, budget - modules.total(ranks), kinds, energy)
    return modules.named(take_all(modules, order, ranks, budget))


def _without_dead(modules: Modules, order: Order) -> Modules:
    """The modules with those of weight zero held at their smallest rank, unless all are.

    What is left is spent on the living first: their total is then the largest that they reach, and
    where it rises with the budget it takes all of it, so that the sum of both never falls.
    """
    dead = order.weight <= 0 if isinstance(order, _Proportional) else np.zeros(0, dtype=bool)
    return (
        modules if dead.all() else replace(modules, high=np.where(dead, modules.low, modules.high))
    )


def _modules(
    costs: Mapping[str, int], limits: Limits, ties: Mapping[str, Sequence[float]] | None
) -> Modules:
    names = sorted(costs)
    place = np.arange(len(names))
    if ties is not None:
        claims = -np.array([ties[name] for name in names], dtype=np.float64).reshape(len(names), -1)
        place[np.lexsort((place, *claims.T[::-1]))] = np.arange(len(names))
    low, high = (np.array([limits[n][i] for n in names], dtype=np.int64) for i in (0, 1))
    cost = np.array([costs[name] for name in names], dtype=np.int64)
    return Modules(names, cost, low, high, place)


def _in_input_order(ranks: Mapping[str, int], costs: Mapping[str, int]) -> dict[str, int]:
    return {name: ranks[name] for name in costs}


def _energy_order(
    modules: Modules, energies: Mapping[str, Sequence[float] | NDArray[np.float64]]
) -> _ByEnergy:
    """The spectra in one array, checked."""
    longest = modules.high.tolist()
    spectra = [
        np.asarray(energies.get(name, ()), dtype=np.float64)[:most]
        for name, most in zip(modules.names, longest, strict=True)
    ]
    for name, values, most in zip(modules.names, spectra, longest, strict=True):
        if values.size < most:
            raise PlanError(
                f"the spectrum of {name} has {values.size} values, and rank {most} is allowed; "
                "profile again or lower r_max."
            )
    flat = np.concatenate(spectra) if spectra else np.zeros(0)
    start = np.cumsum(modules.high) - modules.high
    rising = np.zeros(flat.size, dtype=bool)
    rising[1:] = flat[1:] > flat[:-1]
    rising[start[start < flat.size]] = False  # a spectrum does not follow the one before it
    wrong = ~((flat >= 0) & (flat < np.inf)) | rising
    if wrong.any():
        at = int(np.searchsorted(start, np.flatnonzero(wrong)[0], side="right")) - 1
        raise PlanError(
            f"the spectrum of {modules.names[at]} must be finite, non-negative and largest first. "
            "Profile again."
        )
    return _ByEnergy(modules, flat, start)
