"""What every method has: a rank, a scaling, and a plan to make from a profile."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeGuard

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import PlanError
from rankwise.plan import AdapterKind, RankPlan, module_plans
from rankwise.profiling import GradientProfile, Statistic
from rankwise.targets import LinearShape


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
    profile_batches: ClassVar[int] = 8
    """How many batches to profile where the user names no number."""

    r: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        check_positive_int("r", self.r)
        if not (is_number(self.alpha) and math.isfinite(self.alpha) and self.alpha > 0):
            raise PlanError(f"alpha={self.alpha!r} must be a positive number.")

    @abstractmethod
    def plan(self, profile: GradientProfile) -> RankPlan:
        """Decide each module's adapter from a profile."""

    def _assemble(
        self,
        shapes: Mapping[str, LinearShape],
        ranks: Mapping[str, int],
        *,
        blocks: Mapping[str, int] | None = None,
        profile: GradientProfile | None = None,
        budget: int | None = None,
    ) -> RankPlan:
        provenance: dict[str, Any] = {"options": asdict(self)}
        if profile is not None:
            provenance["profile"] = asdict(profile.provenance)
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
        )


def shapes_of(source: GradientProfile | Mapping[str, LinearShape]) -> dict[str, LinearShape]:
    """Shape per module, of a profile or of targets."""
    if isinstance(source, GradientProfile):
        return {name: module.shape for name, module in source.modules.items()}
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


def check_bounds(bounds: tuple[int, int], r: int) -> None:
    """Refuse bounds that are no ranks or leave r out."""
    low, high = bounds
    if not is_whole(low) or low < 0:
        raise PlanError(f"r_min={low!r} must be a whole number of at least 0.")
    check_positive_int("r_max", high)
    if not low <= r <= high:
        raise PlanError(f"r_min={low} <= r={r} <= r_max={high} must hold.")


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
    """Refuse anything but a whole number of at least 1."""
    if not is_whole(value) or value < 1:
        raise PlanError(f"{name}={value!r} must be a whole number of at least 1.")
