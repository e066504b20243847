"""LR-LoRA on quantised bases: what the layer computes, its gradients, and that it learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

from contracts import train_by_chance_
from quantised_models import QUANTISERS, held_weight
from rankwise import attach, find_targets, load_adapter, lr_lora_param_groups, save_native
from rankwise.adapters import LrLoraLinear
from rankwise.methods import Lora
from tiny_models import VOCABULARY, tiny_llama

SIZES = {"hidden_size": 64, "intermediate_size": 128}
TOKENS = torch.arange(32).reshape(2, 16) % VOCABULARY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(**SIZES).save_pretrained(folder)
    return folder


def quantised(kind: str, folder: Path) -> nn.Module:
    if kind != "torchao":
        return QUANTISERS[kind](AutoModelForCausalLM.from_pretrained(folder))
    # PEFT asks the transformers quantiser how to merge
    config = TorchAoConfig(Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def adapted(kind: str, folder: Path) -> PeftModel:
    base = quantised(kind, folder)
    plan = Lora(r=2).plan(find_targets(base))
    torch.manual_seed(0)
    return attach(base, plan, adapter="lr-lora", points=9, allow_other_base=True)


@pytest.mark.parametrize("kind", QUANTISERS)
def test_a_layer_adds_its_update_to_what_the_base_computes(kind: str, folder: Path) -> None:
    model = adapted(kind, folder)
    train_by_chance_(model)
    layer = next(m for m in model.modules() if isinstance(m, LrLoraLinear))
    x = torch.randn(5, layer.in_features, requires_grad=True)
    output = layer(x)
    update = layer.delta_weight("default")
    with torch.no_grad():
        expected = layer.base_layer(x) + x @ update.T
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    output.sum().backward()
    right = torch.ones(5, layer.out_features) @ (held_weight(layer.base_layer) + update)
    # bitsandbytes computes the input's gradient of its int8 layer in 16 bits
    torch.testing.assert_close(x.grad, right.detach(), rtol=0.02, atol=0.02)
    for factor in layer.factors("default"):
        assert factor.grad is not None and factor.grad.abs().max() > 0


@pytest.mark.parametrize("kind", QUANTISERS)
def test_it_learns_and_is_saved(kind: str, folder: Path, tmp_path: Path) -> None:
    model = adapted(kind, folder)
    optimizer = torch.optim.AdamW(lr_lora_param_groups(model, 1e-2))
    losses = []
    for _ in range(12):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    save_native(model, tmp_path)
    loaded = load_adapter(quantised(kind, folder), tmp_path, allow_other_base=True)
    torch.testing.assert_close(
        loaded(TOKENS).logits, model.eval()(TOKENS).logits, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merging_is_undone(kind: str, folder: Path) -> None:
    model = adapted(kind, folder)
    train_by_chance_(model)
    model.eval()
    expected = model(TOKENS).logits
    layers = [m for m in model.modules() if isinstance(m, LrLoraLinear)]
    before = [held_weight(layer.base_layer) for layer in layers]
    deltas = [layer.delta_weight("default").detach() for layer in layers]
    model.merge_adapter()
    assert all(layer.merged for layer in layers)
    merged = model(TOKENS).logits
    # merging rounds to the quantised weights
    assert (merged - expected).abs().mean() < 0.5 * expected.abs().mean()
    model.unmerge_adapter()
    assert not any(layer.merged for layer in layers)
    for layer, old, delta in zip(layers, before, deltas, strict=True):
        assert (held_weight(layer.base_layer) - old).norm() < 0.5 * delta.norm()
    assert (model(TOKENS).logits - expected).abs().mean() < 0.5 * expected.abs().mean()
