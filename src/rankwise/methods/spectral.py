"""Ranks that follow gradient spectra: LoRA+GID, GARD, and water-filling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from rankwise.allocation import proportional_ranks, rank_limits, water_filling_ranks
from rankwise.errors import PlanError
from rankwise.methods.base import (
    Method,
    caps_of,
    check_bounds,
    check_positive_int,
    costs_of,
    energies_of,
    shapes_of,
)
from rankwise.plan import AdapterKind, RankPlan
from rankwise.profiling import GradientProfile, Statistic


@dataclass(frozen=True)
class LoraGid(Method):
    """LoRA+GID: plain LoRA whose rank is the gradient's dimension, `r_l = ceil(erank)`.

    The paper's LoRA+GID (Table 9) takes the GID as it is, tens of times LoRA's parameters. With
    `budget="exact"` the ranks are proportional to the GID within LoRA's parameters at rank r.

    Attributes:
        budget: `"none"` or `"exact"`.
    """

    name: ClassVar[str] = "lora-gid"
    adapter: ClassVar[AdapterKind] = "lora"

    budget: Literal["none", "exact"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget not in ("none", "exact"):
            raise PlanError(f"budget={self.budget!r} must be 'none' or 'exact'.")

    def plan(self, profile: GradientProfile) -> RankPlan:
        """Ranks by GID; at least 1.

        Raises:
            PlanError: The budget does not pay for rank 1 everywhere.
        """
        shapes, costs, caps = shapes_of(profile), costs_of(profile), caps_of(profile)
        if self.budget == "none":
            # a GID of 64 measured as 64.0000000001 is 64
            ranks = {name: max(1, math.ceil(gid - 1e-9)) for name, gid in profile.gid.items()}
            return self._assemble(shapes, ranks, profile=profile)
        limit = self.r * sum(costs.values())
        limits = rank_limits(caps, 1, max(caps.values()))
        ranks = proportional_ranks(profile.gid, costs, limit, limits)
        return self._assemble(shapes, ranks, profile=profile, budget=limit)


@dataclass(frozen=True)
class SpectralBudgetMethod(Method):
    """Ranks between two bounds under a hard budget.

    Attributes:
        r_min: Smallest rank; 0 leaves modules out that earn nothing.
        r_max: Largest rank; default `8 r`.
        budget: Trainable parameters that may not be exceeded; default LoRA's at rank r.
    """

    r_min: int = 0
    r_max: int | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self.bounds, self.r)
        if self.budget is not None:
            check_positive_int("budget", self.budget)

    @property
    def bounds(self) -> tuple[int, int]:
        """`(r_min, r_max)` with the default filled in."""
        return self.r_min, 8 * self.r if self.r_max is None else self.r_max

    def _parameters(self, profile: GradientProfile) -> int:
        return self.r * sum(costs_of(profile).values()) if self.budget is None else self.budget


@dataclass(frozen=True)
class WaterFill(SpectralBudgetMethod):
    """Ours: each unit of rank goes where the next singular direction holds the most energy.

    Maximises `sum_l sum_{i <= r_l} sigma_{l,i}^2` of the mean gradients under
    `sum_l r_l (d_in + d_out) <= budget`; see `rankwise.allocation.water_filling_ranks` for the
    bound. Gradient energy is what a first step along the best rank-r_l direction gains; that it
    predicts the trained loss is not claimed.

    Attributes:
        r_min: Smallest rank; 0, the default, leaves modules out that earn nothing.
        r_max: Largest rank; default `8 r`.
        budget: Trainable parameters that may not be exceeded; default LoRA's at rank r.
    """

    name: ClassVar[str] = "water-fill"
    adapter: ClassVar[AdapterKind] = "lora"

    def plan(self, profile: GradientProfile) -> RankPlan:
        """Ranks by energy per parameter.

        Raises:
            PlanError: No rank is affordable.
        """
        limits = rank_limits(caps_of(profile), *self.bounds)
        budget = self._parameters(profile)
        ranks = water_filling_ranks(energies_of(profile), costs_of(profile), budget, limits)
        return self._assemble(shapes_of(profile), ranks, profile=profile, budget=budget)


@dataclass(frozen=True)
class Gard(SpectralBudgetMethod):
    """Static GARD: ranks proportional to how many independent directions batch gradients take.

    `e_l` is the energy rank of the Gram matrix of M batch gradients, the smallest k whose largest
    eigenvalues hold `energy` of its trace; `r_l = clip(round(r_min + c e_l / sum e))` with the
    largest c within the budget (GARD section 3.2). What rounding left over goes to the modules that
    rounding cut most; ties by the fractional crossing of the energy, then by the trace, then by
    name. `e_l` counts batch gradients, at most M; it is not the rank of a gradient matrix.

    Attributes:
        r_min: Smallest rank; default 1. The paper names no bounds.
        r_max: Largest rank; default `8 r`.
        budget: Trainable parameters that may not be exceeded; default LoRA's at rank r.
        energy: Part of the energy to be held, tau; default 0.9.
        per_cost: Divide scores by `d_in + d_out`, so that cheap modules are not passed over.
    """

    name: ClassVar[str] = "gard"
    adapter: ClassVar[AdapterKind] = "lora"
    statistics: ClassVar[tuple[Statistic, ...]] = ("mean", "gram")
    profile_batches: ClassVar[int] = 32

    r_min: int = 1
    energy: float = 0.9
    per_cost: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.energy < 1:
            raise PlanError(f"energy={self.energy!r} must be between 0 and 1, both excluded.")

    def plan(self, profile: GradientProfile) -> RankPlan:
        """Ranks by energy rank under the budget.

        Raises:
            PlanError: The profile holds no Gram matrices, or the budget is infeasible.
        """
        if profile.gram is None:
            raise PlanError(
                "gard needs the Gram matrices of the batch gradients, which this profile does not "
                "hold; profile with statistics=('mean', 'gram') (--statistics gram)."
            )
        costs = costs_of(profile)
        crossings = profile.energy_crossings(self.energy)
        scores = {name: float(math.ceil(crossing)) for name, crossing in crossings.items()}
        if self.per_cost:
            scores = {name: score / costs[name] for name, score in scores.items()}
        budget = self._parameters(profile)
        ranks = proportional_ranks(
            scores,
            costs,
            budget,
            rank_limits(caps_of(profile), *self.bounds),
            offset=self.r_min,
            rounding="nearest",
            ties={name: (crossings[name], float(c.trace())) for name, c in profile.gram.items()},
        )
        return self._assemble(shapes_of(profile), ranks, profile=profile, budget=budget)
