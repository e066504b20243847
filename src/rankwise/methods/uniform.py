"""One rank everywhere: plain LoRA, and RaLoRA, which splits it into blocks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rankwise.allocation import block_count, dividing_blocks
from rankwise.errors import PlanError
from rankwise.methods.base import Method, check_positive_int, check_rank_fits, shapes_of
from rankwise.plan import AdapterKind, BlockOptions, RankPlan
from rankwise.plan.block_options import BlockScaling, FanIn, RankScaling
from rankwise.profiling import GradientProfile
from rankwise.targets import LinearShape

logger = logging.getLogger(__name__)


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
        shapes = shapes_of(profile)
        check_rank_fits(self.r, shapes)
        budget = self.r * sum(shape.rank_cost for shape in shapes.values())
        return self._assemble(profile, dict.fromkeys(shapes, self.r), budget=budget)


@dataclass(frozen=True)
class BlockMethod(Method):
    """Options of every method that splits updates into diagonal blocks.

    Attributes:
        n_max: Largest number of blocks, a power of two. Default 32, as in the paper.
        scaling: See `BlockOptions`.
        rank_scaling: See `BlockOptions`.
        init_fan_in: See `BlockOptions`.
    """

    n_max: int = 32
    scaling: BlockScaling = BlockOptions.scaling
    rank_scaling: RankScaling = BlockOptions.rank_scaling
    init_fan_in: FanIn = BlockOptions.init_fan_in

    def __post_init__(self) -> None:
        super().__post_init__()
        check_n_max(self.n_max)
        self._block_options()

    def _block_options(self) -> BlockOptions:
        return BlockOptions(self.scaling, self.rank_scaling, self.init_fan_in)


@dataclass(frozen=True)
class RaLora(BlockMethod):
    """RaLoRA: LoRA's rank and size, split into as many diagonal blocks as the GID asks for.

    `delta_W = (alpha / r) blockdiag(B_1 A_1, ..., B_n A_n)` with
    `n = 2^clip(floor(log2(erank(G) / r)), 0, log2 n_max)` (RaLoRA section 3.3, Eq. 4): up to rank
    `n r` with the parameters `r (d_in + d_out)` of LoRA.

    Attributes:
        n_max: Largest number of blocks, a power of two. Default 32, as in the paper.
        scaling: `"function"` multiplies s by sqrt(n); `"paper"` leaves it.
        rank_scaling: What alpha is divided by: `"r_ref"`, which is r; `"r"` or `"sqrt_r"`, the
            module's own rank or its root.
        init_fan_in: `"full"` or `"block"`: by which fan-in A is drawn.
    """

    name: ClassVar[str] = "ralora"
    adapter: ClassVar[AdapterKind] = "ralora"

    def plan(self, profile: GradientProfile) -> RankPlan:
        """Uniform ranks, blocks by GID.

        Raises:
            PlanError: r exceeds a module's smaller dimension.
        """
        self._check_profile(profile)
        shapes = shapes_of(profile)
        check_rank_fits(self.r, shapes)
        ranks = dict.fromkeys(shapes, self.r)
        budget = self.r * sum(shape.rank_cost for shape in shapes.values())
        blocks = blocks_by_dimension(profile, profile.gid, ranks, self.n_max)
        return self._assemble(profile, ranks, blocks=blocks, budget=budget)


def blocks_by_dimension(
    profile: GradientProfile, dimensions: Mapping[str, float], ranks: Mapping[str, int], n_max: int
) -> dict[str, int]:
    """Blocks of every module of positive rank, lowered to what divides its shape, which is logged.

    Args:
        profile: Measured gradients.
        dimensions: What the blocks are to reach, such as the GID, per module.
        ranks: Rank per module.
        n_max: Largest number of blocks, a power of two.
    """
    blocks: dict[str, int] = {}
    for name, module in profile.modules.items():
        if not ranks[name]:
            continue
        wanted = block_count(dimensions[name], ranks[name], n_max)
        blocks[name] = dividing_blocks(wanted, module.d_in, module.d_out)
        if blocks[name] != wanted:
            logger.info(
                "%s: %d blocks do not divide %d x %d; %d do",
                name, wanted, module.d_out, module.d_in, blocks[name],
            )  # fmt: skip
    return blocks


def check_n_max(n_max: int) -> None:
    """Refuse a largest number of blocks that is no power of two."""
    check_positive_int("n_max", n_max)
    if n_max & (n_max - 1):
        raise PlanError(
            f"n_max={n_max} must be a power of two (1, 2, 4, 8, ...), because blocks are halved "
            "until they divide the layer."
        )
