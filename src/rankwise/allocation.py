"""Integer ranks under a parameter budget: plain numbers in, plain numbers out.

Everything here works on mappings from module name to number, breaks ties by name, and knows nothing
of tensors or models. A module's *cost* is what one unit of rank takes, `d_in + d_out` parameters;
its *limits* are the smallest and the largest rank it may get.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import PlanError

Limits = Mapping[str, tuple[int, int]]

_ROUNDING = 1 + 1e-12
"""Keeps a product that is a whole number on paper from being floored to the one below."""
_NEGLIGIBLE = 1e-100
"""A weight this much smaller than the largest counts as zero, or its reciprocal overflows."""


def parameters(ranks: Mapping[str, int], costs: Mapping[str, int]) -> int:
    """Trainable parameters `sum_l r_l (d_in + d_out)` of LoRA-shaped adapters.

    Args:
        ranks: Rank per module.
        costs: `d_in + d_out` per module.
    """
    return sum(rank * costs[name] for name, rank in ranks.items())


def rank_limits(caps: Mapping[str, int], r_min: int, r_max: int) -> dict[str, tuple[int, int]]:
    """`(r_min, r_max)` for every module, lowered to `min(d_in, d_out)` where that is smaller.

    Args:
        caps: `min(d_in, d_out)` per module.
        r_min: Smallest rank; 0 allows a module without an adapter.
        r_max: Largest rank.

    Raises:
        PlanError: The bounds cross.
    """
    if not 0 <= r_min <= r_max:
        raise PlanError(f"0 <= r_min={r_min} <= r_max={r_max} must hold.")
    return {name: (min(r_min, cap), min(r_max, cap)) for name, cap in caps.items()}


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
    _check_scores(sensitivities, costs, "sensitivity")
    total = math.fsum(sensitivities[name] for name in costs)
    if total == 0:
        raise PlanError("every sensitivity is zero; there is nothing to share ranks by.")
    return {name: sensitivities[name] / total / math.sqrt(costs[name]) for name in costs}


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
    `sum_l r_l (d_in + d_out) <= budget`; what rounding left over is then handed out one rank at a
    time to the module that rounding cut most, `(offset + c w_l - r_l) / (d_in + d_out)`, ties by
    `ties` and then by name, until no module that may still grow is affordable. GARD takes
    `offset = r_min` and rounds to nearest (GARD section 3.2); RaLoRA-Pro's exact budget keeps the
    floor of its Eq. 8.

    A module of weight zero grows only when all others are full.

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
    _check_scores(weights, costs, "weight")
    check_feasible(costs, budget, limits)
    names = sorted(costs)
    cost = np.array([costs[name] for name in names], dtype=np.int64)
    low, high = (np.array([limits[n][i] for n in names], dtype=np.int64) for i in (0, 1))
    weight = np.array([weights[name] for name in names], dtype=np.float64)
    top = weight.max(initial=0.0)
    weight = np.where(weight > _NEGLIGIBLE * top, weight / (top or 1.0), 0.0)
    half = 0.5 if rounding == "nearest" else 0.0

    def ranks_at(c: float) -> NDArray[np.int64]:
        real = np.minimum(offset + c * weight + half, high)
        return np.maximum(np.floor(real).astype(np.int64), low)

    positive = weight > 0
    fills_all = float(((high[positive] + 1) / weight[positive]).max(initial=0.0))
    c = _largest(lambda c: int(ranks_at(c) @ cost) <= budget, fills_all)
    found = ranks_at(c)
    room = found < high
    if c < fills_all or not room.any():
        wanted = offset + c * weight
    else:
        # everything with a weight is full: the others share evenly what is left
        even = _largest(
            lambda e: int(np.where(room, np.clip(np.floor(e), low, high), found) @ cost) <= budget,
            float(high.max()) + 1,
        )
        found = np.where(room, np.clip(int(even), low, high), found)
        wanted = np.full(len(names), even)
    ranks = dict(zip(names, found.tolist(), strict=True))
    priority = dict(zip(names, wanted.tolist(), strict=True))
    _hand_out(ranks, costs, limits, budget, lambda n: (priority[n] - ranks[n]) / costs[n], ties)
    return {name: ranks[name] for name in costs}


def water_filling_ranks(
    energies: Mapping[str, Sequence[float] | NDArray[np.float64]],
    costs: Mapping[str, int],
    budget: int,
    limits: Limits,
) -> dict[str, int]:
    """Ranks that capture the most gradient energy per parameter: spectral water-filling.

    Maximises `sum_l sum_{i <= r_l} e_{l,i}` under `sum_l r_l (d_in + d_out) <= budget`, where
    `e_{l,i} = sigma_{l,i}^2` falls with i: the next unit of rank goes to the module whose next
    direction has the largest `e_{l, r_l + 1} / (d_in + d_out)`, ties by name.

    Why greedy: the gains of a module fall, so the best fractional solution takes directions in the
    order of energy per parameter until the budget is spent, and needs at most a fraction of one
    further direction, the first that is not affordable. Whole ranks therefore lose at most
    `e / (d_in + d_out)` of that direction times the parameters then left, which is less than its
    energy e; with equal costs nothing is lost. Cheaper directions then use what is left.

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
    names = sorted(costs)
    spectra = [_falling(name, energies, limits[name][1]) for name in names]
    ranks = {name: limits[name][0] for name in names}
    gains = [
        values[low:high] / costs[name]
        for name, values in zip(names, spectra, strict=True)
        for low, high in [limits[name]]
    ]
    left = budget - parameters(ranks, costs)
    if any(gain.size for gain in gains) and left:
        per_unit = np.repeat([costs[name] for name in names], [gain.size for gain in gains])
        level = _water_level(np.concatenate(gains), per_unit, left)
        for name, gain in zip(names, gains, strict=True):
            # gains fall, so those above the level are the first ones
            ranks[name] += int(np.searchsorted(-gain, -level, side="left"))
    by_name = dict(zip(names, spectra, strict=True))
    _hand_out(ranks, costs, limits, budget, lambda n: float(by_name[n][ranks[n]]) / costs[n])
    return {name: ranks[name] for name in costs}


def check_feasible(costs: Mapping[str, int], budget: int, limits: Limits) -> None:
    """Refuse a budget that cannot pay for the smallest ranks.

    Raises:
        PlanError: States the feasible range.
    """
    least, most = (sum(limits[name][i] * cost for name, cost in costs.items()) for i in (0, 1))
    if budget < least:
        r_min = max((limits[name][0] for name in costs), default=0)
        raise PlanError(
            f"budget of {budget} parameters is infeasible with r_min={r_min}: these "
            f"{len(costs)} modules take from {least} to {most}. Raise the budget or lower r_min."
        )


def _check_scores(scores: Mapping[str, float], costs: Mapping[str, int], what: str) -> None:
    for name in costs:
        value = scores.get(name, math.nan)
        if not math.isfinite(value) or value < 0:
            raise PlanError(
                f"{what} of {name} is {value}; it must be finite and non-negative. Profile again."
            )


def _falling(
    name: str, energies: Mapping[str, Sequence[float] | NDArray[np.float64]], longest: int
) -> NDArray[np.float64]:
    values = np.asarray(energies.get(name, ()), dtype=np.float64)
    if values.size < longest:
        raise PlanError(
            f"the spectrum of {name} has {values.size} values, and rank {longest} is allowed; "
            "profile again or lower r_max."
        )
    if not np.isfinite(values).all() or (values < 0).any() or (np.diff(values) > 0).any():
        raise PlanError(
            f"the spectrum of {name} must be finite, non-negative and largest first. Profile again."
        )
    return values


def _largest(feasible: Callable[[float], bool], upper: float) -> float:
    """The largest number up to `upper` that is feasible, to the last bit; 0 is taken to be."""
    if feasible(upper):
        return upper
    lower = 0.0
    while (middle := (lower + upper) / 2) not in (lower, upper):
        if feasible(middle):
            lower = middle
        else:
            upper = middle
    return lower


def _water_level(gains: NDArray[np.float64], costs: NDArray[np.int64], left: int) -> float:
    """The lowest level such that all gains above it are affordable together.

    A quickselect by cost: each round halves what is undecided, so the work is linear.
    """
    while gains.size:
        pivot = np.partition(gains, gains.size // 2)[gains.size // 2]
        above = gains > pivot
        cost_above = int(costs[above].sum())
        if cost_above > left:
            gains, costs = gains[above], costs[above]
            continue
        same = gains == pivot
        cost_same = int(costs[same].sum())
        if cost_above + cost_same > left:
            return float(pivot)
        left -= cost_above + cost_same
        below = gains < pivot
        gains, costs = gains[below], costs[below]
    return -1.0


def _hand_out(
    ranks: dict[str, int],
    costs: Mapping[str, int],
    limits: Limits,
    budget: int,
    priority: Callable[[str], float],
    ties: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Spend what is left, one rank at a time, by priority, then by `ties`, then by name."""
    then = {name: tuple(-tie for tie in ties[name]) if ties else () for name in ranks}
    left = budget - parameters(ranks, costs)
    queue = [
        (-priority(name), then[name], name)
        for name, rank in ranks.items()
        if rank < limits[name][1]
    ]
    heapq.heapify(queue)
    while queue:
        _, _, name = heapq.heappop(queue)
        if costs[name] > left:
            continue  # what is left only shrinks, so this module is done
        ranks[name] += 1
        left -= costs[name]
        if ranks[name] < limits[name][1]:
            heapq.heappush(queue, (-priority(name), then[name], name))


def block_count(erank: float, rank: int, n_max: int) -> int:
    """How many diagonal blocks align an adapter of rank r with a GID.

    `n = 2^clip(floor(log2(erank / r)), 0, log2 n_max)` (RaLoRA Eq. 4, with the floor of its text
    and released code, which also keeps `n r <= erank`).

    Args:
        erank: Effective rank of the layer's gradient; 0 for a zero gradient gives one block.
        rank: Rank r of each block.
        n_max: Largest block count, a power of two.
    """
    ratio = erank / rank * _ROUNDING
    return min(2 ** math.floor(math.log2(ratio)), n_max) if ratio >= 1 else 1


def dividing_blocks(blocks: int, d_in: int, d_out: int) -> int:
    """The largest power of two that is at most `blocks` and divides both dimensions."""
    common = math.gcd(d_in, d_out)
    power = common & -common  # the largest power of two in gcd(d_in, d_out)
    return min(power, 2 ** math.floor(math.log2(blocks)))
