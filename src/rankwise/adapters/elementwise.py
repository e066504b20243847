"""LR-LoRA: a low-rank matrix through a learned elementwise function, which lifts its rank.

`delta_W = s f(B A)`, `f(u) = sum_k a_k sinc(w_k (u - g_k))`, one f per module (LR-LoRA Eq. 4);
`s = alpha / r`. The optimizer sets the rank: f decides how far `f(B A)` is from rank r.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.adapters import options
from rankwise.adapters.delta import DeltaLayer, DeltaModel
from rankwise.adapters.fused import frozen_linear
from rankwise.adapters.lr_lora_config import LrLoraConfig
from rankwise.adapters.transfer import (
    BASES,
    BasisName,
    Evaluation,
    Transfer,
    evaluate,
    factorisation,
    factorised_linear,
    grid_points,
    largest_norms,
    transfer_linear,
)


class Weight(nn.Module):
    """One parameter in a module of its own, as PEFT's are."""

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
    other_param_names = (
        "r",
        "scaling",
        "lrlora_config",
        "lrlora_dropout",
        "lrlora_fixed",
        "lrlora_passes",
    )

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__(base_layer, **quantization)
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.lrlora_config: dict[str, tuple[BasisName, float, bool]] = {}
        # a fixed grid and fixed bandwidths
        self.lrlora_fixed: dict[str, tuple[Tensor, Tensor]] = {}
        # training passes through the dense matrix, and through factors of higher rank
        self.lrlora_passes: dict[str, list[int]] = {}
        self.lrlora_evaluation: Evaluation = "auto"
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
        self.lrlora_passes[adapter] = [0, 0]
        self.scaling[adapter] = config.scaling / (math.sqrt(self.in_features) if sine else 1)
        span = config.omega if sine else config.span
        self.lrlora_config[adapter] = (config.basis, span, config.constant)
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
        basis, span, constant = self.lrlora_config[adapter]
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
            return Transfer(basis, span, amplitude, constant=constant)
        points, widths = (fixed.to(device) for fixed in self.lrlora_fixed[adapter])
        return Transfer(
            basis,
            span,
            amplitude,
            widths if v is None else F.softplus(v),
            points if grid is None else grid,
            constant,
        )

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """`A (r, d_in)` and `B (d_out, r)` of an adapter."""
        return self._weight("lrlora_A", adapter), self._weight("lrlora_B", adapter)

    def has_adapter(self, adapter: str) -> bool:
        """Whether this layer carries the named adapter."""
        return adapter in self.lrlora_A

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the updates of all active adapters.

        With one active adapter on a plain fp32 layer, W and the update are added first, so that
        there is one product instead of two.
        """
        active = [name for name in self.active_adapters if self.has_adapter(name)]
        # in half precision the sum W + s f(U) would swallow small updates
        plain = not (args or kwargs or self.disable_adapters or self.merged)
        if plain and len(active) == 1 and x.dtype in (torch.float32, torch.float64):
            frozen = frozen_linear(self.base_layer, x, self._weight("lrlora_A", active[0]))
            if frozen is not None:
                return self._linear(x, active[0], *frozen)
        return super().forward(x, *args, **kwargs)

    def _linear(
        self, x: Tensor, adapter: str, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        columns, dropout = None, self.lrlora_dropout[adapter]
        if isinstance(dropout, nn.Dropout) and dropout.training:
            columns = dropout(torch.ones(self.in_features, device=x.device))
        a, b = self.factors(adapter)
        f, scale = self.transfer(adapter), self.scaling[adapter]
        rest: dict[str, Any] = {
            "scale": scale, "weight": weight, "bias": bias, "columns": columns
        }  # fmt: skip
        way, radius = None, -1.0
        if x.dtype == torch.float32 and not torch.compiler.is_compiling():
            fixed = a.detach(), b.detach()
            norms = largest_norms(*fixed)
            way = factorisation(f, *fixed, x.numel() // self.in_features, norms)
            radius = math.prod(norms)
        if self.training and not torch.compiler.is_compiling():  # which would guard the count
            self.lrlora_passes[adapter][0 if way is None else 1] += 1
        if way is None:
            evaluation = self.lrlora_evaluation
            return transfer_linear(x, a, b, f, evaluation=evaluation, radius=radius, **rest)
        return factorised_linear(x, a, b, f, way, **rest)

    def add_delta(
        self,
        result: Float[Tensor, "*batch d_out"],
        x: Float[Tensor, "*batch d_in"],
        adapter: str,
    ) -> Float[Tensor, "*batch d_out"]:
        """`result + s f(B A) x`."""
        x = self._cast_input_dtype(x, self._weight("lrlora_A", adapter).dtype)
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


def compile_lr_lora_(model: nn.Module) -> int:
    """Let LR-LoRA layers evaluate f by kernels that `torch.compile` makes, in place.

    Worth it where ranges have grown so that the factorised path is over and polynomials are long.
    The first steps take a minute longer; a C++ compiler is needed, on GPUs Triton.

    Returns:
        The number of layers.

    Raises:
        ValueError: The model has none.
    """
    layers = [module for module in model.modules() if isinstance(module, LrLoraLinear)]
    if not layers:
        raise ValueError("the model has no LR-LoRA adapter; attach one before compiling it.")
    for layer in layers:
        layer.lrlora_evaluation = "compiled"
    return len(layers)
