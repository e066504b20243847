"""What every adapter must do, and how closely.

`ADAPTERS` lists the adapters; `tests/adapters/test_contract.py` holds each of them to the contract
in every dtype of `TOLERANCES` and on every kind of layer. A new adapter joins by adding its cases
with a slow, obviously right `reference_delta`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from rankwise import LrLoraConfig, RaLoraConfig
from rankwise.adapters.delta import DeltaLayer

TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Largest error allowed, relative to the largest element of the fp64 reference: some hundred
roundings in fp64, some twenty in fp32, and in bf16 (2^-8 = 4e-3 each) some five."""

D_IN, D_OUT, RANK, ALPHA = 96, 64, 3, 2.0
"""Rectangular and divisible by 32 blocks, which are then 2 x 3."""

Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class AdapterCase:
    """One adapter under the contract.

    Attributes:
        id: Name in test ids.
        config: Options -> configuration for a layer called `layer`.
        reference_delta: Factors -> `delta_W (d_out, d_in)` in their dtype, differentiably, without
            using any code of the adapter.
        drop: Input, probability -> the input that the adapter sees, with the adapter's own draws.
        summed: Factors whose gradient is one sum over all entries of `delta_W`, of both signs.
        slack: Times the tolerance for them, for such a sum is smaller than one of random signs.
    """

    id: str
    config: Callable[..., PeftConfig]
    reference_delta: Callable[[Factors], Tensor]
    drop: Callable[[Tensor, float], Tensor] = F.dropout
    summed: tuple[str, ...] = ()
    slack: float = 10


def ralora_case(blocks: int) -> AdapterCase:
    def config(**options: Any) -> PeftConfig:
        alpha = ALPHA / math.sqrt(blocks)  # updates no larger than the weights they are added to
        return RaLoraConfig(r=RANK, alpha=alpha, blocks=blocks, target_modules=["layer"], **options)

    def reference_delta(factors: Factors) -> Tensor:
        a, b = factors["ralora_A"], factors["ralora_B"]
        rows, columns = D_OUT // blocks, D_IN // blocks
        delta = torch.zeros(D_OUT, D_IN, dtype=a.dtype)
        for i in range(blocks):
            delta[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = b[i] @ a[i]
        return ALPHA / RANK * delta

    return AdapterCase(f"ralora-n{blocks}", config, reference_delta)


def sinc_by_quadrature(t: Tensor) -> Tensor:
    """`sin(pi t) / (pi t)`, the mean of `cos(pi s t)` over s in [0, 1], by Gauss's rule."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    s = torch.from_numpy((nodes + 1) / 2)
    return torch.cos(torch.pi * t[..., None] * s) @ torch.from_numpy(weights / 2)


def lrlora_case(
    grid: str = "uniform", bandwidth: str = "learned", constant: bool = True
) -> AdapterCase:
    points = 7

    def config(**options: Any) -> PeftConfig:
        return LrLoraConfig(
            r=RANK,
            alpha=ALPHA,
            points=points,
            span=1.0,
            grid=grid,
            bandwidth=bandwidth,
            constant=constant,
            target_modules=["layer"],
            **options,
        )

    def reference_delta(factors: Factors) -> Tensor:
        u = factors["lrlora_B"] @ factors["lrlora_A"]
        delta = torch.zeros_like(u)
        for k in range(points):
            w, g = 1.0, -1 + k / 3
            if "lrlora_bandwidth" in factors:
                w = torch.log1p(torch.exp(factors["lrlora_bandwidth"][k]))
            if "lrlora_grid" in factors:
                g = factors["lrlora_grid"][k]
            basis = sinc_by_quadrature(w * (u - g))
            if not constant:
                basis = basis - sinc_by_quadrature(w * (torch.zeros_like(u) - g))
            delta = delta + factors["lrlora_amplitude"][k] * basis
        return ALPHA / RANK * delta

    def drop(x: Tensor, p: float) -> Tensor:
        """One mask for all tokens."""
        return x * F.dropout(torch.ones(D_IN), p)

    return AdapterCase(
        f"lrlora-{grid}-{bandwidth}" + ("" if constant else "-no-constant"),
        config,
        reference_delta,
        drop,
        summed=("lrlora_amplitude", "lrlora_bandwidth", "lrlora_grid"),
        # moments of 6,144 entries: where a BLAS has eight lanes instead of sixteen, off by 2.0e-5
        slack=20 if constant else 100,
    )


ADAPTERS = [ralora_case(blocks) for blocks in (1, 2, 8, 32)]
ADAPTERS += [lrlora_case(), lrlora_case("learned"), lrlora_case(bandwidth="fixed")]
ADAPTERS += [lrlora_case(constant=False)]

every_adapter = pytest.mark.parametrize("case", ADAPTERS, ids=lambda case: case.id)
every_dtype = pytest.mark.parametrize(
    "dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)
every_layer_kind = pytest.mark.parametrize("kind", ["Linear", "Conv1D"])


class OneLayer(nn.Module):
    """A model that is one linear layer, `W (D_OUT, D_IN)` with bias, under the name `layer`."""

    def __init__(self, kind: str = "Linear", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(D_IN, D_OUT) if kind == "Linear" else Conv1D(D_OUT, D_IN)
        with torch.no_grad():
            self.layer.weight.normal_(std=D_IN**-0.5, generator=generator)
            self.layer.bias.normal_(generator=generator)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def inputs(dtype: torch.dtype = torch.float32, *shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5)), D_IN, generator=torch.Generator().manual_seed(1)).to(
        dtype
    )


def adapted(
    case: AdapterCase,
    kind: str = "Linear",
    dtype: torch.dtype = torch.float32,
    *,
    trained: bool = True,
    autocast_adapter_dtype: bool = False,
    **options: Any,
) -> PeftModel:
    """A `OneLayer` with the case's adapter, as if trained unless told otherwise, in eval mode."""
    torch.manual_seed(2)
    model = get_peft_model(
        OneLayer(kind, dtype),
        case.config(**options),
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    if trained:
        train_by_chance_(model)
    return model.eval()


def adapter_layer(model: nn.Module) -> DeltaLayer:
    """The only adapted layer of a model."""
    (layer,) = (module for module in model.modules() if isinstance(module, DeltaLayer))
    return layer


def factors_of(layer: DeltaLayer, adapter: str = "default") -> dict[str, nn.Parameter]:
    """Parameters by container; a container need not hold something of every adapter."""
    containers = {name: getattr(layer, name) for name in layer.adapter_layer_names}
    return {name: held[adapter].weight for name, held in containers.items() if adapter in held}


def train_by_chance_(model: nn.Module, adapter: str = "default", seed: int = 3) -> None:
    """Give an adapter random factors that change the output about as much as the base weight."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, DeltaLayer) and layer.has_adapter(adapter):
            for factor in factors_of(layer, adapter).values():
                random = torch.randn(factor.shape, generator=generator) * factor.shape[-1] ** -0.5
                factor.data.copy_(random)


def reference_output(x: Tensor, base: OneLayer, deltas: list[Tensor]) -> Tensor:
    """`(W + sum delta_W) x + b` with dense matrices in fp64."""
    weight = base.layer.weight.detach().double()
    if isinstance(base.layer, Conv1D):
        weight = weight.T
    return x.double() @ (weight + sum(deltas)).T + base.layer.bias.detach().double()


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, slack: float = 1) -> None:
    """Compare with a reference by the tolerance table."""
    assert actual.shape == expected.shape
    wide = expected.detach().double()
    scale = float(wide.abs().max())
    error = float((actual.detach().double() - wide).abs().max())
    assert error <= slack * TOLERANCES[dtype] * scale, (
        f"off by {error:.3g} at a scale of {scale:.3g}"
    )
