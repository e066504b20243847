"""What every adapter trains, saves and loads (see contracts.py)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from contracts import (
    AdapterCase,
    OneLayer,
    adapted,
    adapter_layer,
    assert_close,
    every_adapter,
    factors_of,
    inputs,
)


@every_adapter
class TestTrainableParameters:
    def test_an_optimizer_over_what_requires_a_gradient_holds_exactly_the_factors(
        self, case: AdapterCase
    ) -> None:
        model = adapted(case)
        optimizer = torch.optim.SGD(p for p in model.parameters() if p.requires_grad)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(f) for f in factors_of(adapter_layer(model)).values()}

    def test_training_moves_the_factors_and_nothing_else(self, case: AdapterCase) -> None:
        model, x = adapted(case, trained=False).train(), inputs()
        before = copy.deepcopy(dict(model.named_parameters()))
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        for _ in range(2):  # with B = 0, A moves from the second step on
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        factors = {id(f) for f in factors_of(adapter_layer(model)).values()}
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) == (id(parameter) not in factors), name

    @pytest.mark.parametrize("bias", ["none", "all", "{}_only"])
    def test_bias_options(self, case: AdapterCase, bias: str) -> None:
        prefix = case.config().peft_type.value.lower()
        model = get_peft_model(WithNorm(), case.config(bias=bias.format(prefix)))
        trainable = {n for n, p in model.named_parameters() if p.requires_grad and "bias" in n}
        own, norm = "base_model.model.layer.base_layer.bias", "base_model.model.norm.bias"
        expected = {"none": set(), "all": {own, norm}, "{}_only": {own}}[bias]
        assert trainable == expected

    @pytest.mark.parametrize("bias", ["all", "{}_only"])
    def test_trained_biases_are_saved_and_loaded(
        self, case: AdapterCase, bias: str, tmp_path: Path
    ) -> None:
        prefix = case.config().peft_type.value.lower()
        model = get_peft_model(WithNorm(), case.config(bias=bias.format(prefix)))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.5
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(WithNorm(), tmp_path)
        x = inputs()
        assert torch.equal(loaded.eval()(x), model.eval()(x))

    def test_modules_to_save_train_and_travel_with_the_adapter(
        self, case: AdapterCase, tmp_path: Path
    ) -> None:
        model = get_peft_model(WithNorm(), case.config(modules_to_save=["norm"]))
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {n for n in trainable if "norm" in n} == {
            "base_model.model.norm.modules_to_save.default.weight",
            "base_model.model.norm.modules_to_save.default.bias",
        }
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.5
        model.save_pretrained(tmp_path)
        x = inputs()
        expected = model.eval()(x)
        loaded = PeftModel.from_pretrained(WithNorm(), tmp_path)
        assert torch.equal(loaded.eval()(x), expected)
        assert_close(model.merge_and_unload()(x), expected, torch.float32)
        with loaded.disable_adapter():
            assert torch.equal(loaded(x), WithNorm()(x))


class WithNorm(OneLayer):
    """`OneLayer` followed by a layer that carries no adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(self.layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


@every_adapter
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_computes_the_same_bit_for_bit(
    case: AdapterCase, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model, x = adapted(case), inputs()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(OneLayer(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert torch.equal(loaded.eval()(x), model(x))
