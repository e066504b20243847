"""The compiled polynomial computes what the other does; torch's own backends compile elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from contracts import OneLayer, adapter_layer, inputs
from rankwise import LrLoraConfig, compile_lr_lora_
from rankwise.adapters.transfer import compiled
from rankwise.adapters.transfer.compiled import CompiledPolynomial
from rankwise.adapters.transfer.evaluators import Cells, Direct
from rankwise.adapters.transfer.passes import evaluator, tiles
from transfer_samples import relative_error, sample


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[..., Any]]]:
    """Kernels traced by torch.compile but run without a compiler, which would take a minute."""
    original, made = torch.compile, []

    def compile(kernel: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        made.append(kernel)
        return original(kernel, backend="eager", **options)

    monkeypatch.setattr(compiled.torch, "compile", compile)
    compiled._compiled.cache_clear()
    yield made
    compiled._compiled.cache_clear()


@pytest.mark.parametrize("radius", [1e-3, 0.1, 0.8])
@pytest.mark.parametrize("basis", ["sinc", "fourier", "sine"])
def test_it_agrees_with_the_formulas(basis: Any, radius: float) -> None:
    f = sample(basis, 8, bandwidth=0.5, dtype=torch.float32)
    used = evaluator(f, radius, torch.float32, "compiled")
    if not isinstance(used, CompiledPolynomial):
        assert basis != "sinc", "the expansion is short enough"
        return
    assert [*tiles(used, torch.empty(700, 600))] == [(slice(0, 700), slice(0, 600))]
    exact = Direct(f.wide(), torch.float64)
    u = torch.linspace(-radius, radius, 4000).view(50, 80)
    draw = torch.Generator().manual_seed(0)
    upstream, base = torch.randn(50, 80, generator=draw), torch.randn(50, 80, generator=draw)
    for options in ({}, {"base": base, "scale": 0.5}):
        found, right = (u * used.scale, upstream.clone()), (u.double(), upstream.double())
        value, expected = found[0].clone(), right[0].clone()
        used.value_(value, **options)
        exact.value_(expected, **options)
        assert relative_error(value, expected) < 2e-6
        used.backward_(*found, **options)
        exact.backward_(*right, **options)
        for part, other in zip(found, right, strict=True):
            assert relative_error(part, other) < 2e-6
    for part, right in zip(used.gradients(), exact.gradients(), strict=True):
        assert (part is None) == (right is None)
        assert right is None or relative_error(part, right) < 1e-5


def test_two_kernels_serve_all_degrees(traced: list[Callable[..., Any]]) -> None:
    f = sample(dtype=torch.float32)
    for radius in (0.001, 0.01, 0.02, 0.4, 0.5, 0.6):
        evaluator(f, radius, torch.float32, "compiled").value_(torch.zeros(3, 5))
    assert len(traced) == 2


def test_what_is_no_polynomial_is_as_ever() -> None:
    f = sample()
    assert isinstance(evaluator(f, 3.0, torch.float32, "compiled"), Cells)
    assert isinstance(evaluator(f, 0.1, torch.float64, "compiled"), Direct)


def test_layers_take_it_when_asked(traced: list[Callable[..., Any]]) -> None:
    torch.manual_seed(0)
    model = get_peft_model(OneLayer(), LrLoraConfig(target_modules=["layer"], init_weights=False))
    expected = model(inputs())
    assert compile_lr_lora_(model) == 1
    assert adapter_layer(model).lrlora_evaluation == "compiled"
    torch.testing.assert_close(model(inputs()), expected, rtol=1e-5, atol=1e-5)
    assert traced
    with pytest.raises(ValueError, match="no LR-LoRA adapter"):
        compile_lr_lora_(nn.Linear(2, 2))
