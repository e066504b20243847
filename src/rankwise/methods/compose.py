"""Any score with any rule and any adapter: for controls, ablations and new ideas."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from rankwise.allocation import proportional_ranks, rank_limits, water_filling_ranks
from rankwise.errors import PlanError, nearest
from rankwise.methods.base import caps_of, costs_of, energies_of, shapes_of
from rankwise.methods.spectral import SpectralBudgetMethod
from rankwise.methods.uniform import blocks_by_gid, check_n_max
from rankwise.plan import AdapterKind, RankPlan
from rankwise.profiling import GradientProfile
from rankwise.spectra import (
    effective_rank,
    energy_crossing,
    gram_eigenvalues,
    participation_ratio,
    stable_rank,
)
from rankwise.targets import layer_position

Source = Literal["mean", "gram"]
Score = Literal[
    "effective-rank",
    "energy-rank",
    "stable-rank",
    "participation-ratio",
    "sensitivity",
    "gradient-norm",
    "depth",
    "random",
]
Rule = Literal["uniform", "proportional", "water-fill"]

_SPECTRAL: Mapping[str, Callable[[Tensor], float]] = {
    "effective-rank": effective_rank,
    "energy-rank": lambda sigma: float(math.ceil(energy_crossing(sigma**2))),
    "stable-rank": stable_rank,
    "participation-ratio": participation_ratio,
}


@dataclass(frozen=True)
class Compose(SpectralBudgetMethod):
    """A method put together from a spectrum, a score, a rule and an adapter.

    Static GARD is `statistic="gram", score="energy-rank"`; LoRA+GID in a budget is
    `score="effective-rank"`; the controls of GARD's comparison are `"gradient-norm"`, `"depth"` and
    `"random"`. Each keeps to the budget; ranks are rounded down and what is left is handed out.

    Attributes:
        r_min: Smallest rank; default 1.
        r_max: Largest rank; default `8 r`.
        budget: Trainable parameters that may not be exceeded; default LoRA's at rank r.
        statistic: Whose spectrum a spectral score reads: the singular values of the mean gradient,
            or the square roots of the eigenvalues of the batch gradients' Gram matrix.
        score: Number per module that ranks are proportional to. `"depth"` grows linearly from the
            first layer to the last; `"random"` is uniform in [0, 1).
        rule: `"proportional"` to the score; `"uniform"` and `"water-fill"` need none.
        adapter: `"lora"`, or `"ralora"` with blocks by GID.
        n_max: Largest number of blocks.
        seed: Of `"random"`.
    """

    name: ClassVar[str] = "compose"

    r_min: int = 1
    statistic: Source = "mean"
    score: Score = "effective-rank"
    rule: Rule = "proportional"
    adapter: AdapterKind = "lora"  # type: ignore[misc]  # an option here, fixed elsewhere
    n_max: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_n_max(self.n_max)
        options = {"statistic": Source, "score": Score, "rule": Rule, "adapter": AdapterKind}
        for option, allowed in options.items():
            value = getattr(self, option)
            if value not in get_args(allowed):
                hint = nearest(str(value), get_args(allowed))
                raise PlanError(f"{option}={value!r} is not known; {hint}")

    def plan(self, profile: GradientProfile) -> RankPlan:
        """Ranks by the rule under the budget, blocks by GID for `adapter="ralora"`.

        Raises:
            PlanError: The profile lacks the statistic, or the budget is infeasible.
        """
        costs, budget = costs_of(profile), self._parameters(profile)
        limits = rank_limits(caps_of(profile), *self.bounds)
        if self.rule == "water-fill":
            ranks = water_filling_ranks(energies_of(profile), costs, budget, limits)
        else:
            even = self.rule == "uniform"
            scores = dict.fromkeys(costs, 1.0) if even else self.scores(profile)
            ranks = proportional_ranks(scores, costs, budget, limits)
        blocks = None
        if self.adapter == "ralora":
            blocks = blocks_by_gid(profile, ranks, self.n_max)
        shapes = shapes_of(profile)
        return self._assemble(shapes, ranks, blocks=blocks, profile=profile, budget=budget)

    def scores(self, profile: GradientProfile) -> dict[str, float]:
        """The score of every module.

        Raises:
            PlanError: The profile lacks the statistic.
        """
        if self.score in _SPECTRAL:
            estimate = _SPECTRAL[self.score]
            return {name: estimate(sigma) for name, sigma in self._spectra(profile).items()}
        if self.score == "sensitivity":
            return {name: module.sensitivity for name, module in profile.modules.items()}
        if self.score == "gradient-norm":
            return {name: module.gradient_norm for name, module in profile.modules.items()}
        if self.score == "depth":
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
