"""Methods with a budget: bounds, boxes around an earlier plan, ranks decided beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from rankwise.allocation import Limits, box_limits, fix_limits, rank_limits
from rankwise.budgets import parse_budget
from rankwise.errors import PlanError
from rankwise.methods.base import (
    Method,
    check_positive_int,
    costs_of,
    is_whole,
    ranks_of,
)
from rankwise.plan import RankPlan
from rankwise.profiling import GradientProfile
from rankwise.targets import LinearShape

NO_BUDGET = "none"
"""A word for ranks that no budget limits; r then only sets the scale."""


@dataclass(frozen=True)
class BudgetedMethod(Method):
    """Ranks between two bounds under a hard budget.

    Attributes:
        r_min: Smallest rank; 0 leaves modules out that earn nothing.
        r_max: Largest rank, at most `min(d_in, d_out)` of each module.
        budget: Trainable parameters that may not be exceeded: a number, or in words such as
            "r=8", "2.4M params", "0.5%" of the model, "10MB bf16" (`rankwise.budgets`). Default:
            LoRA's at rank r.
        around: An earlier plan, or the file it is in; no rank may differ from its by more than
            `delta`.
        delta: See `around`; default 2, as GARD's delta_max here.
        fixed: Rank per module that is decided beforehand; a name stands for the module of that name
            and for all whose names end in `.name`, taken literally.
    """

    budget_words: ClassVar[tuple[str, ...]] = ()
    """Words a method takes as its budget besides an amount."""

    r_min: int | None = None
    r_max: int | None = None
    budget: int | str | None = None
    around: RankPlan | str | Path | None = None
    delta: int = 2
    fixed: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.bounds
        if not is_whole(low) or low < 0:
            raise PlanError(f"r_min={low!r} must be a whole number of at least 0.")
        check_positive_int("r_max", high)
        at_rank = self.budget is None or self.budget in self.budget_words
        if at_rank and self.budget != NO_BUDGET and not low <= self.r <= high:
            raise PlanError(f"r_min={low} <= r={self.r} <= r_max={high} must hold.")
        if low > high:
            raise PlanError(f"r_min={low} <= r_max={high} must hold.")
        if self.budget is not None and self.budget not in self.budget_words:
            try:
                parse_budget(self.budget)
            except PlanError as error:
                words = " or ".join(map(repr, self.budget_words))
                raise PlanError(f"{error}{f' Or {words}.' if words else ''}") from error
        check_positive_int("delta", self.delta)
        if not isinstance(self.fixed, Mapping) or not all(map(is_whole, self.fixed.values())):
            raise PlanError(f"fixed={self.fixed!r} must be whole ranks by module name.")
        if not isinstance(self.around, RankPlan | str | Path | None):
            raise PlanError(f"around={self.around!r} must be a plan or the file it is in.")

    @property
    def bounds(self) -> tuple[int, int]:
        """`(r_min, r_max)` with the defaults filled in, for a budget of rank r."""
        return self._bounds_at(self.r)

    def _bounds_at(self, r: int) -> tuple[int, int]:
        low, high = self._default_bounds(r)
        low = low if self.r_min is None else self.r_min
        high = high if self.r_max is None else self.r_max
        if self.r_min is None:
            low = min(low, high)
        return low, max(high, low) if self.r_max is None else high

    def _default_bounds(self, r: int) -> tuple[int, int]:
        return 0, 8 * r

    def _parameters(self, profile: GradientProfile) -> int:
        """The budget in trainable parameters."""
        costs = costs_of(profile)
        if self.budget is None or self.budget in self.budget_words:
            return self.r * sum(costs.values())
        return parse_budget(self.budget).parameters(costs, profile.provenance.model_parameters)

    def _limits(self, profile: GradientProfile) -> Limits:
        shapes = {name: module.shape for name, module in profile.modules.items()}
        return self.limits_for(shapes, self._parameters(profile))

    def limits_for(self, shapes: Mapping[str, LinearShape], budget: int) -> Limits:
        """Bounds, lowered to each module's dimensions, boxed and fixed as asked for.

        Args:
            shapes: Of every module that was looked at.
            budget: Trainable parameters; the LoRA rank that they pay for sets the default bounds,
                or `r` where no budget was given.

        Raises:
            PlanError: `fixed` or `around` names another module.
        """
        caps = {name: shape.max_rank for name, shape in shapes.items()}
        r = self.r
        if self.budget is not None and self.budget not in self.budget_words:
            r = max(1, budget // sum(shape.rank_cost for shape in shapes.values()))
        limits = rank_limits(caps, *self._bounds_at(r))
        if self.around is not None:
            plan = self.around if isinstance(self.around, RankPlan) else RankPlan.load(self.around)
            limits = box_limits(limits, ranks_of(plan), self.delta)
        return fix_limits(limits, self.fixed, caps)
