"""LR-LoRA adapters by a plan: any plan's ranks, plans of their own kind, placement."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from contracts import train_by_chance_
from rankwise import (
    Compose,
    LrLoraConfig,
    RaLoraPro,
    RankPlan,
    attach,
    find_targets,
    lr_lora_param_groups,
    placed_modules,
    profile_gradients,
)
from rankwise.adapters import LrLoraLinear
from rankwise.errors import PlanError
from rankwise.profiling import GradientProfile
from tiny_models import VOCABULARY, tiny_llama

# wide enough for ranks that differ
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def tokens(seed: int = 0, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, shape or (2, 12), generator=generator)


def ranks_of(model: nn.Module) -> dict[str, int]:
    return {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in model.named_modules()
        if isinstance(module, LrLoraLinear)
    }


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(**SIZES).save_pretrained(folder)
    return folder


@pytest.fixture
def base(base_folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(base_folder).eval()


@pytest.fixture(scope="module")
def profile(base_folder: Path) -> GradientProfile:
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    batches = [{"input_ids": tokens(i, 2, 16), "labels": tokens(i, 2, 16)} for i in range(12)]
    return profile_gradients(
        model, batches, batches=12, statistics=("mean", "gram"), progress=False
    )


@pytest.fixture(scope="module")
def gard(profile: GradientProfile) -> Compose:
    return Compose(r=16, statistic="gram", estimator="energy")


def test_a_gard_plan_with_lr_lora_in_place_of_lora(
    base: nn.Module, profile: GradientProfile, gard: Compose, tmp_path: Path
) -> None:
    plan = gard.plan(profile)
    assert len({m.rank for m in plan.modules.values()}) > 1
    expected = base(tokens()).logits
    model = attach(base, plan, adapter="lr-lora", points=9)
    assert ranks_of(model) == {name: m.rank for name, m in plan.modules.items()}
    assert torch.equal(model(tokens()).logits, expected)
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == plan.parameters + 2 * 9 * len(plan.modules)
    train_by_chance_(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(tokens()).logits, model.eval()(tokens()).logits)


def test_a_plan_of_its_own_kind_is_saved_loaded_and_trained(
    base: nn.Module, profile: GradientProfile, tmp_path: Path
) -> None:
    method = Compose(r=16, statistic="gram", estimator="energy", adapter="lr-lora")
    path = tmp_path / "plan.json"
    method.plan(profile).save(path)
    plan = RankPlan.load(path)
    assert plan.adapter == "lr-lora"
    model = attach(base, plan)
    assert ranks_of(model) == {name: m.rank for name, m in plan.modules.items()}
    layers = [m for m in model.modules() if isinstance(m, LrLoraLinear)]
    assert {layer.scaling["default"] for layer in layers} == {plan.scaling}
    losses = []
    optimizer = torch.optim.AdamW(lr_lora_param_groups(model, 1e-2))
    for _ in range(15):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    with pytest.raises(PlanError, match="elementwise adapters, which LoraConfig cannot"):
        plan.to_lora_config()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(
    base: nn.Module, profile: GradientProfile, gard: Compose, use_reentrant: bool
) -> None:
    model = attach(base, gard.plan(profile), adapter="lr-lora", points=9, dropout=0.2).train()
    train_by_chance_(model)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-8)


def test_blocks_and_unknown_kinds_are_refused(base: nn.Module, profile: GradientProfile) -> None:
    plan = RaLoraPro(r=4, n_max=8).plan(profile)
    with pytest.raises(PlanError, match="adapter 'lr-lora' has one block per module"):
        attach(base, plan, adapter="lr-lora")
    with pytest.raises(PlanError, match="did you mean 'lr-lora'"):
        attach(base, plan, adapter="lrlora")
    assert not hasattr(base, "peft_config")


def test_a_placement_adapts_these_modules_alone(base: nn.Module) -> None:
    names = placed_modules(find_targets(base), "qkv", layers="odd")
    model = get_peft_model(base, LrLoraConfig(target_modules=names))
    assert list(ranks_of(model)) == [f"model.layers.1.self_attn.{k}_proj" for k in "qkv"]
