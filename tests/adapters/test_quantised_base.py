"""Block-diagonal adapters on bitsandbytes' and torchao's layers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig

from contracts import train_by_chance_
from quantised_models import QUANTISERS, held_weight
from rankwise import ModulePlan, RankPlan, attach, find_targets, load_adapter
from rankwise.adapters import RaLoraLinear
from rankwise.errors import PlanError
from tiny_models import VOCABULARY, tiny_llama

TOKENS = torch.arange(3, 19).reshape(2, 8) % VOCABULARY


def base_model(kind: str) -> nn.Module:
    model = QUANTISERS[kind](tiny_llama(hidden_size=64, intermediate_size=128)).eval()
    if kind == "torchao":  # what transformers leaves on a model that it loaded quantised
        settings = TorchAoConfig(Int8WeightOnlyConfig())
        model.hf_quantizer = SimpleNamespace(quantization_config=settings)
    return model


def with_adapters(model: nn.Module) -> PeftModel:
    modules = {
        name: ModulePlan(shape.d_in, shape.d_out, 2, 1 if i % 3 else 4)
        for i, (name, shape) in enumerate(find_targets(model).items())
    }
    return attach(model, RankPlan("by hand", "ralora", 2, 4.0, None, modules))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.fixture(params=list(QUANTISERS))
def kind(request: Any) -> str:
    return request.param


def test_torchao_without_its_settings_is_refused_before_anything_changes() -> None:
    model = base_model("torchao")
    del model.hf_quantizer
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(PlanError, match=r"q_proj was quantised by torchao.*TorchAoConfig"):
        with_adapters(model)
    assert [name for name, _ in model.named_modules()] == names


def test_it_starts_as_the_base(kind: str) -> None:
    expected = logits(base_model(kind))
    assert torch.equal(logits(with_adapters(base_model(kind))), expected)


def test_every_layer_adds_its_update(kind: str) -> None:
    model = with_adapters(base_model(kind))
    train_by_chance_(model)
    for layer in (m for m in model.modules() if isinstance(m, RaLoraLinear)):
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            update = layer(x) - layer.base_layer(x)
        expected = x @ layer.delta_weight("default").T
        torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)


def test_it_trains_and_loads_again(kind: str, tmp_path: Path) -> None:
    model = with_adapters(base_model(kind))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model.train()(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path)
    loaded = load_adapter(base_model(kind), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_merging_rounds_to_the_bases_numbers(kind: str) -> None:
    """The merged weight is within a quantum of W + delta, and farther from W."""
    model = with_adapters(base_model(kind))
    train_by_chance_(model)
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, RaLoraLinear))
    before, delta = held_weight(layer.base_layer), layer.delta_weight("default")
    merged = model.merge_and_unload()
    found = held_weight(merged.get_submodule(name.removeprefix("base_model.model.")))
    assert (found - before - delta).norm() < 0.5 * delta.norm()
