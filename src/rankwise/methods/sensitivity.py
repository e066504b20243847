"""Ranks that follow loss sensitivity: RaLoRA-Pro and LS-LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rankwise.allocation import (
    proportional_ranks,
    rank_limits,
    sensitivity_ranks,
    smoothed_shares,
)
from rankwise.errors import PlanError
from rankwise.methods.base import (
    Method,
    caps_of,
    check_bounds,
    check_positive_int,
    costs_of,
    shapes_of,
)
from rankwise.methods.uniform import RaLora, blocks_by_gid
from rankwise.plan import AdapterKind, RankPlan
from rankwise.profiling import GradientProfile


@dataclass(frozen=True)
class SensitivityMethod(Method):
    """Ranks that follow each layer's loss sensitivity (RaLoRA section 3.4).

    Attributes:
        r_min: Smallest rank; default `r / 2`, as in the paper, and at least 1.
        r_max: Largest rank; default `2 r`, as in the paper.
        budget: `"exact"` never exceeds LoRA's parameters and hands out what flooring left over;
            `"paper"` is Eq. 8 as printed, whose total can run some percent over.
    """

    r_min: int | None = None
    r_max: int | None = None
    budget: Literal["exact", "paper"] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget not in ("exact", "paper"):
            raise PlanError(f"budget={self.budget!r} must be 'exact' or 'paper'.")
        check_positive_int("r_min", self.bounds[0])
        check_bounds(self.bounds, self.r)

    @property
    def bounds(self) -> tuple[int, int]:
        """`(r_min, r_max)` with the defaults filled in."""
        low = max(1, self.r // 2) if self.r_min is None else self.r_min
        return low, 2 * self.r if self.r_max is None else self.r_max

    def _ranks(self, profile: GradientProfile) -> tuple[dict[str, int], int | None]:
        """Ranks, and the budget that bounds them where it is hard."""
        costs, caps = costs_of(profile), caps_of(profile)
        scores = {name: module.sensitivity for name, module in profile.modules.items()}
        if self.budget == "paper":
            ranks = sensitivity_ranks(scores, costs, self.r, self.bounds)
            return {name: min(rank, caps[name]) for name, rank in ranks.items()}, None
        limit = self.r * sum(costs.values())
        shares = smoothed_shares(scores, costs)
        return proportional_ranks(shares, costs, limit, rank_limits(caps, *self.bounds)), limit


@dataclass(frozen=True)
class RaLoraPro(SensitivityMethod, RaLora):
    """RaLoRA-Pro: ranks follow each layer's loss sensitivity, then blocks its GID.

    `r_l` is proportional to `a_l / sqrt(d_in + d_out)` within `[r_min, r_max]`, with
    `a_l = I_l / sum I` and `I_l = mean(|W * G|)` (RaLoRA Eq. 5-8, Algorithm 1).

    Attributes:
        r_min: Smallest rank; default `r / 2`, as in the paper, and at least 1.
        r_max: Largest rank; default `2 r`, as in the paper.
        budget: `"exact"` never exceeds LoRA's parameters and hands out what flooring left over;
            `"paper"` is Eq. 8 as printed, whose total can run some percent over.
        n_max: Largest number of blocks, a power of two. Default 32, as in the paper.
    """

    name: ClassVar[str] = "ralora-pro"

    def plan(self, profile: GradientProfile) -> RankPlan:
        """Ranks by sensitivity under the budget, then blocks by GID.

        Raises:
            PlanError: The sensitivities are unusable or the budget is infeasible.
        """
        ranks, limit = self._ranks(profile)
        blocks = blocks_by_gid(profile, ranks, self.n_max)
        return self._assemble(
            shapes_of(profile), ranks, blocks=blocks, profile=profile, budget=limit
        )


@dataclass(frozen=True)
class LsLora(SensitivityMethod):
    """LS-LoRA: RaLoRA-Pro's ranks by sensitivity, carried by plain LoRA (RaLoRA section 5).

    Attributes:
        r_min: Smallest rank; default `r / 2`, and at least 1.
        r_max: Largest rank; default `2 r`.
        budget: `"exact"` or `"paper"`, as for `RaLoraPro`.
    """

    name: ClassVar[str] = "ls-lora"
    adapter: ClassVar[AdapterKind] = "lora"

    def plan(self, profile: GradientProfile) -> RankPlan:
        """Ranks by sensitivity under the budget.

        Raises:
            PlanError: The sensitivities are unusable or the budget is infeasible.
        """
        ranks, limit = self._ranks(profile)
        return self._assemble(shapes_of(profile), ranks, profile=profile, budget=limit)
