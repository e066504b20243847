"""Ranks that follow loss sensitivity: RaLoRA-Pro and LS-LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rankwise.allocation import Limits, proportional_ranks, sensitivity_ranks, smoothed_shares
from rankwise.methods.base import costs_of
from rankwise.methods.budgeted import BudgetedMethod
from rankwise.methods.uniform import RaLora, blocks_by_dimension
from rankwise.plan import AdapterKind, RankPlan
from rankwise.profiling import GradientProfile


@dataclass(frozen=True)
class SensitivityMethod(BudgetedMethod):
    """Ranks that follow each layer's loss sensitivity (RaLoRA section 3.4).

    Attributes:
        r_min: Smallest rank; default `r / 2`, as in the paper, and at least 1.
        r_max: Largest rank; default `2 r`, as in the paper.
        budget: `"exact"` never exceeds LoRA's parameters and spends what flooring left over;
            `"paper"` is Eq. 8 as printed, whose total can run some percent over; or an amount, as
            for `BudgetedMethod`, whose LoRA rank then sets the default bounds.
        around: An earlier plan that no rank may differ from by more than `delta`.
        delta: See `around`.
        fixed: Rank per module that is decided beforehand.
    """

    budget_words: ClassVar[tuple[str, ...]] = ("exact", "paper")

    budget: int | str | None = "exact"

    def _default_bounds(self, r: int) -> tuple[int, int]:
        return max(1, r // 2), 2 * r

    def _ranks(self, profile: GradientProfile) -> tuple[dict[str, int], int | None, Limits]:
        """Ranks, the budget where it is hard, and the limits."""
        costs, limits = costs_of(profile), self._limits(profile)
        scores = {name: module.sensitivity for name, module in profile.modules.items()}
        if self.budget == "paper":
            ranks = sensitivity_ranks(scores, costs, self.r, self.bounds)
            boxed = {n: min(max(rank, limits[n][0]), limits[n][1]) for n, rank in ranks.items()}
            return boxed, None, limits
        budget = self._parameters(profile)
        shares = smoothed_shares(scores, costs)
        return proportional_ranks(shares, costs, budget, limits), budget, limits


@dataclass(frozen=True)
class RaLoraPro(SensitivityMethod, RaLora):
    """RaLoRA-Pro: ranks follow each layer's loss sensitivity, then blocks its GID.

    `r_l` is proportional to `a_l / sqrt(d_in + d_out)` within `[r_min, r_max]`, with
    `a_l = I_l / sum I` and `I_l = mean(|W * G|)` (RaLoRA Eq. 5-8, Algorithm 1).

    Attributes:
        r_min: Smallest rank; default `r / 2`, as in the paper, and at least 1.
        r_max: Largest rank; default `2 r`, as in the paper.
        budget: `"exact"`, `"paper"` or an amount: see `SensitivityMethod`.
        around: An earlier plan that no rank may differ from by more than `delta`.
        delta: See `around`.
        fixed: Rank per module that is decided beforehand.
        n_max: Largest number of blocks, a power of two. Default 32, as in the paper.
        scaling: As in `RaLora`.
        rank_scaling: As in `RaLora`; matters here, where ranks differ.
        init_fan_in: As in `RaLora`.
    """

    name: ClassVar[str] = "ralora-pro"

    def plan(self, profile: GradientProfile) -> RankPlan:
        """Ranks by sensitivity under the budget, then blocks by GID.

        Raises:
            PlanError: The sensitivities are unusable or the budget is infeasible.
        """
        self._check_profile(profile)
        ranks, budget, limits = self._ranks(profile)
        blocks = blocks_by_dimension(profile, profile.gid, ranks, self.n_max)
        return self._assemble(profile, ranks, blocks=blocks, budget=budget, limits=limits)


@dataclass(frozen=True)
class LsLora(SensitivityMethod):
    """LS-LoRA: RaLoRA-Pro's ranks by sensitivity, carried by plain LoRA (RaLoRA section 5).

    Attributes:
        r_min: Smallest rank; default `r / 2`, and at least 1.
        r_max: Largest rank; default `2 r`.
        budget: `"exact"`, `"paper"` or an amount: see `SensitivityMethod`.
        around: An earlier plan that no rank may differ from by more than `delta`.
        delta: See `around`.
        fixed: Rank per module that is decided beforehand.
    """

    name: ClassVar[str] = "ls-lora"
    adapter: ClassVar[AdapterKind] = "lora"

    def plan(self, profile: GradientProfile) -> RankPlan:
        """Ranks by sensitivity under the budget.

        Raises:
            PlanError: The sensitivities are unusable or the budget is infeasible.
        """
        self._check_profile(profile)
        ranks, budget, limits = self._ranks(profile)
        return self._assemble(profile, ranks, budget=budget, limits=limits)
