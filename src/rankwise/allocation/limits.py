"""Costs, bounds and boxes of ranks, and what a budget must at least pay for."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rankwise.errors import PlanError, nearest

Limits = Mapping[str, tuple[int, int]]


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


def box_limits(limits: Limits, around: Mapping[str, int], delta: int) -> dict[str, tuple[int, int]]:
    """Limits narrowed to a box around earlier ranks.

    `[max(r_min, old - delta), min(r_max, old + delta)]`. An old rank outside the limits gives the
    limit nearest to it.

    Args:
        limits: `(smallest, largest)` rank per module.
        around: Earlier rank per module; a module that is not named had none, rank 0.
        delta: Largest change of a rank.

    Raises:
        PlanError: `around` names a module that is not among the limits.
    """
    for name in around:
        if name not in limits:
            raise PlanError(f"around: the earlier plan adapts {name!r}; {nearest(name, limits)}")

    def box(name: str) -> tuple[int, int]:
        low, high = limits[name]
        old = around.get(name, 0)
        return min(max(low, old - delta), high), max(min(high, old + delta), low)

    return {name: box(name) for name in limits}


def fix_limits(
    limits: Limits, fixed: Mapping[str, int], caps: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Limits with the ranks of some modules decided beforehand.

    Args:
        limits: `(smallest, largest)` rank per module.
        fixed: Rank per name. A name is taken literally and stands for the module of that name and
            for every module whose name ends in `.name`; where several match, the longest decides.
        caps: `min(d_in, d_out)` per module.

    Raises:
        PlanError: A name matches no module, or a rank does not fit.
    """
    found = dict(limits)
    for pattern in sorted(fixed, key=len):
        rank = fixed[pattern]
        matched = [name for name in limits if name == pattern or name.endswith("." + pattern)]
        if not matched:
            endings = {name.rsplit(".", 1)[-1] for name in limits}
            known = limits if "." in pattern else endings
            raise PlanError(f"fixed: {pattern!r} matches no module; {nearest(pattern, known)}")
        for name in matched:
            if not 0 <= rank <= caps[name]:
                raise PlanError(
                    f"fixed: rank {rank} of {name} must be from 0 to min(d_in, d_out)={caps[name]}."
                )
            found[name] = (rank, rank)
    return found


def check_feasible(costs: Mapping[str, int], budget: int, limits: Limits) -> None:
    """Refuse a budget that cannot pay for the smallest ranks.

    Raises:
        PlanError: States the feasible range.
    """
    least, most = (sum(limits[name][i] * cost for name, cost in costs.items()) for i in (0, 1))
    if budget < least:
        raise PlanError(
            f"budget of {budget} parameters is infeasible: within their bounds these {len(costs)} "
            f"modules take from {least} to {most}. Raise the budget, or lower r_min or what fixes "
            "the ranks."
        )


def cheapest_next(ranks: Mapping[str, int], costs: Mapping[str, int], limits: Limits) -> int | None:
    """What the cheapest rank takes that the limits still allow; None where all ranks are largest.

    Args:
        ranks: Rank per module.
        costs: `d_in + d_out` per module.
        limits: `(smallest, largest)` rank per module.
    """
    return min((costs[n] for n, rank in ranks.items() if rank < limits[n][1]), default=None)


def check_scores(scores: Mapping[str, float], costs: Mapping[str, int], what: str) -> None:
    """Refuse scores that are missing, negative or not finite.

    Raises:
        PlanError: Names the module.
    """
    for name in costs:
        value = scores.get(name, math.nan)
        if not math.isfinite(value) or value < 0:
            raise PlanError(
                f"{what} of {name} is {value}; it must be finite and non-negative. Profile again."
            )
