"""Small models with quantised layers, and the same models with the weights those layers hold."""

from __future__ import annotations

import copy
from collections.abc import Callable

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from rankwise.quantised import keep_layout_
from rankwise.targets import find_targets


def bitsandbytes_4bit(kind: str) -> Callable[[nn.Linear], nn.Module]:
    """Make layers of a 4-bit data type, computing in fp32."""
    return lambda layer: bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=torch.float32,
        quant_type=kind,
    )


def bitsandbytes_8bit(layer: nn.Linear) -> nn.Module:
    """An LLM.int8 layer."""
    return bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False
    )


def with_bitsandbytes(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A copy whose targets are bitsandbytes layers."""
    model = copy.deepcopy(model)
    for name in find_targets(model):
        layer = model.get_submodule(name)
        quantised = make(layer)
        quantised.load_state_dict(layer.state_dict())
        quantised.to("cpu")  # the move is what quantises
        keep_layout_(quantised)  # or what a CPU with AVX512-BF16 computes would be another's
        model.set_submodule(name, quantised)
    return model.eval()


def with_torchao(model: nn.Module) -> nn.Module:
    """A copy whose targets hold torchao's int8 weights."""
    model = copy.deepcopy(model)
    targets = set(find_targets(model))
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in targets)
    return model


QUANTISERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nf4": lambda model: with_bitsandbytes(model, bitsandbytes_4bit("nf4")),
    "fp4": lambda model: with_bitsandbytes(model, bitsandbytes_4bit("fp4")),
    "int8": lambda model: with_bitsandbytes(model, bitsandbytes_8bit),
    "torchao": with_torchao,
}


def held_weight(module: nn.Module) -> Tensor:
    """What a quantised layer multiplies by, read off its own forward pass."""
    with torch.no_grad():
        bias = 0 if module.bias is None else module.bias
        return (module(torch.eye(module.in_features)) - bias).T.contiguous()


class Twin(nn.Linear):
    """A plain layer with the weights and the outputs of a quantised one.

    The outputs are not `W x` where activations are quantised too, as in LLM.int8; the gradient goes
    straight through that.
    """

    def __init__(self, quantised: nn.Module) -> None:
        super().__init__(quantised.in_features, quantised.out_features, bias=False)
        self.weight.data.copy_(held_weight(quantised))
        self._quantised = [quantised]  # in a list, which is no submodule

    def forward(self, x: Tensor) -> Tensor:
        plain = super().forward(x)
        quantised = self._quantised[0](x.detach().requires_grad_(True)).detach()
        return plain + (quantised - plain).detach()


def twin_of(quantised: nn.Module, base: nn.Module) -> nn.Module:
    """The unquantised model, computing what the quantised one does."""
    twin = copy.deepcopy(base)
    for name in find_targets(base):
        twin.set_submodule(name, Twin(quantised.get_submodule(name)))
    return twin
