"""The methods, one row each: which statistic, which estimator, which rule, which adapter.

| method | statistic | estimator | rule | adapter |
|---|---|---|---|---|
| `Lora` | none | none | uniform rank | LoRA |
| `LoraGid` | mean gradient | effective rank | rank = GID, or GID in a budget | LoRA |
| `LsLora` | sensitivity | none | ranks by sensitivity | LoRA |
| `WaterFill` | mean gradient | singular values | most energy per parameter | LoRA |
| `RaLora` | mean gradient | effective rank | uniform rank, blocks by GID | block-diagonal |
| `RaLoraPro` | both | effective rank | ranks by sensitivity, blocks by GID | block-diagonal |

A method is a frozen set of options; `plan(profile)` turns measured gradients into a `RankPlan`.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, TypeGuard

import numpy as np
from numpy.typing import NDArray

from rankwise.allocation import (
    block_count,
    dividing_blocks,
    proportional_ranks,
    rank_limits,
    sensitivity_ranks,
    smoothed_shares,
    water_filling_ranks,
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
class _BySensitivity(Method):
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
        _check_positive_int("r_min", self.bounds[0])
        _check_bounds(self.bounds, self.r)

    @property
    def bounds(self) -> tuple[int, int]:
        """`(r_min, r_max)` with the defaults filled in."""
        low = max(1, self.r // 2) if self.r_min is None else self.r_min
        return low, 2 * self.r if self.r_max is None else self.r_max

    def _ranks(self, profile: GradientProfile) -> tuple[dict[str, int], int | None]:
        """Ranks, and the budget that bounds them where it is hard."""
        costs, caps = _costs(profile), _caps(profile)
        scores = {name: module.sensitivity for name, module in profile.modules.items()}
        if self.budget == "paper":
            ranks = sensitivity_ranks(scores, costs, self.r, self.bounds)
            return {name: min(rank, caps[name]) for name, rank in ranks.items()}, None
        limit = self.r * sum(costs.values())
        shares = smoothed_shares(scores, costs)
        return proportional_ranks(shares, costs, limit, rank_limits(caps, *self.bounds)), limit


@dataclass(frozen=True)
class RaLoraPro(_BySensitivity, RaLora):
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
        blocks = self._blocks(profile, ranks)
        return self._assemble(_shapes(profile), ranks, blocks=blocks, profile=profile, budget=limit)


@dataclass(frozen=True)
class LsLora(_BySensitivity):
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
        return self._assemble(_shapes(profile), ranks, profile=profile, budget=limit)


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
        shapes, costs, caps = _shapes(profile), _costs(profile), _caps(profile)
        if self.budget == "none":
            # a GID of 64 measured as 64.0000000001 is 64
            ranks = {name: max(1, math.ceil(gid - 1e-9)) for name, gid in profile.gid.items()}
            return self._assemble(shapes, ranks, profile=profile)
        limit = self.r * sum(costs.values())
        limits = rank_limits(caps, 1, max(caps.values()))
        ranks = proportional_ranks(profile.gid, costs, limit, limits)
        return self._assemble(shapes, ranks, profile=profile, budget=limit)


@dataclass(frozen=True)
class WaterFill(Method):
    """Ours: each unit of rank goes where the next singular direction holds the most energy.

    Maximises `sum_l sum_{i <= r_l} sigma_{l,i}^2` of the mean gradients under
    `sum_l r_l (d_in + d_out) <= r sum_l (d_in + d_out)`; see
    `rankwise.allocation.water_filling_ranks` for the bound. Gradient energy is what a first step
    along the best rank-r_l direction gains; that it predicts the trained loss is not claimed.

    Attributes:
        r_min: Smallest rank; 0, the default, leaves modules out that earn nothing.
        r_max: Largest rank; default `8 r`.
    """

    name: ClassVar[str] = "water-fill"
    adapter: ClassVar[AdapterKind] = "lora"

    r_min: int = 0
    r_max: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bounds(self.bounds, self.r)

    @property
    def bounds(self) -> tuple[int, int]:
        """`(r_min, r_max)` with the default filled in."""
        return self.r_min, 8 * self.r if self.r_max is None else self.r_max

    def plan(self, profile: GradientProfile) -> RankPlan:
        """Ranks by energy per parameter under LoRA's budget at rank r.

        Raises:
            PlanError: No rank is affordable.
        """
        costs = _costs(profile)
        budget = self.r * sum(costs.values())
        limits = rank_limits(_caps(profile), *self.bounds)
        ranks = water_filling_ranks(_energies(profile), costs, budget, limits)
        return self._assemble(_shapes(profile), ranks, profile=profile, budget=budget)


METHODS: Mapping[str, type[Method]] = {
    cls.name: cls for cls in (Lora, LoraGid, LsLora, WaterFill, RaLora, RaLoraPro)
}
"""Every method by the name the configuration files use."""


def _shapes(source: GradientProfile | Mapping[str, LinearShape]) -> dict[str, LinearShape]:
    if isinstance(source, GradientProfile):
        return {name: module.shape for name, module in source.modules.items()}
    return dict(source)


def _costs(profile: GradientProfile) -> dict[str, int]:
    return {name: module.shape.rank_cost for name, module in profile.modules.items()}


def _caps(profile: GradientProfile) -> dict[str, int]:
    return {name: module.shape.max_rank for name, module in profile.modules.items()}


def _energies(profile: GradientProfile) -> dict[str, NDArray[np.float64]]:
    return {name: values.numpy() ** 2 for name, values in profile.singular_values.items()}


def _check_bounds(bounds: tuple[int, int], r: int) -> None:
    low, high = bounds
    if not _is_whole(low) or low < 0:
        raise PlanError(f"r_min={low!r} must be a whole number of at least 0.")
    _check_positive_int("r_max", high)
    if not low <= r <= high:
        raise PlanError(f"r_min={low} <= r={r} <= r_max={high} must hold.")


def _check_fits(r: int, shapes: Mapping[str, LinearShape]) -> None:
    for name, shape in shapes.items():
        if r > shape.max_rank:
            raise PlanError(
                f"r={r} exceeds the largest rank {shape.max_rank} of {name} "
                f"({shape.d_out} x {shape.d_in}); lower r or leave the module out."
            )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_positive_int(name: str, value: object) -> None:
    if not _is_whole(value) or value < 1:
        raise PlanError(f"{name}={value!r} must be a whole number of at least 1.")
