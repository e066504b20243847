"""LR-LoRA: a low-rank matrix through a learned elementwise function, which lifts its rank.

`delta_W = s f(B A)`, `f(u) = sum_k a_k sinc(w_k (u - g_k))`, one f per module (LR-LoRA Eq. 4);
`s = alpha / r`. The optimizer sets the rank: f decides how far `f(B A)` is from rank r.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.adapters import options
from rankwise.adapters.delta import DeltaLayer, DeltaModel
from rankwise.adapters.registration import peft_type
from rankwise.adapters.transfer import (
    BASES,
    BasisName,
    GridKind,
    Transfer,
    evaluate,
    grid_points,
    transfer_linear,
)

logger = logging.getLogger(__name__)

Start = Literal["live", "paper", "grid_shift", "small"]
Share = Literal["none", "grid", "bandwidth", "amplitude", "all"]


@dataclass
class LrLoraConfig(PeftConfig):
    """Configuration of LR-LoRA adapters, as saved in `adapter_config.json`.

    Attributes:
        r: Rank of `B A`, where `rank_pattern` names no other; also the reference rank of the
            scaling `alpha / r`, which is the same for every layer.
        alpha: Scaling numerator; default `2 r`, which the paper uses.
        rank_pattern: Module name, or the end of one after a dot -> rank. Names are literal, not
            regular expressions; the longest that matches counts.
        target_modules: As in PEFT. `rankwise.placed_modules` names those of one kind or some
            layers.
        exclude_modules: As in PEFT.
        dropout: Probability of dropping an input column of the update, one mask a forward pass:
            the update is a matrix before it meets tokens, so each cannot have a mask of its own.
        basis: `"sinc"`, `"rbf"`, `"spline"`, `"fourier"`, `"polynomial"`, or `"sine"`, SineLoRA's
            fixed `sin(omega B A) / sqrt(d_in)`.
        points: Grid points K, default 50; a module has 2K parameters (LR-LoRA section 4.1), 3K
            with a learned grid, whatever the basis.
        span: Half width L of the grid; default 3 (the same).
        grid: `"uniform"`, `"chebyshev"`, `"random"` or `"learned"`; sinc and rbf only.
        grid_seed: Of the random grid.
        bandwidth: `"learned"`, as `softplus(v_k)`, or `"fixed"`; sinc and rbf only.
        bandwidth_init: `w_k` at the start; default 1 (the same).
        init: `"live"`, the default: amplitudes zero and B random at A's scale, so that the update
            is zero and everything has a gradient once the amplitudes have moved. `"paper"`:
            amplitudes and B zero, which is a dead point of A and B: f stays even, so `f'(0) = 0`.
            `"grid_shift"`: the same with the grid moved by a quarter of a cell, so that f is not
            even. `"small"`: B zero, amplitudes normal; the update is a small constant.
        amplitude_std: Of the amplitudes under `init="small"`; default 0.1 (LR-LoRA table 18).
        omega: Frequency of the basis `"sine"`.
        share: Which parameters of f all modules have in common (LR-LoRA table 20).
        init_weights: False draws all parameters at random, so that the adapter does something (for
            tests).
        bias: `"none"`, `"all"` or `"lrlora_only"`, as in PEFT.
        modules_to_save: As in PEFT.
        layers_to_transform: As in PEFT.
        layers_pattern: As in PEFT.
    """

    r: int = 8
    alpha: float | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    dropout: float = 0.0
    basis: BasisName = "sinc"
    points: int = 50
    span: float = 3.0
    grid: GridKind = "uniform"
    grid_seed: int = 0
    bandwidth: Literal["learned", "fixed"] = "learned"
    bandwidth_init: float = 1.0
    init: Start = "live"
    amplitude_std: float = 0.1
    omega: float = 100.0
    share: Share = "none"
    init_weights: bool = True
    bias: Literal["none", "all", "lrlora_only"] = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("lrlora")
        options.check_targets(self)
        self._check_numbers()
        self._check_basis()

    def _check_numbers(self) -> None:
        options.check_whole("r", self.r)
        options.check_pattern_keys("rank_pattern", self.rank_pattern)
        for key, rank in self.rank_pattern.items():
            options.check_whole(f"rank_pattern[{key!r}]", rank)
        if self.alpha is None:
            self.alpha = 2 * self.r
        options.check_whole("points", self.points, 2)
        options.check_whole("grid_seed", self.grid_seed, 0)
        for name in ("alpha", "span", "bandwidth_init", "amplitude_std", "omega"):
            options.check_positive(name, getattr(self, name))
        options.check_dropout(self.dropout)

    def _check_basis(self) -> None:
        options.check_choice("basis", self.basis, tuple(BASES))
        options.check_choice("grid", self.grid, get_args(GridKind))
        options.check_choice("bandwidth", self.bandwidth, ("learned", "fixed"))
        options.check_choice("init", self.init, get_args(Start))
        options.check_choice("share", self.share, get_args(Share))
        options.check_choice("bias", self.bias, ("none", "all", "lrlora_only"))
        if not BASES[self.basis].local:
            for name, default in (("grid", "uniform"), ("bandwidth", "learned")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} says nothing about basis={self.basis!r}, "
                        "which has no grid and no bandwidths; leave it out or use 'sinc' or 'rbf'."
                    )
            if self.init == "grid_shift":
                raise ValueError(
                    f"init='grid_shift' needs a grid, which basis={self.basis!r} lacks; use 'live'."
                )

    def rank_of(self, module: str) -> int:
        """The rank of a module's factors."""
        return options.longest_match(self.rank_pattern, module, self.r)

    @property
    def scaling(self) -> float:
        """The factor s, `alpha / r`."""
        assert self.alpha is not None
        return self.alpha / self.r


class Weight(nn.Module):
    """One parameter in a module of its own, where FSDP's wrapping looks."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))


class LrLoraLinear(DeltaLayer):
    """A linear layer with LR-LoRA adapters.

    `lrlora_A[name].weight` is `(r, d_in)`, `lrlora_B[name].weight` `(d_out, r)`; the amplitudes a,
    the bandwidths v with `w = softplus(v)` and a learned grid are vectors of K.
    """

    adapter_layer_names = (
        "lrlora_A",
        "lrlora_B",
        "lrlora_amplitude",
        "lrlora_bandwidth",
        "lrlora_grid",
    )
    other_param_names = ("r", "scaling", "lrlora_config", "lrlora_dropout", "lrlora_fixed")

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__(base_layer, **quantization)
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.lrlora_config: dict[str, tuple[BasisName, float]] = {}
        # a fixed grid and fixed bandwidths
        self.lrlora_fixed: dict[str, tuple[Tensor, Tensor]] = {}
        self.lrlora_dropout = nn.ModuleDict({})
        self.lrlora_A = nn.ModuleDict({})
        self.lrlora_B = nn.ModuleDict({})
        self.lrlora_amplitude = nn.ModuleDict({})
        self.lrlora_bandwidth = nn.ModuleDict({})
        self.lrlora_grid = nn.ModuleDict({})

    def add_adapter(self, adapter: str, config: LrLoraConfig, module: str) -> None:
        """Create an adapter's parameters on the base layer's device.

        Args:
            adapter: Name of the adapter.
            config: Its configuration.
            module: Full name of this module, by which the config's patterns are read.

        Raises:
            ValueError: The rank exceeds the layer's smaller dimension.
        """
        r = config.rank_of(module)
        options.check_rank_fits(r, module, self.in_features, self.out_features)
        sine = config.basis == "sine"
        self.r[adapter] = r
        self.scaling[adapter] = config.scaling / (math.sqrt(self.in_features) if sine else 1)
        self.lrlora_config[adapter] = (config.basis, config.omega if sine else config.span)
        self.lrlora_dropout[adapter] = (
            nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        )
        self.lrlora_A[adapter] = Weight(r, self.in_features)
        self.lrlora_B[adapter] = Weight(self.out_features, r)
        self._add_function(adapter, config)
        self._initialise(adapter, config)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _add_function(self, adapter: str, config: LrLoraConfig) -> None:
        basis, k = BASES[config.basis], config.points
        if config.basis != "sine":
            self.lrlora_amplitude[adapter] = Weight(basis.amplitudes(k))
        if not basis.local:
            return
        shift = 0.25 if config.init == "grid_shift" else 0.0
        points = grid_points(config.grid, k, config.span, seed=config.grid_seed, shift=shift)
        widths = torch.full((k,), config.bandwidth_init, dtype=torch.float64, device="cpu")
        self.lrlora_fixed[adapter] = (points, widths)
        if config.bandwidth == "learned":
            self.lrlora_bandwidth[adapter] = Weight(k)
        if config.grid == "learned":
            self.lrlora_grid[adapter] = Weight(k)

    @torch.no_grad()
    def _initialise(self, adapter: str, config: LrLoraConfig) -> None:
        """A as in LoRA (Kaiming, a = sqrt 5): `U(-1/sqrt(d_in), 1/sqrt(d_in))`; see `init`."""
        width = 1 / math.sqrt(self.in_features)
        self._weight("lrlora_A", adapter).uniform_(-width, width)
        b = self._weight("lrlora_B", adapter)
        # SineLoRA starts as LoRA does: sin(0) = 0 and its slope there is not
        live = config.init == "live" and config.basis != "sine"
        if live or not config.init_weights:
            b.uniform_(-width, width)
        else:
            b.zero_()
        if adapter in self.lrlora_amplitude:
            amplitude = self._weight("lrlora_amplitude", adapter)
            if config.init == "small" or not config.init_weights:
                amplitude.normal_(std=config.amplitude_std)
            else:
                amplitude.zero_()
        if adapter in self.lrlora_bandwidth:
            # softplus(v) = w
            value = config.bandwidth_init + math.log(-math.expm1(-config.bandwidth_init))
            self._weight("lrlora_bandwidth", adapter).fill_(value)
        if adapter in self.lrlora_grid:
            self._weight("lrlora_grid", adapter).copy_(self.lrlora_fixed[adapter][0])

    def _weight(self, container: str, adapter: str) -> Tensor:
        weight = getattr(self, container)[adapter].weight
        assert isinstance(weight, Tensor)
        return weight

    def transfer(self, adapter: str) -> Transfer:
        """The function f of an adapter, in fp32 or wider, with its gradients."""
        basis, span = self.lrlora_config[adapter]
        device = self._weight("lrlora_A", adapter).device

        def wide(container: str) -> Tensor | None:
            if adapter not in getattr(self, container):
                return None
            weight = self._weight(container, adapter)
            return weight.to(torch.promote_types(weight.dtype, torch.float32))

        amplitude, v, grid = map(wide, ("lrlora_amplitude", "lrlora_bandwidth", "lrlora_grid"))
        if amplitude is None:
            amplitude = torch.ones(1, device=device)
        if adapter not in self.lrlora_fixed:
            return Transfer(basis, span, amplitude)
        points, widths = (fixed.to(device) for fixed in self.lrlora_fixed[adapter])
        return Transfer(
            basis,
            span,
            amplitude,
            widths if v is None else F.softplus(v),
            points if grid is None else grid,
        )

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """`A (r, d_in)` and `B (d_out, r)` of an adapter."""
        return self._weight("lrlora_A", adapter), self._weight("lrlora_B", adapter)

    def has_adapter(self, adapter: str) -> bool:
        """Whether this layer carries the named adapter."""
        return adapter in self.lrlora_A

    def factor_dtype(self, adapter: str) -> torch.dtype:
        """The dtype of an adapter's factors."""
        return self._weight("lrlora_A", adapter).dtype

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the updates of all active adapters.

        With one active adapter on a plain fp32 layer, W and the update are added first, so that
        there is one product instead of two.
        """
        active = [name for name in self.active_adapters if self.has_adapter(name)]
        if args or kwargs or len(active) != 1 or not self._one_product(x, active[0]):
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        assert isinstance(base, nn.Linear)
        return self._linear(x, active[0], base.weight, base.bias)

    def _one_product(self, x: Tensor, adapter: str) -> bool:
        """Whether W can be read instead of calling the base layer, without anybody noticing."""
        base = self.base_layer
        if type(base) is not nn.Linear or self.disable_adapters or self.merged:
            return False
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks
        trained = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
        # in half precision the sum W + s f(U) would swallow small updates
        dtypes = {x.dtype, base.weight.dtype, self.factor_dtype(adapter)}
        return (
            not hooked
            and not trained
            and "forward" not in vars(base)  # accelerate's hooks replace it
            and dtypes in ({torch.float32}, {torch.float64})
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _linear(
        self, x: Tensor, adapter: str, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        columns, dropout = None, self.lrlora_dropout[adapter]
        if isinstance(dropout, nn.Dropout) and dropout.training:
            columns = dropout(torch.ones(self.in_features, device=x.device))
        a, b = self.factors(adapter)
        return transfer_linear(
            x,
            a,
            b,
            self.transfer(adapter),
            scale=self.scaling[adapter],
            weight=weight,
            bias=bias,
            columns=columns,
        )

    def add_delta(
        self,
        result: Float[Tensor, "*batch d_out"],
        x: Float[Tensor, "*batch d_in"],
        adapter: str,
    ) -> Float[Tensor, "*batch d_out"]:
        """`result + s f(B A) x`."""
        return result + self._linear(x, adapter, None, None)

    def delta_weight(self, adapter: str) -> Float[Tensor, "d_out d_in"]:
        """The matrix `s f(B A)` in fp32 or wider."""
        a, b = (f.detach() for f in self.factors(adapter))
        wide = torch.promote_types(a.dtype, torch.float32)
        return evaluate(b.to(wide) @ a.to(wide), self.transfer(adapter)) * self.scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def __repr__(self) -> str:
        return "lrlora." + super().__repr__()


class LrLoraModel(DeltaModel):
    """PEFT's tuner for `LrLoraConfig`."""

    prefix = "lrlora_"
    layer_cls = LrLoraLinear
    tuner_layer_cls = LrLoraLinear

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """Give all modules the first one's parameters of what is shared.

        The modules that hold the parameters are shared, not the parameters alone: they stay one
        when PEFT casts, moves or loads them.
        """
        assert isinstance(config, LrLoraConfig)
        names = ("grid", "bandwidth", "amplitude") if config.share == "all" else (config.share,)
        layers = [m for m in model.modules() if isinstance(m, LrLoraLinear)]
        layers = [layer for layer in layers if layer.has_adapter(adapter_name)]
        for container in (f"lrlora_{name}" for name in names if name != "none"):
            for layer in layers:
                if adapter_name in getattr(layer, container):
                    shared = getattr(layers[0], container)[adapter_name]
                    getattr(layer, container)[adapter_name] = shared
