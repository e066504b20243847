"""Deciding which ranks move: pure numbers, no tensors, no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict, FiniteFloat, NonNegativeInt

from rankwise.allocation import Limits, parameters, rank_limits
from rankwise.dynamic.estimates import Estimates, Rule
from rankwise.errors import PlanError, nearest
from rankwise.plan import RankPlan
from rankwise.targets import LinearShape

ShrinkBy = Literal["svd", "norm"]
GrowAlong = Literal["random", "gradient"]


@dataclass(frozen=True)
class DynamicOptions:
    """When ranks may move, and how far (GARD section 3.3, defaults where it names none).

    Attributes:
        interval: Optimizer steps between two events, tau.
        window: Optimizer steps before an event whose batches are measured; default as many as the
            method profiles batches statically, at most `interval`.
        beta: Weight of the past in the running average of the estimates,
            `ema = beta * ema + (1 - beta) * new`; the first estimate starts it.
        delta_max: Ranks that a module may gain or lose at one event.
        warmup: No event at a step up to this one.
        freeze_after: No event after this step (early-dynamic, `t_adapt`); None never freezes.
        floors: Smallest rank of single modules, by full name.
        shrink_by: `"svd"` loses least; `"norm"` drops whole rows, whose neighbours keep their
            optimizer moments.
        grow_along: Where a new row of A points: `"random"`, drawn as LoRA draws it, or along the
            top right singular directions of the measured `"gradient"`.
        seed: Of the random rows.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    interval: int = 100
    window: int | None = None
    beta: float = 0.8
    delta_max: int = 2
    warmup: int = 0
    freeze_after: int | None = None
    floors: dict[str, int] = field(default_factory=dict)
    shrink_by: ShrinkBy = "svd"
    grow_along: GrowAlong = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"interval": 1, "delta_max": 1, "warmup": 0}.items():
            _check_whole(name, getattr(self, name), least)
        if self.window is not None:
            _check_whole("window", self.window, 1)
            if self.window > self.interval:
                raise PlanError(
                    f"window={self.window} must be at most interval={self.interval}: a batch is "
                    "measured for one event."
                )
        if self.freeze_after is not None:
            _check_whole("freeze_after", self.freeze_after, 0)
        if not 0 <= self.beta < 1:
            raise PlanError(f"beta={self.beta!r} must be at least 0 and less than 1.")
        for option, allowed in (("shrink_by", ("svd", "norm")),
                                ("grow_along", ("random", "gradient"))):  # fmt: skip
            if getattr(self, option) not in allowed:
                raise PlanError(f"{option}={getattr(self, option)!r}; known: {', '.join(allowed)}.")

    def is_event(self, step: int) -> bool:
        """Whether ranks may move after optimizer step `step`, counted from 1."""
        last = math.inf if self.freeze_after is None else self.freeze_after
        return step % self.interval == 0 and self.warmup < step <= last

    def is_measured(self, step: int, window: int) -> bool:
        """Whether the batches of optimizer step `step` are among the last before an event."""
        event = -(-step // self.interval) * self.interval
        return event - step < window and self.is_event(event)


@dataclass(frozen=True)
class RankChange:
    """One module's rank at one event.

    Attributes:
        module: Its full name.
        before: Rank so far.
        after: Rank from now on.
    """

    module: str
    before: int
    after: int


@dataclass(frozen=True)
class ControllerState:
    """Everything a decision depends on; plain numbers, so that JSON keeps it to the last bit.

    Attributes:
        ranks: Active rank per module.
        averages: Running average of each module's estimate; a module never measured has none.
        events: Decisions taken so far.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    ranks: dict[str, NonNegativeInt]
    averages: dict[str, list[FiniteFloat]] = field(default_factory=dict)
    events: NonNegativeInt = 0


@dataclass(frozen=True)
class Decision:
    """What one event decided.

    Attributes:
        state: The state from now on.
        changes: The modules whose rank moves, by name.
        flagged: Module -> why its rank was kept whatever the others did.
        used: Active parameters from now on.
    """

    state: ControllerState
    changes: tuple[RankChange, ...]
    flagged: Mapping[str, str]
    used: int


class RankController:
    """Proposes rank changes under a hard budget: a pure function of state and estimates.

    Every event averages the new estimates into the old ones and solves the method's own allocation
    inside the box `[max(floor, r - delta_max), min(r_max, r + delta_max)]` around the present
    ranks. Clipping after the solve would break the budget; inside the box the present ranks are
    always a solution, so there always is one. A module whose estimate is not finite or all zero
    keeps its rank and its average.

    Args:
        rule: How estimates become ranks, from `rule_of(method)`.
        shapes: Shape of every module that carries an adapter.
        budget: Active parameters that may never be exceeded.
        options: When and how far.
        limits: Smallest and largest rank of every module; default: the rule's bounds, lowered to
            each module's dimensions.

    Raises:
        PlanError: A floor names an unknown module or exceeds what the module can have.
    """

    def __init__(
        self,
        rule: Rule,
        shapes: Mapping[str, LinearShape],
        budget: int,
        options: DynamicOptions,
        limits: Limits | None = None,
    ) -> None:
        self.rule = rule
        self.budget = budget
        self.options = options
        self.costs = {name: shape.rank_cost for name, shape in shapes.items()}
        caps = {name: shape.max_rank for name, shape in shapes.items()}
        given = rank_limits(caps, *rule.bounds) if limits is None else limits
        for name in options.floors:
            if name not in shapes:
                raise PlanError(f"floors: {name!r} carries no adapter; {nearest(name, shapes)}")
        self.limits: dict[str, tuple[int, int]] = {}
        for name in shapes:
            low, most = given[name]
            least = options.floors.get(name, low)
            if not 0 <= least <= most:
                raise PlanError(f"floors: {name} has {least}; it must be between 0 and {most}.")
            self.limits[name] = (least, most)

    def start(self, plan: RankPlan) -> ControllerState:
        """The state before the first event.

        Raises:
            PlanError: The plan's ranks break the budget or lie outside the bounds.
        """
        ranks = {name: module.rank for name, module in plan.modules.items()}
        for name, rank in ranks.items():
            low, high = self.limits[name]
            if not low <= rank <= high:
                raise PlanError(
                    f"the plan gives {name} rank {rank}, outside [{low}, {high}]; set r_min, "
                    "r_max, fixed, around or floors of the dynamic method so that they hold it."
                )
        used = parameters(ranks, self.costs)
        if used > self.budget:
            raise PlanError(f"the plan takes {used} parameters, over the budget of {self.budget}.")
        return ControllerState(ranks)

    def in_order(self, state: ControllerState) -> ControllerState:
        """The state with its modules in this controller's order, which files may have lost."""
        return ControllerState(
            {name: state.ranks[name] for name in self.costs},
            {name: state.averages[name] for name in self.costs if name in state.averages},
            state.events,
        )

    def decide(self, state: ControllerState, estimates: Estimates) -> Decision:
        """Average the estimates and solve for new ranks.

        Args:
            state: From `start` or the decision before.
            estimates: Of every module; NaN, infinite or all-zero numbers flag the module.

        Raises:
            PlanError: An estimate is missing, empty, negative, or of another length than before.
        """
        flagged = {name: why for name in self.costs if (why := _flaw(name, estimates))}
        averages = dict(state.averages)
        for name in self.costs:
            if name not in flagged:
                averages[name] = self._average(name, averages.get(name), estimates[name])
        moving = {name: cost for name, cost in self.costs.items() if name not in flagged}
        fixed = sum(state.ranks[name] * self.costs[name] for name in flagged)
        ranks = dict(state.ranks)
        if moving:
            box = {name: self._box(name, state.ranks[name]) for name in moving}
            ranks |= self.rule.allocate(averages, moving, self.budget - fixed, box)
        changes = tuple(
            RankChange(name, state.ranks[name], ranks[name])
            for name in sorted(ranks)
            if ranks[name] != state.ranks[name]
        )
        after = ControllerState(ranks, averages, state.events + 1)
        return Decision(after, changes, flagged, parameters(ranks, self.costs))

    def _box(self, name: str, rank: int) -> tuple[int, int]:
        (low, high), delta = self.limits[name], self.options.delta_max
        return max(low, rank - delta), min(high, rank + delta)

    def _average(self, name: str, old: list[float] | None, new: Sequence[float]) -> list[float]:
        values = [float(value) for value in new]
        if old is None:
            return values
        if len(old) != len(values):
            raise PlanError(
                f"the estimate of {name} has {len(values)} numbers and had {len(old)}; estimates "
                "of one run come from one method."
            )
        beta = self.options.beta
        return [beta * a + (1 - beta) * b for a, b in zip(old, values, strict=True)]


def _flaw(name: str, estimates: Estimates) -> str | None:
    """Why a module cannot take part, if it cannot."""
    values = estimates.get(name)
    if values is None or not len(values):
        raise PlanError(f"the estimate of {name} is missing; measure every adapted module.")
    if not all(math.isfinite(value) for value in values):
        return "its estimate is not finite"
    if min(values) < 0:
        raise PlanError(f"the estimate of {name} is {min(values)}; it must not be negative.")
    return None if any(values) else "its gradient is zero"


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PlanError(f"{name}={value!r} must be a whole number of at least {least}.")
