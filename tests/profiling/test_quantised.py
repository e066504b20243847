"""Quantised bases are profiled through activations and output gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from batch_reference import exact_gram
from gradient_reference import autograd_gradients
from quantised_models import QUANTISERS, held_weight, twin_of
from rankwise.profiling import profile_gradients
from rankwise.targets import LinearShape, find_targets, linear_weight
from sweep_reference import measure
from tiny_models import tiny_llama, token_batch

ROWS = [[9, 6], [5, 4, 7], [4]]
BATCHES = [token_batch(rows, seed=i) for i, rows in enumerate(ROWS)]

TOLERANCE = {"int8": 1e-3}
"""LLM.int8 rounds activations, so that rounding in fp32 may move one by a 127th of the largest."""

quantisers = pytest.mark.parametrize("quantiser", list(QUANTISERS))


def parameter_state(model: torch.nn.Module) -> list[tuple[bool, Tensor]]:
    return [(p.requires_grad, plain(p)) for p in model.parameters()]


def plain(parameter: Tensor) -> Tensor:
    """A copy without torchao's wrapper, which has no equality."""
    wrapped = hasattr(parameter, "tensor_data_names")
    return parameter.dequantize() if wrapped else parameter.detach().clone()


@quantisers
@pytest.mark.parametrize("engine", ["hooks", "sweep"])
def test_statistics_are_those_of_the_weights_that_are_held(quantiser: str, engine: str) -> None:
    base = tiny_llama(hidden_size=32, intermediate_size=64)
    model = QUANTISERS[quantiser](base)
    twin = twin_of(model, base)
    before = parameter_state(model)
    rel = TOLERANCE.get(quantiser, 1e-5)
    profile = measure(model, BATCHES, engine=engine)
    assert profile.provenance.engine == engine
    expected = autograd_gradients(twin, BATCHES)
    assert profile.gradients is not None and profile.gram is not None
    assert list(profile.modules) == list(expected)
    for name, gradient in expected.items():
        entry = profile.modules[name]
        weight = twin.get_submodule(name).weight.detach()
        assert float((profile.gradients[name] - gradient).norm()) <= rel * float(gradient.norm())
        sensitivity = float((weight * gradient).abs().mean())
        assert entry.sensitivity == pytest.approx(sensitivity, rel=rel)
        each = [autograd_gradients(twin, [batch])[name].double() for batch in BATCHES[:1]]
        assert float(profile.gram[name][0, 0]) * 3 == pytest.approx(
            float(exact_gram(each)), rel=2 * rel
        )
    for (required, value), parameter in zip(before, model.parameters(), strict=True):
        assert parameter.requires_grad == required
        assert torch.equal(plain(parameter), value)


@quantisers
def test_quantisation_shows(quantiser: str) -> None:
    """The held weights are not the base's, so the tests above compare with the right thing."""
    base = tiny_llama(hidden_size=32, intermediate_size=64)
    model = QUANTISERS[quantiser](base)
    name = "model.layers.1.mlp.down_proj"
    layer, original = model.get_submodule(name), base.get_submodule(name).weight.detach()
    error = float((held_weight(layer) - original).norm() / original.norm())
    assert error > (0.02 if quantiser in ("nf4", "fp4") else 0.001)
    assert find_targets(model)[name] == LinearShape(64, 32)
    torch.testing.assert_close(linear_weight(layer), held_weight(layer), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_model_that_transformers_quantised_itself(tmp_path: Path, bits: int) -> None:
    base = tiny_llama(hidden_size=32, intermediate_size=64)
    base.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    profile = profile_gradients(model, BATCHES, batches=3, keep_gradients=True)
    assert profile.gradients is not None
    for name, gradient in autograd_gradients(twin_of(model, base), BATCHES).items():
        error = float((profile.gradients[name] - gradient).norm())
        assert error <= (1e-5 if bits == 4 else TOLERANCE["int8"]) * float(gradient.norm())
