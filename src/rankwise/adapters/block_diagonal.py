"""RaLoRA: LoRA whose update is block-diagonal, so that the same parameters reach a higher rank.

`delta_W = s blockdiag(B_1 A_1, ..., B_n A_n)`, `A_i (r, d_in/n)`, `B_i (d_out/n, r)`,
`s = alpha / r_ref` by default (RaLoRA section 3.3). One block is plain LoRA; a fixed n for all
layers is MELoRA.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from peft import PeftConfig
from torch import Tensor, nn

from rankwise.adapters.delta import DeltaLayer, DeltaModel
from rankwise.adapters.fused import add_update, frozen_linear, linear_with_update
from rankwise.adapters.options import (
    check_choice,
    check_dropout,
    check_pattern_keys,
    check_positive,
    check_rank_fits,
    check_targets,
    check_whole,
    longest_match,
)
from rankwise.adapters.registration import peft_type
from rankwise.adapters.scaling import update_scaling
from rankwise.allocation import dividing_blocks
from rankwise.plan.block_options import (
    BLOCK_CHOICES,
    BlockOptions,
    BlockScaling,
    FanIn,
    RankScaling,
)

logger = logging.getLogger(__name__)

_CHOICES: dict[str, tuple[str, ...]] = {
    **BLOCK_CHOICES,
    "bias": ("none", "all", "ralora_only"),
}


@dataclass
class RaLoraConfig(PeftConfig):
    """Configuration of block-diagonal adapters, as saved in `adapter_config.json`.

    Attributes:
        r: Rank of each block, where `rank_pattern` names no other; also the reference rank of the
            scaling `alpha / r`, which by default is the same for every layer.
        alpha: Scaling numerator; default 16, as in the RaLoRA paper.
        rank_scaling: What alpha is divided by: `"r_ref"`, which is `r`; `"r"` or `"sqrt_r"`, the
            layer's own rank or its root. See `rankwise.adapters.scaling.update_scaling`.
        scaling: `"function"` multiplies the factor by sqrt(n), so that first steps move the
            function as far as LoRA's; `"paper"` does not. Derived and measured there.
        blocks: Diagonal blocks n, a power of two, where `blocks_pattern` names no other. Where n
            does not divide a layer, the largest power of two below it that does is used.
        rank_pattern: Module name, or the end of one after a dot -> rank. Names are literal, not
            regular expressions; the longest that matches counts.
        blocks_pattern: The same for blocks.
        target_modules: As in PEFT: names, a regular expression, or `"all-linear"`.
        exclude_modules: As in PEFT.
        dropout: Probability of dropping an input of the adapter.
        init_fan_in: `"full"` draws every block of A with LoRA's own variance `1 / (3 d_in)`;
            `"block"` with that of the smaller fan-in, `n / (3 d_in)`.
        init_weights: False draws B at random too, so that the adapter does something (for tests).
        bias: `"none"`, `"all"` or `"ralora_only"`, as in PEFT.
        modules_to_save: As in PEFT.
        layers_to_transform: As in PEFT.
        layers_pattern: As in PEFT.
        base_fingerprint: Fingerprint of the model that the adapter was attached to, for the check
            when it is loaded; `rankwise.attach` fills it in.
    """

    r: int = 8
    alpha: float = 16
    rank_scaling: RankScaling = BlockOptions.rank_scaling
    scaling: BlockScaling = BlockOptions.scaling
    blocks: int = 1
    rank_pattern: dict[str, int] = field(default_factory=dict)
    blocks_pattern: dict[str, int] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    dropout: float = 0.0
    init_fan_in: FanIn = BlockOptions.init_fan_in
    init_weights: bool = True
    bias: Literal["none", "all", "ralora_only"] = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    base_fingerprint: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("ralora")
        check_targets(self)
        self._check_numbers()

    def _check_numbers(self) -> None:
        check_whole("r", self.r)
        _check_blocks("blocks", self.blocks)
        for option, check in (("rank_pattern", check_whole), ("blocks_pattern", _check_blocks)):
            pattern = getattr(self, option)
            check_pattern_keys(option, pattern)
            for key, value in pattern.items():
                check(f"{option}[{key!r}]", value)
        check_positive("alpha", self.alpha)
        check_dropout(self.dropout)
        for option, choices in _CHOICES.items():
            check_choice(option, getattr(self, option), choices)

    def rank_of(self, module: str) -> int:
        """The rank of a module's blocks."""
        return longest_match(self.rank_pattern, module, self.r)

    def blocks_of(self, module: str, d_in: int, d_out: int) -> int:
        """The number of a module's blocks, lowered to what divides its dimensions."""
        wanted = longest_match(self.blocks_pattern, module, self.blocks)
        blocks = dividing_blocks(wanted, d_in, d_out)
        if blocks != wanted:
            logger.info(
                "%s: %d blocks do not divide %d x %d; %d do", module, wanted, d_out, d_in, blocks
            )
        return blocks


class BlockFactor(nn.Module):
    """One factor, `(n, rows, columns)`, in a module of its own, as PEFT's are."""

    def __init__(self, blocks: int, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, rows, columns))


class RaLoraLinear(DeltaLayer):
    """A linear layer with block-diagonal adapters.

    `ralora_A[name].weight` is `(n, r, d_in/n)`, `ralora_B[name].weight` `(n, d_out/n, r)`.
    """

    adapter_layer_names = ("ralora_A", "ralora_B")
    other_param_names = ("r", "blocks", "scaling", "ralora_dropout")

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__(base_layer, **quantization)
        self.r: dict[str, int] = {}
        self.blocks: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.ralora_dropout = nn.ModuleDict({})
        self.ralora_A = nn.ModuleDict({})
        self.ralora_B = nn.ModuleDict({})

    def add_adapter(self, adapter: str, config: RaLoraConfig, module: str) -> None:
        """Create an adapter's factors on the base layer's device.

        Args:
            adapter: Name of the adapter.
            config: Its configuration.
            module: Full name of this module, by which the config's patterns are read.

        Raises:
            ValueError: The rank exceeds the layer's smaller dimension.
        """
        r = config.rank_of(module)
        check_rank_fits(r, module, self.in_features, self.out_features)
        n = config.blocks_of(module, self.in_features, self.out_features)
        self.r[adapter], self.blocks[adapter] = r, n
        self.scaling[adapter] = update_scaling(
            config.alpha,
            rank=r,
            r_ref=config.r,
            blocks=n,
            by=config.rank_scaling,
            scaling=config.scaling,
        )
        self.ralora_dropout[adapter] = (
            nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        )
        self.ralora_A[adapter] = BlockFactor(n, r, self.in_features // n)
        self.ralora_B[adapter] = BlockFactor(n, self.out_features // n, r)
        self._initialise(adapter, config)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _initialise(self, adapter: str, config: RaLoraConfig) -> None:
        """A as in LoRA (Kaiming, a = sqrt 5): `U(-1/sqrt(fan_in), 1/sqrt(fan_in))`; B zero."""
        a, b = self.factors(adapter)
        fan_in = self.in_features if config.init_fan_in == "full" else a.shape[2]
        with torch.no_grad():
            a.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
            if config.init_weights:
                b.zero_()
            else:
                b.uniform_(-1 / math.sqrt(b.shape[2]), 1 / math.sqrt(b.shape[2]))

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """`A (n, r, d_in/n)` and `B (n, d_out/n, r)` of an adapter."""
        a, b = self.ralora_A[adapter], self.ralora_B[adapter]
        assert isinstance(a, BlockFactor) and isinstance(b, BlockFactor)
        return a.weight, b.weight

    def has_adapter(self, adapter: str) -> bool:
        """Whether this layer carries the named adapter."""
        return adapter in self.ralora_A

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As in `DeltaLayer`; one adapter on a plain frozen layer is computed together with it."""
        active = [adapter for adapter in self.active_adapters if self.has_adapter(adapter)]
        if args or kwargs or len(active) != 1 or self.merged or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        (adapter,) = active
        a, b = self.factors(adapter)
        frozen = frozen_linear(self.base_layer, x, a)
        if frozen is None:
            return super().forward(x)
        dropout = self.ralora_dropout[adapter]
        return linear_with_update(x, *frozen, a, b, self.scaling[adapter], dropout)

    def add_delta(
        self,
        result: Float[Tensor, "*batch d_out"],
        x: Float[Tensor, "*batch d_in"],
        adapter: str,
    ) -> Float[Tensor, "*batch d_out"]:
        """`result + s blockdiag(B_i A_i) x` without forming the matrix."""
        dropout = self.ralora_dropout[adapter]
        return add_update(result, x, *self.factors(adapter), self.scaling[adapter], dropout)

    def delta_weight(self, adapter: str) -> Float[Tensor, "d_out d_in"]:
        """The block-diagonal matrix `s blockdiag(B_i A_i)` in fp32 or wider."""
        a, b = self.factors(adapter)
        wide = torch.promote_types(a.dtype, torch.float32)
        products = torch.bmm(b.detach().to(wide), a.detach().to(wide))
        return torch.block_diag(*products.unbind()) * self.scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def __repr__(self) -> str:
        return "ralora." + super().__repr__()


class RaLoraModel(DeltaModel):
    """PEFT's tuner for `RaLoraConfig`."""

    prefix = "ralora_"
    layer_cls = RaLoraLinear
    tuner_layer_cls = RaLoraLinear


def _check_blocks(name: str, value: object) -> None:
    check_whole(name, value)
    assert isinstance(value, int)
    if value & (value - 1):
        raise ValueError(f"{name}={value!r} must be a power of two (1, 2, 4, 8, ...).")
