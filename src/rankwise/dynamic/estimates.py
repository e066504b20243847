"""What a method reads from a profile, apart from the rule that turns it into ranks.

A static plan does both at once. A dynamic one averages the first over events and applies the second
inside a box around the ranks it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rankwise.allocation import (
    Limits,
    proportional_ranks,
    smoothed_shares,
    water_filling_ranks,
)
from rankwise.errors import PlanError
from rankwise.methods import Compose, Gard, LoraGid, LsLora, Method, WaterFill
from rankwise.methods.base import costs_of, energies_of
from rankwise.methods.budgeted import BudgetedMethod
from rankwise.plan import RankPlan
from rankwise.profiling import GradientProfile

Estimates = Mapping[str, Sequence[float]]
"""Per module, the numbers that a rule reads: one score, a score and what breaks its ties, or a
spectrum of energies, largest first."""


@dataclass(frozen=True)
class Rule:
    """How averaged estimates become ranks.

    Attributes:
        kind: `"proportional"` to the first number of each estimate, the others break ties; or
            `"water-fill"` of energies.
        bounds: Smallest and largest rank that any module may have.
        rounding: See `rankwise.allocation.proportional_ranks`.
        offset: Likewise.
    """

    kind: Literal["proportional", "water-fill"]
    bounds: tuple[int, int]
    rounding: Literal["floor", "nearest"] = "floor"
    offset: int = 0

    def allocate(
        self, estimates: Estimates, costs: Mapping[str, int], budget: int, limits: Limits
    ) -> dict[str, int]:
        """Ranks within `limits` that never exceed the budget.

        Raises:
            PlanError: An estimate is negative or missing, or the budget is infeasible.
        """
        if self.kind == "water-fill":
            return water_filling_ranks(estimates, costs, budget, limits)
        scores = {name: estimates[name][0] for name in costs}
        ties = {name: list(estimates[name][1:]) for name in costs}
        return proportional_ranks(
            scores, costs, budget, limits, offset=self.offset, rounding=self.rounding, ties=ties
        )


def rule_of(method: Method) -> Rule:
    """The rule of a method, with its bounds.

    Raises:
        PlanError: The method has no ranks that could move.
    """
    if isinstance(method, Gard):
        return Rule("proportional", method.bounds, "nearest", offset=method.bounds[0])
    if isinstance(method, Compose) and method.adapter == "lora":
        return Rule("water-fill" if method.rule == "water-fill" else "proportional", method.bounds)
    if isinstance(method, WaterFill):
        return Rule("water-fill", method.bounds)
    if isinstance(method, LsLora | LoraGid):
        return Rule("proportional", method.bounds)
    raise PlanError(
        f"method={method.name!r} cannot move ranks while training: they are the same everywhere, "
        "or its adapters have blocks. Use gard, water-fill, ls-lora, lora-gid, or compose with "
        "adapter='lora'."
    )


def default_method(plan: RankPlan) -> Gard:
    """GARD between rank 1 and twice the rank that the parameters pay for, or the plan's largest.

    The bound is lower than that of a static plan because masked slots cost time and memory whether
    they are used or not.
    """
    largest = max(module.rank for module in plan.modules.values())
    even = max(plan.r_ref, round(plan.even_rank))  # a budget in words may pay for more than r_ref
    return Gard(r=plan.r_ref, alpha=plan.alpha, r_max=max(2 * even, largest))


def limits_of(method: Method, plan: RankPlan, budget: int) -> dict[str, tuple[int, int]]:
    """Smallest and largest rank of every module that the plan adapts, as a static plan has them.

    Args:
        method: One that `rule_of` knows.
        plan: Where ranks start.
        budget: Active parameters.

    Raises:
        PlanError: The method fixes, or keeps near, a module that the plan does not know.
    """
    assert isinstance(method, BudgetedMethod)
    shapes = {name: module.shape for name, module in plan.modules.items()}
    limits = method.limits_for(shapes | plan.left_out, budget)
    return {name: limits[name] for name in shapes}


def estimate(
    method: Method, profile: GradientProfile, rule: Rule | None = None
) -> dict[str, list[float]]:
    """The numbers that the method's rule reads, of every module of a profile.

    Args:
        method: What to read.
        profile: What was measured.
        rule: Of a run; default: the method's own.

    Raises:
        PlanError: The profile lacks the statistic, or the method has no ranks that could move.
    """
    rule = rule or rule_of(method)
    if rule.kind == "water-fill":
        longest = rule.bounds[1]
        return {name: values[:longest].tolist() for name, values in energies_of(profile).items()}
    if isinstance(method, Gard):
        return _energy_ranks(method, profile)
    if isinstance(method, Compose):
        even = method.rule == "uniform"
        scores = dict.fromkeys(profile.modules, 1.0) if even else method.scores(profile)
        if method.rule == "smoothed":
            costs = costs_of(profile)
            scores = {name: score / math.sqrt(costs[name]) for name, score in scores.items()}
    elif isinstance(method, LsLora):
        measured = {name: module.sensitivity for name, module in profile.modules.items()}
        scores = (
            smoothed_shares(measured, costs_of(profile)) if any(measured.values()) else measured
        )
    else:
        scores = profile.gid
    return {name: [score] for name, score in scores.items()}


def _energy_ranks(method: Gard, profile: GradientProfile) -> dict[str, list[float]]:
    if profile.gram is None:
        raise PlanError("gard needs Gram matrices; measure statistics=('mean', 'gram').")
    costs = costs_of(profile)
    crossings = profile.energy_crossings(method.energy)
    return {
        name: [
            math.ceil(crossing) / (costs[name] if method.per_cost else 1),
            crossing,
            float(profile.gram[name].trace()),
        ]
        for name, crossing in crossings.items()
    }
