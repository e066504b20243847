"""Any score with any rule and any adapter: for controls, ablations and new ideas."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from rankwise.allocation import proportional_ranks, uniform_ranks, water_filling_ranks
from rankwise.errors import PlanError, nearest
from rankwise.methods.base import costs_of, energies_of
from rankwise.methods.budgeted import BudgetedMethod
from rankwise.methods.uniform import BlockMethod, blocks_by_dimension
from rankwise.plan import AdapterKind, RankPlan
from rankwise.profiling import GradientProfile, Statistic
from rankwise.spectra import (
    effective_rank,
    energy_crossing,
    gram_eigenvalues,
    participation_ratio,
    stable_rank,
)
from rankwise.targets import layer_position

Source = Literal["mean", "gram"]
Estimator = Literal[
    "effective-rank",
    "energy",
    "stable-rank",
    "participation-ratio",
    "sensitivity",
    "gradient-norm",
    "depth",
    "random",
]
Rule = Literal["uniform", "proportional", "smoothed", "water-fill"]

_SPECTRAL: Mapping[str, Callable[[Tensor], float]] = {
    "effective-rank": effective_rank,
    "energy": lambda sigma: float(math.ceil(energy_crossing(sigma**2))),
    "stable-rank": stable_rank,
    "participation-ratio": participation_ratio,
}


@dataclass(frozen=True)
class Compose(BudgetedMethod, BlockMethod):
    """A method put together from a statistic, an estimator, a rule and an adapter.

    GARD's scores are `statistic="gram", estimator="energy"` (`Gard` rounds them in its own way);
    LoRA+GID in a budget is `estimator="effective-rank"`; the controls of GARD's comparison are
    `"gradient-norm"`, `"depth"` and `"random"`. Each keeps to the budget; ranks are rounded down
    and what is left is handed out.

    Attributes:
        r_min: Smallest rank; default 1.
        r_max: Largest rank; default `8 r`.
        budget: Trainable parameters that may not be exceeded, as for `BudgetedMethod`; default
            LoRA's at rank r.
        around: An earlier plan that no rank may differ from by more than `delta`.
        delta: See `around`.
        fixed: Rank per module that is decided beforehand.
        statistic: Whose spectrum a spectral estimator reads: the singular values of the mean
            gradient, or the square roots of the eigenvalues of the batch gradients' Gram matrix.
        estimator: Number per module that ranks are proportional to. `"depth"` grows linearly from
            the first layer to the last; `"random"` is uniform in [0, 1).
        rule: `"proportional"` to the estimate; `"smoothed"`, to the estimate over
            `sqrt(d_in + d_out)`, as RaLoRA-Pro shares; `"uniform"` and `"water-fill"` need none.
        adapter: `"lora"`, or `"ralora"` with blocks by GID.
        n_max: Largest number of blocks.
        scaling: As in `RaLora`, for `adapter="ralora"`.
        rank_scaling: As in `RaLora`.
        init_fan_in: As in `RaLora`.
        seed: Of `"random"`.
    """

    name: ClassVar[str] = "compose"

    statistic: Source = "mean"
    estimator: Estimator = "effective-rank"
    rule: Rule = "proportional"
    adapter: AdapterKind = "lora"  # type: ignore[misc]  # an option here, fixed elsewhere
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"statistic": Source, "estimator": Estimator, "rule": Rule}
        for option, allowed in (choices | {"adapter": AdapterKind}).items():
            value = getattr(self, option)
            if value not in get_args(allowed):
                hint = nearest(str(value), get_args(allowed))
                raise PlanError(f"{option}={value!r} is not known; {hint}")

    @property
    def statistics(self) -> tuple[Statistic, ...]:  # type: ignore[override]
        """What a profile must hold, which hangs on an option here."""
        return ("mean", "gram") if self.statistic == "gram" else ("mean",)

    def plan(self, profile: GradientProfile) -> RankPlan:
        """Ranks by the rule under the budget, blocks by GID for `adapter="ralora"`.

        Raises:
            PlanError: The profile lacks the statistic, or the budget is infeasible.
        """
        self._check_profile(profile)
        costs, budget, limits = costs_of(profile), self._parameters(profile), self._limits(profile)
        if self.rule == "water-fill":
            ranks = water_filling_ranks(energies_of(profile), costs, budget, limits)
        elif self.rule == "uniform":
            ranks = uniform_ranks(costs, budget, limits)
        else:
            scores = self.scores(profile)
            if self.rule == "smoothed":
                scores = {name: score / math.sqrt(costs[name]) for name, score in scores.items()}
            ranks = proportional_ranks(scores, costs, budget, limits)
        blocks = (
            blocks_by_dimension(profile, profile.gid, ranks, self.n_max)
            if self.adapter == "ralora"
            else None
        )
        return self._assemble(profile, ranks, blocks=blocks, budget=budget, limits=limits)

    def _default_bounds(self, r: int) -> tuple[int, int]:
        return 1, 8 * r

    def scores(self, profile: GradientProfile) -> dict[str, float]:
        """The score of every module.

        Raises:
            PlanError: The profile lacks the statistic.
        """
        if self.estimator in _SPECTRAL:
            estimate = _SPECTRAL[self.estimator]
            return {name: estimate(sigma) for name, sigma in self._spectra(profile).items()}
        if self.estimator == "sensitivity":
            return {name: module.sensitivity for name, module in profile.modules.items()}
        if self.estimator == "gradient-norm":
            return {name: module.gradient_norm for name, module in profile.modules.items()}
        if self.estimator == "depth":
            return {name: float((layer_position(name).index or 0) + 1) for name in profile.modules}
        generator = random.Random(self.seed)
        return {name: generator.random() for name in sorted(profile.modules)}

    def _spectra(self, profile: GradientProfile) -> Mapping[str, Tensor]:
        if self.statistic == "mean":
            return profile.singular_values
        if profile.gram is None:
            raise PlanError(
                "statistic='gram' needs the Gram matrices of the batch gradients, which this "
                "profile does not hold; profile with statistics=('mean', 'gram') "
                "(--statistics gram)."
            )
        return {name: gram_eigenvalues(c).clamp_min(0).sqrt() for name, c in profile.gram.items()}
