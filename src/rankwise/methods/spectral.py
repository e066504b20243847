"""Ranks that follow gradient spectra: LoRA+GID, GARD, and water-filling."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import ClassVar

from rankwise.allocation import proportional_ranks, water_filling_ranks
from rankwise.errors import PlanError
from rankwise.methods.base import check_positive_int, costs_of, energies_of
from rankwise.methods.budgeted import NO_BUDGET, BudgetedMethod
from rankwise.plan import AdapterKind, RankPlan
from rankwise.profiling import GradientProfile, Statistic

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraGid(BudgetedMethod):
    """LoRA+GID: plain LoRA whose rank is the gradient's dimension, `r_l = ceil(erank)`.

    The paper's LoRA+GID (Table 9) takes the GID as it is, tens of times LoRA's parameters. With a
    budget the ranks are proportional to the GID within it.

    Attributes:
        r_min: Smallest rank; default 1.
        r_max: Largest rank; default none but `min(d_in, d_out)`.
        budget: `"none"`, the default; `"exact"` for LoRA's parameters at rank r; or an amount, as
            for `BudgetedMethod`.
        around: An earlier plan that no rank may differ from by more than `delta`.
        delta: See `around`.
        fixed: Rank per module that is decided beforehand.
    """

    name: ClassVar[str] = "lora-gid"
    adapter: ClassVar[AdapterKind] = "lora"
    budget_words: ClassVar[tuple[str, ...]] = (NO_BUDGET, "exact")

    budget: int | str | None = NO_BUDGET

    def _default_bounds(self, r: int) -> tuple[int, int]:
        return 1, 2**31

    def plan(self, profile: GradientProfile) -> RankPlan:
        """Ranks by GID.

        Raises:
            PlanError: The budget does not pay for the smallest ranks.
        """
        self._check_profile(profile)
        limits = self._limits(profile)
        if self.budget == NO_BUDGET:
            # a GID of 64 measured as 64.0000000001 is 64
            wanted = {name: math.ceil(gid - 1e-9) for name, gid in profile.gid.items()}
            ranks = {n: min(max(rank, limits[n][0]), limits[n][1]) for n, rank in wanted.items()}
            return self._assemble(profile, ranks)
        budget = self._parameters(profile)
        ranks = proportional_ranks(profile.gid, costs_of(profile), budget, limits)
        return self._assemble(profile, ranks, budget=budget, limits=limits)


@dataclass(frozen=True)
class WaterFill(BudgetedMethod):
    """Ours: each unit of rank goes where the next singular direction holds the most energy.

    Maximises `sum_l sum_{i <= r_l} sigma_{l,i}^2` of the mean gradients under
    `sum_l r_l (d_in + d_out) <= budget`; see `rankwise.allocation.water_filling_ranks` for the
    bound. Gradient energy is what a first step along the best rank-r_l direction gains; that it
    predicts the trained loss is not claimed.

    Attributes:
        r_min: Smallest rank; 0, the default, leaves modules out that earn nothing.
        r_max: Largest rank; default `8 r`.
        budget: Trainable parameters that may not be exceeded, as for `BudgetedMethod`; default
            LoRA's at rank r.
        around: An earlier plan that no rank may differ from by more than `delta`.
        delta: See `around`.
        fixed: Rank per module that is decided beforehand.
    """

    name: ClassVar[str] = "water-fill"
    adapter: ClassVar[AdapterKind] = "lora"

    def plan(self, profile: GradientProfile) -> RankPlan:
        """Ranks by energy per parameter.

        Raises:
            PlanError: No rank is affordable.
        """
        self._check_profile(profile)
        limits, budget = self._limits(profile), self._parameters(profile)
        ranks = water_filling_ranks(energies_of(profile), costs_of(profile), budget, limits)
        return self._assemble(profile, ranks, budget=budget, limits=limits)


@dataclass(frozen=True)
class Gard(BudgetedMethod):
    """Static GARD: ranks proportional to how many independent directions batch gradients take.

    `e_l` is the energy rank of the Gram matrix of M batch gradients, the smallest k whose largest
    eigenvalues hold `energy` of its trace; `r_l = clip(round(r_min + c e_l / sum e))` with the
    largest c within the budget (GARD section 3.2). What rounding left over is spent as
    `rankwise.allocation.proportional_ranks` says; ties by the fractional crossing of
    the energy, then by the trace, then by name. `e_l` counts batch gradients, at most M; it is not
    the rank of a gradient matrix.

    Attributes:
        r_min: Smallest rank; default 1. The paper names no bounds.
        r_max: Largest rank; default `8 r`.
        budget: Trainable parameters that may not be exceeded, as for `BudgetedMethod`; default
            LoRA's at rank r.
        around: An earlier plan that no rank may differ from by more than `delta`.
        delta: See `around`.
        fixed: Rank per module that is decided beforehand.
        energy: Part of the energy to be held, tau; default 0.9.
        batches: M, how many batches to profile where the run names no number; default 32.
        per_cost: Divide scores by `d_in + d_out`, so that cheap modules are not passed over.
    """

    name: ClassVar[str] = "gard"
    adapter: ClassVar[AdapterKind] = "lora"
    statistics: ClassVar[tuple[Statistic, ...]] = ("mean", "gram")

    energy: float = 0.9
    batches: int = 32
    per_cost: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.energy < 1:
            raise PlanError(f"energy={self.energy!r} must be between 0 and 1, both excluded.")
        check_positive_int("batches", self.batches)

    @property
    def profile_batches(self) -> int:
        """How many batches to profile where the user names no number."""
        return self.batches

    def _default_bounds(self, r: int) -> tuple[int, int]:
        return 1, 8 * r

    def plan(self, profile: GradientProfile) -> RankPlan:
        """Ranks by energy rank under the budget.

        Raises:
            PlanError: The profile holds no Gram matrices, or the budget is infeasible.
        """
        self._check_profile(profile)
        if profile.gram is None:
            raise PlanError(
                "gard needs the Gram matrices of the batch gradients, which this profile does not "
                "hold; profile with statistics=('mean', 'gram') (--statistics gram)."
            )
        if profile.provenance.batches != self.batches:
            logger.info(
                "gard: energy ranks of M = %d batches; batches=%d were asked for",
                profile.provenance.batches, self.batches,
            )  # fmt: skip
        costs = costs_of(profile)
        crossings = profile.energy_crossings(self.energy)
        scores = {name: float(math.ceil(crossing)) for name, crossing in crossings.items()}
        if self.per_cost:
            scores = {name: score / costs[name] for name, score in scores.items()}
        limits, budget = self._limits(profile), self._parameters(profile)
        ranks = proportional_ranks(
            scores,
            costs,
            budget,
            limits,
            offset=self.bounds[0],
            rounding="nearest",
            ties={name: (crossings[name], float(c.trace())) for name, c in profile.gram.items()},
        )
        return self._assemble(profile, ranks, budget=budget, limits=limits)
