"""What every method has: a rank, a scaling, and a plan to make from a profile."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

import numpy as np
from numpy.typing import NDArray

from rankwise.allocation import (
    Limits,
    cheapest_next,
    finds_largest_total,
    parameters,
    uniform_ranks,
)
from rankwise.errors import PlanError
from rankwise.plan import AdapterKind, BlockOptions, RankPlan, module_plans
from rankwise.profiling import GradientProfile, Statistic
from rankwise.targets import LinearShape, Targets


@dataclass(frozen=True)
class Method(ABC):
    """Options every method has.

    Attributes:
        r: LoRA rank; for methods that vary ranks, the reference rank that sets the budget
            `r sum_l (d_in + d_out)`. Default 8, as in the RaLoRA paper.
        alpha: LoRA alpha; updates are scaled by `alpha / r`. Default 16, as in the RaLoRA paper.
    """

    name: ClassVar[str]
    adapter: ClassVar[AdapterKind]
    needs_profile: ClassVar[bool] = True
    statistics: ClassVar[tuple[Statistic, ...]] = ("mean",)
    """What a profile must hold for this method."""
    r: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        check_positive_int("r", self.r)
        if not (is_number(self.alpha) and 0 < self.alpha < math.inf):
            raise PlanError(f"alpha={self.alpha!r} must be a positive number.")
        if self.alpha > sys.float_info.max:  # not shown: it may have more digits than Python prints
            raise PlanError(f"alpha is above {sys.float_info.max}, no number to scale by.")

    @property
    def profile_batches(self) -> int:
        """How many batches to profile where the user names no number."""
        return 8

    @abstractmethod
    def plan(self, profile: GradientProfile) -> RankPlan:
        """Decide each module's adapter from a profile."""

    def _check_profile(self, profile: object) -> None:
        """Refuse what is not a profile, such as a model or its targets."""
        if not isinstance(profile, GradientProfile):
            raise PlanError(
                f"{self.name} plans from a profile, profile_gradients(model, batches), not from a "
                f"{type(profile).__name__}."
            )

    def _assemble(
        self,
        source: GradientProfile | Mapping[str, LinearShape],
        ranks: Mapping[str, int],
        *,
        blocks: Mapping[str, int] | None = None,
        budget: int | None = None,
        limits: Limits | None = None,
    ) -> RankPlan:
        profile = source if isinstance(source, GradientProfile) else None
        shapes = shapes_of(source)
        cheapest = min((shape.rank_cost for shape in shapes.values()), default=0)
        if budget is not None and budget < cheapest:
            raise PlanError(
                f"a budget of {budget:,} parameters pays for no adapter: the cheapest rank takes "
                f"{cheapest:,}. Raise budget or r."
            )
        provenance: dict[str, Any] = {"options": self._options()}
        if profile is not None:
            provenance["profile"] = asdict(profile.provenance)
        facts: dict[str, Any] = {}
        if budget is not None and limits is not None:
            facts |= _remainder(shapes, ranks, budget, limits)
        if profile is not None and self.adapter == "lora":
            facts |= _energy(profile, ranks, budget, limits)
        return RankPlan(
            method=self.name,
            adapter=self.adapter,
            r_ref=self.r,
            alpha=self.alpha,
            budget=budget,
            modules=module_plans(shapes, ranks, blocks or {}, profile.gid if profile else {}),
            model=profile.provenance.model if profile else "",
            model_fingerprint=profile.provenance.model_fingerprint if profile else None,
            provenance=provenance,
            left_out={name: shape for name, shape in shapes.items() if not ranks[name]},
            look_alikes=_look_alikes(source),
            block_options=self._block_options(),
            **facts,
        )

    def _block_options(self) -> BlockOptions:
        """How block-diagonal adapters are scaled and drawn, for methods that make some."""
        return BlockOptions()

    def _options(self) -> dict[str, Any]:
        """The options as JSON can hold them; an earlier plan by its ranks."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: _plain(value) for key, value in options.items()}


def _remainder(
    shapes: Mapping[str, LinearShape], ranks: Mapping[str, int], budget: int, limits: Limits
) -> dict[str, Any]:
    costs = {name: shape.rank_cost for name, shape in shapes.items()}
    following = cheapest_next(ranks, costs, limits)
    largest = None
    if finds_largest_total(costs, limits):
        largest = parameters(uniform_ranks(costs, budget, limits), costs)
    return {"next_rank": following, "full": following is None, "largest_total": largest}


def _energy(
    profile: GradientProfile, ranks: Mapping[str, int], budget: int | None, limits: Limits | None
) -> dict[str, Any]:
    costs = costs_of(profile)
    allowed = {name: (0, cap) for name, cap in caps_of(profile).items()}
    even = uniform_ranks(costs, parameters(ranks, costs) if budget is None else budget, allowed)
    shares = captured_energy(profile, ranks), captured_energy(profile, even)
    return dict(zip(("captured", "captured_by_uniform"), shares, strict=True))


def _look_alikes(source: GradientProfile | Mapping[str, LinearShape]) -> list[str]:
    if isinstance(source, GradientProfile):
        return list(source.provenance.look_alikes)
    return list(source.look_alikes) if isinstance(source, Targets) else []


def _plain(value: Any) -> Any:
    if isinstance(value, RankPlan):
        return ranks_of(value)
    return str(value) if isinstance(value, Path) else value


def ranks_of(plan: RankPlan) -> dict[str, int]:
    """Rank per module of a plan."""
    return {name: module.rank for name, module in plan.modules.items()}


def captured_energy(profile: GradientProfile, ranks: Mapping[str, int]) -> float:
    """Part of `sum_l sum_i sigma_{l,i}^2` of the mean gradients that such ranks can hold.

    Args:
        profile: Measured gradients.
        ranks: Rank per module; a module that is not named has none.
    """
    energies = energies_of(profile)
    total = math.fsum(float(energy.sum()) for energy in energies.values())
    kept = math.fsum(float(energy[: ranks.get(n, 0)].sum()) for n, energy in energies.items())
    return min(kept / total, 1.0) if total else 0.0


def shapes_of(source: GradientProfile | Mapping[str, LinearShape]) -> dict[str, LinearShape]:
    """Shape per module, of a profile or of targets.

    Raises:
        PlanError: It is neither, such as a model.
    """
    if isinstance(source, GradientProfile):
        return {name: module.shape for name, module in source.modules.items()}
    if not isinstance(source, Mapping):
        raise PlanError(
            f"lora plans from a profile or from find_targets(model), not from a "
            f"{type(source).__name__}."
        )
    return dict(source)


def costs_of(profile: GradientProfile) -> dict[str, int]:
    """Parameters of one unit of rank, `d_in + d_out`, per module."""
    return {name: module.shape.rank_cost for name, module in profile.modules.items()}


def caps_of(profile: GradientProfile) -> dict[str, int]:
    """Largest rank, `min(d_in, d_out)`, per module."""
    return {name: module.shape.max_rank for name, module in profile.modules.items()}


def energies_of(profile: GradientProfile) -> dict[str, NDArray[np.float64]]:
    """Squared singular values of the mean gradient, largest first, per module."""
    return {name: values.numpy() ** 2 for name, values in profile.singular_values.items()}


_LARGEST = sys.maxsize


def check_rank_fits(r: int, shapes: Mapping[str, LinearShape]) -> None:
    """Refuse a rank that some module cannot have."""
    for name, shape in shapes.items():
        if r > shape.max_rank:
            raise PlanError(
                f"r={r} exceeds the largest rank {shape.max_rank} of {name} "
                f"({shape.d_out} x {shape.d_in}); lower r or leave the module out."
            )


def is_number(value: object) -> bool:
    """Whether a value is an int or a float; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_positive_int(name: str, value: object) -> None:
    """Refuse anything but a whole number of at least 1, and of a size that a layer may have."""
    if not is_whole(value) or value < 1:
        raise PlanError(f"{name}={value!r} must be a whole number of at least 1.")
    if value > _LARGEST:  # not shown: it may have more digits than Python prints
        raise PlanError(f"{name} is above {_LARGEST}, which no layer has; it must be smaller.")
