"""How block-diagonal adapters are scaled and drawn, as plans and configurations say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from pydantic import ConfigDict

from rankwise.errors import PlanError, nearest

RankScaling = Literal["r_ref", "r", "sqrt_r"]
BlockScaling = Literal["function", "paper"]
FanIn = Literal["full", "block"]

BLOCK_CHOICES: dict[str, tuple[str, ...]] = {
    "scaling": get_args(BlockScaling),
    "rank_scaling": get_args(RankScaling),
    "init_fan_in": get_args(FanIn),
}
"""Option -> its values, the default first."""


@dataclass(frozen=True)
class BlockOptions:
    """The options of block-diagonal adapters that are the same for every module.

    Attributes:
        scaling: `"function"` multiplies s by sqrt(n), so that first steps move the function as far
            as LoRA's; `"paper"` does not. See `rankwise.adapters.scaling.update_scaling`.
        rank_scaling: What alpha is divided by: `"r_ref"`, the plan's reference rank; `"r"`, the
            module's own; or `"sqrt_r"`, the root of its own.
        init_fan_in: `"full"` draws A with LoRA's variance, `"block"` with that of the smaller
            fan-in `d_in / n`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    scaling: BlockScaling = "function"
    rank_scaling: RankScaling = "r_ref"
    init_fan_in: FanIn = "full"

    def __post_init__(self) -> None:
        for name, allowed in BLOCK_CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise PlanError(f"{name}={value!r} is not known; {nearest(str(value), allowed)}")

    def __str__(self) -> str:
        factor = {"r_ref": "alpha / r_ref", "r": "alpha / r", "sqrt_r": "alpha / sqrt(r)"}
        times = " x sqrt(n)" if self.scaling == "function" else ""
        return (
            f"updates scaled by {factor[self.rank_scaling]}{times}, "
            f"A drawn for the {self.init_fan_in} fan-in"
        )
