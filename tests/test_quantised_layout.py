"""bitsandbytes rearranges 4-bit weights in place on some CPUs; no reader must notice."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from torch import nn

from rankwise.quantised import keep_layout_
from rankwise.targets import find_targets, linear_weight


def _layer(kind: str) -> bnb.nn.Linear4bit:
    torch.manual_seed(0)
    plain = nn.Linear(128, 64, bias=False)
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type=kind)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cpu").eval()
    layer.support_avx512bf16_for_cpu = True  # as bitsandbytes sets it where the CPU has it
    return layer


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_rearranged_weight_is_put_back_before_it_is_read(kind: str) -> None:
    layer = _layer(kind)
    before = linear_weight(_layer(kind))
    weight = layer.weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )
    assert weight.quant_state.packing_format_for_cpu
    after = linear_weight(layer)
    assert not weight.quant_state.packing_format_for_cpu
    # the scales have been rounded to bf16 meanwhile, which nobody can undo
    torch.testing.assert_close(after, before, rtol=2**-8, atol=0)


def test_targets_are_kept_as_they_are_from_then_on() -> None:
    model = nn.Sequential(_layer("nf4"), nn.Linear(64, 64))
    find_targets(model)
    assert not model[0].support_avx512bf16_for_cpu
    weight = linear_weight(model[0])
    with torch.no_grad():
        found = model[0](torch.eye(128)).T
    torch.testing.assert_close(found, weight)
    assert torch.equal(linear_weight(model[0]), weight)
    keep_layout_(nn.Linear(2, 2))
