"""RaLoRA with its fragile baseline in place of the effective rank: counted singular values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from rankwise.errors import PlanError
from rankwise.methods.base import check_rank_fits, shapes_of
from rankwise.methods.uniform import RaLora, blocks_by_dimension
from rankwise.plan import RankPlan
from rankwise.profiling import GradientProfile
from rankwise.spectra import threshold_rank


@dataclass(frozen=True)
class RaLoraThreshold(RaLora):
    """RaLoRA whose blocks follow the number of singular values above a threshold.

    `n = 2^clip(floor(log2(#{sigma_i > eps} / r)), 0, log2 n_max)`, with the mean gradient's
    singular values (RaLoRA Table 7). They scale with the loss, and so does what the threshold
    means; the paper shows it to be worse than the effective rank.

    Attributes:
        threshold: eps, in the unit of the singular values; the paper tries 1e-1, 1e-3 and 1e-5.
    """

    name: ClassVar[str] = "ralora-threshold"

    threshold: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise PlanError(f"threshold={self.threshold} must be a finite number of at least 0.")

    def plan(self, profile: GradientProfile) -> RankPlan:
        """Uniform ranks, blocks by counted singular values; one block where none exceeds it.

        Raises:
            PlanError: r exceeds a module's smaller dimension.
        """
        self._check_profile(profile)
        shapes = shapes_of(profile)
        check_rank_fits(self.r, shapes)
        counts = {
            name: threshold_rank(values, self.threshold)
            for name, values in profile.singular_values.items()
        }
        ranks = dict.fromkeys(shapes, self.r)
        blocks = blocks_by_dimension(profile, counts, ranks, self.n_max)
        budget = self.r * sum(shape.rank_cost for shape in shapes.values())
        return self._assemble(profile, ranks, blocks=blocks, budget=budget)
