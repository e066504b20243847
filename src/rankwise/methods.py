"""The methods, one row each: which statistic, which estimator, which rule, which adapter.

| method | statistic | estimator | rule | adapter |
|---|---|---|---|---|
| `Lora` | none | none | uniform rank | LoRA |
| `RaLora` | mean gradient | effective rank | uniform rank, blocks by GID | block-diagonal |
| `RaLoraPro` | the same, and sensitivity | effective rank | ranks by sensitivity, blocks by GID \
| block-diagonal |

A method is a frozen set of options; `plan(profile)` turns measured gradients into a `RankPlan`.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from rankwise.allocation import (
    block_count,
    dividing_blocks,
    proportional_ranks,
    sensitivity_ranks,
    smoothed_shares,
)
from rankwise.errors import PlanError
from rankwise.plan import AdapterKind, RankPlan, module_plans
from rankwise.profiling import GradientProfile
from rankwise.targets import LinearShape

logger = logging.getLogger(__name__)


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

    r: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        _check_positive_int("r", self.r)
        if not (_is_number(self.alpha) and math.isfinite(self.alpha) and self.alpha > 0):
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


@dataclass(frozen=True)
class Lora(Method):
    """Plain LoRA: `delta_W = (alpha / r) B A`, one rank everywhere (Hu et al. 2022)."""

    name: ClassVar[str] = "lora"
    adapter: ClassVar[AdapterKind] = "lora"
    needs_profile: ClassVar[bool] = False

    def plan(self, profile: GradientProfile | Mapping[str, LinearShape]) -> RankPlan:
        """One rank for every module; a profile is not needed, `find_targets(model)` will do.

        Args:
            profile: A profile, or a mapping from module name to shape.

        Raises:
            PlanError: r exceeds a module's smaller dimension.
        """
        measured = profile if isinstance(profile, GradientProfile) else None
        shapes = _shapes(profile)
        _check_fits(self.r, shapes)
        budget = self.r * sum(shape.rank_cost for shape in shapes.values())
        return self._assemble(
            shapes, dict.fromkeys(shapes, self.r), profile=measured, budget=budget
        )


@dataclass(frozen=True)
class RaLora(Method):
    """RaLoRA: LoRA's rank and size, split into as many diagonal blocks as the GID asks for.

    `delta_W = (alpha / r) blockdiag(B_1 A_1, ..., B_n A_n)` with
    `n = 2^clip(floor(log2(erank(G) / r)), 0, log2 n_max)` (RaLoRA section 3.3, Eq. 4): up to rank
    `n r` with the parameters `r (d_in + d_out)` of LoRA.

    Attributes:
        n_max: Largest number of blocks, a power of two. Default 32, as in the paper.
    """

    name: ClassVar[str] = "ralora"
    adapter: ClassVar[AdapterKind] = "ralora"

    n_max: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive_int("n_max", self.n_max)
        if self.n_max & (self.n_max - 1):
            raise PlanError(
                f"n_max={self.n_max} must be a power of two (1, 2, 4, 8, ...), because blocks are "
                "halved until they divide the layer."
            )

    def plan(self, profile: GradientProfile) -> RankPlan:
        """Uniform ranks, blocks by GID.

        Raises:
            PlanError: r exceeds a module's smaller dimension.
        """
        shapes = _shapes(profile)
        _check_fits(self.r, shapes)
        ranks = dict.fromkeys(shapes, self.r)
        budget = self.r * sum(shape.rank_cost for shape in shapes.values())
        blocks = self._blocks(profile, ranks)
        return self._assemble(shapes, ranks, blocks=blocks, profile=profile, budget=budget)

    def _blocks(self, profile: GradientProfile, ranks: Mapping[str, int]) -> dict[str, int]:
        blocks: dict[str, int] = {}
        for name, module in profile.modules.items():
            wanted = block_count(profile.gid[name], ranks[name], self.n_max)
            blocks[name] = dividing_blocks(wanted, module.d_in, module.d_out)
            if blocks[name] != wanted:
                logger.info(
                    "%s: %d blocks do not divide %d x %d; %d do",
                    name, wanted, module.d_out, module.d_in, blocks[name],
                )  # fmt: skip
        return blocks


@dataclass(frozen=True)
class RaLoraPro(RaLora):
    """RaLoRA-Pro: ranks follow each layer's loss sensitivity, then blocks its GID.

    `r_l` is proportional to `a_l / sqrt(d_in + d_out)` within `[r_min, r_max]`, with
    `a_l = I_l / sum I` and `I_l = mean(|W * G|)` (RaLoRA Eq. 5-8, Algorithm 1).

    Attributes:
        r_min: Smallest rank; default `r / 2`, as in the paper, and at least 1.
        r_max: Largest rank; default `2 r`, as in the paper.
        budget: `"exact"` never exceeds LoRA's parameters and hands out what flooring left over;
            `"paper"` is Eq. 8 as printed, whose total can run some percent over.
    """

    name: ClassVar[str] = "ralora-pro"

    r_min: int | None = None
    r_max: int | None = None
    budget: Literal["exact", "paper"] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget not in ("exact", "paper"):
            raise PlanError(f"budget={self.budget!r} must be 'exact' or 'paper'.")
        low, high = self.bounds
        _check_positive_int("r_min", low)
        _check_positive_int("r_max", high)
        if not low <= self.r <= high:
            raise PlanError(f"r_min={low} <= r={self.r} <= r_max={high} must hold.")

    @property
    def bounds(self) -> tuple[int, int]:
        """`(r_min, r_max)` with the defaults filled in."""
        low = max(1, self.r // 2) if self.r_min is None else self.r_min
        return low, 2 * self.r if self.r_max is None else self.r_max

    def plan(self, profile: GradientProfile) -> RankPlan:
        """Ranks by sensitivity under the budget, then blocks by GID.

        Raises:
            PlanError: The sensitivities are unusable or the budget is infeasible.
        """
        shapes = _shapes(profile)
        costs = {name: shape.rank_cost for name, shape in shapes.items()}
        caps = {name: shape.max_rank for name, shape in shapes.items()}
        scores = {name: module.sensitivity for name, module in profile.modules.items()}
        if self.budget == "paper":
            ranks = sensitivity_ranks(scores, costs, self.r, self.bounds)
            ranks = {name: min(rank, caps[name]) for name, rank in ranks.items()}
            limit = None
        else:
            limit = self.r * sum(costs.values())
            shares = smoothed_shares(scores, costs)
            ranks = proportional_ranks(shares, costs, limit, self.bounds, caps)
        blocks = self._blocks(profile, ranks)
        return self._assemble(shapes, ranks, blocks=blocks, profile=profile, budget=limit)


METHODS: Mapping[str, type[Method]] = {cls.name: cls for cls in (Lora, RaLora, RaLoraPro)}
"""Every method by the name the configuration files use."""


def _shapes(source: GradientProfile | Mapping[str, LinearShape]) -> dict[str, LinearShape]:
    if isinstance(source, GradientProfile):
        return {name: module.shape for name, module in source.modules.items()}
    return dict(source)


def _check_fits(r: int, shapes: Mapping[str, LinearShape]) -> None:
    for name, shape in shapes.items():
        if r > shape.max_rank:
            raise PlanError(
                f"r={r} exceeds the largest rank {shape.max_rank} of {name} "
                f"({shape.d_out} x {shape.d_in}); lower r or leave the module out."
            )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanError(f"{name}={value!r} must be a whole number of at least 1.")
