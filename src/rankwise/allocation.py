"""Integer ranks under a parameter budget: plain numbers in, plain numbers out.

Everything here works on mappings from module name to number, orders modules by name wherever a
tie must be broken, and knows nothing of tensors or models.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping

from rankwise.errors import PlanError

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
    for name in costs:
        value = sensitivities.get(name, math.nan)
        if not math.isfinite(value) or value < 0:
            raise PlanError(
                f"sensitivity of {name} is {value}; it must be finite and non-negative. "
                "Profile again."
            )
    total = math.fsum(sensitivities[name] for name in costs)
    if total == 0:
        raise PlanError("every sensitivity is zero; there is nothing to share ranks by.")
    return {name: sensitivities[name] / total / math.sqrt(costs[name]) for name in costs}


def proportional_ranks(
    weights: Mapping[str, float],
    costs: Mapping[str, int],
    budget: int,
    bounds: tuple[int, int],
    caps: Mapping[str, int],
) -> dict[str, int]:
    """Ranks proportional to weights, exactly within a parameter budget.

    `r_l = clip(floor(c w_l), r_min, r_max)` with the largest `c` for which
    `sum_l r_l (d_in + d_out) <= budget`; what flooring left over is then handed out one rank at a
    time to the module that flooring cut most, `(c w_l - r_l) / (d_in + d_out)`, ties by name, until
    no module that may still grow is affordable.

    Args:
        weights: Non-negative finite weight per module.
        costs: `d_in + d_out` per module.
        budget: Trainable parameters that may not be exceeded.
        bounds: `(r_min, r_max)` for every module.
        caps: `min(d_in, d_out)` per module; lowers both bounds where it is smaller.

    Raises:
        PlanError: The budget is below the cost of `r_min` everywhere; the range is stated.
    """
    low = {name: min(bounds[0], caps[name]) for name in costs}
    high = {name: min(bounds[1], caps[name]) for name in costs}
    least, most = parameters(low, costs), parameters(high, costs)
    if budget < least:
        raise PlanError(
            f"budget of {budget} parameters is infeasible with r_min={bounds[0]}: these "
            f"{len(costs)} modules take from {least} to {most}. Raise the budget or lower r_min."
        )

    top = max(weights.values(), default=0.0)
    weights = {name: w / top if w > _NEGLIGIBLE * top else 0.0 for name, w in weights.items()}

    def ranks_at(c: float) -> dict[str, int]:
        # min() first: c * w may be too large for floor() to be worth taking
        return {
            name: max(low[name], math.floor(min(c * weights[name], high[name]))) for name in costs
        }

    c = _largest_feasible(lambda c: parameters(ranks_at(c), costs) <= budget, weights, high)
    ranks = ranks_at(c)
    _fill(ranks, {n: c * w for n, w in weights.items()}, costs, high, budget)
    return ranks


def _largest_feasible(feasible, weights: Mapping[str, float], high: Mapping[str, int]) -> float:  # type: ignore[no-untyped-def]
    positive = [(high[name] / w) for name, w in weights.items() if w > 0]
    upper = max(positive, default=0.0)
    if feasible(upper):
        return upper
    lower = 0.0
    while (middle := (lower + upper) / 2) not in (lower, upper):
        if feasible(middle):
            lower = middle
        else:
            upper = middle
    return lower


def _fill(
    ranks: dict[str, int],
    wanted: Mapping[str, float],
    costs: Mapping[str, int],
    high: Mapping[str, int],
    budget: int,
) -> None:
    left = budget - parameters(ranks, costs)
    queue = [
        (-(wanted[name] - rank) / costs[name], name)
        for name, rank in ranks.items()
        if rank < high[name]
    ]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if costs[name] > left:
            continue  # what is left only shrinks, so this module is done
        ranks[name] += 1
        left -= costs[name]
        if ranks[name] < high[name]:
            heapq.heappush(queue, (-(wanted[name] - ranks[name]) / costs[name], name))


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
