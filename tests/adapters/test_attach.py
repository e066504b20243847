"""From a measured plan to a trained, saved and reloaded adapter of a language model."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from contracts import factors_of, train_by_chance_
from rankwise import ModulePlan, RaLoraPro, RankPlan, attach, profile_gradients
from rankwise.adapters import RaLoraConfig, RaLoraLinear
from rankwise.errors import PlanError
from rankwise.plan import BlockOptions
from tiny_models import VOCABULARY, tiny_llama

# wide enough for several blocks of several ranks
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def tokens(seed: int = 0, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, shape or (2, 12), generator=generator)


def ralora_layers(model: nn.Module) -> dict[str, RaLoraLinear]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, RaLoraLinear)
    }


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama: adapters record the folder, and AutoPeft loads the base from it."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(**SIZES).save_pretrained(folder)
    return folder


@pytest.fixture
def base(base_folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(base_folder).eval()


@pytest.fixture(scope="module")
def plan(base_folder: Path) -> RankPlan:
    """RaLoRA-Pro's plan, measured on two batches; it mixes ranks and block counts."""
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    batches = [{"input_ids": tokens(i, 4, 16), "labels": tokens(i, 4, 16)} for i in range(2)]
    profile = profile_gradients(model, batches, batches=2, progress=False)
    plan = RaLoraPro(r=4, n_max=8).plan(profile)
    assert len({module.rank for module in plan.modules.values()}) > 1
    assert len({module.blocks for module in plan.modules.values()}) > 1
    return plan


class TestAttach:
    def test_every_module_gets_its_rank_and_blocks(self, base: nn.Module, plan: RankPlan) -> None:
        layers = ralora_layers(attach(base, plan))
        assert list(layers) == list(plan.modules)
        for name, planned in plan.modules.items():
            a, b = factors_of(layers[name]).values()
            n, r = planned.blocks, planned.rank
            assert a.shape == (n, r, planned.d_in // n)
            assert b.shape == (n, planned.d_out // n, r)
            assert layers[name].scaling["default"] == plan.alpha / plan.r_ref * math.sqrt(n)

    def test_it_is_the_base_at_the_start(self, base: nn.Module, plan: RankPlan) -> None:
        expected = base(tokens()).logits
        assert torch.equal(attach(base, plan)(tokens()).logits, expected)

    def test_trainable_parameters_are_the_plans(self, base: nn.Module, plan: RankPlan) -> None:
        model = attach(base, plan)
        trainable, _ = model.get_nb_trainable_parameters()
        assert trainable == plan.parameters
        assert plan.budget is not None
        assert 0.99 * plan.budget < trainable <= plan.budget
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        layers = ralora_layers(model).values()
        assert held == {id(f) for layer in layers for f in factors_of(layer).values()}

    def test_the_config_tells_what_was_done(self, base: nn.Module, plan: RankPlan) -> None:
        config = attach(base, plan, dropout=0.25).peft_config["default"]
        assert isinstance(config, RaLoraConfig)
        assert config.rank_pattern == {name: m.rank for name, m in plan.modules.items()}
        assert config.blocks_pattern == {name: m.blocks for name, m in plan.modules.items()}
        assert (config.r, config.alpha, config.dropout) == (plan.r_ref, plan.alpha, 0.25)
        assert config.task_type == "CAUSAL_LM"

    def test_scaling_and_drawing_come_from_the_plan(self, base: nn.Module, plan: RankPlan) -> None:
        options = BlockOptions("function", "sqrt_r", "block")
        model = attach(base, replace(plan, block_options=options), init_fan_in="full")
        config = model.peft_config["default"]
        assert isinstance(config, RaLoraConfig)
        assert (config.scaling, config.rank_scaling) == ("function", "sqrt_r")
        assert config.init_fan_in == "full", "what is passed to attach goes first"
        for name, layer in ralora_layers(model).items():
            planned = plan.modules[name]
            expected = plan.alpha * (planned.blocks / planned.rank) ** 0.5
            assert layer.scaling["default"] == pytest.approx(expected)

    def test_a_lora_plan_attaches_plain_lora(self, base: nn.Module, plan: RankPlan) -> None:
        modules = {name: replace(m, blocks=1) for name, m in plan.modules.items()}
        model = attach(base, replace(plan, adapter="lora", modules=modules), dropout=0.25)
        layers = {
            name.removeprefix("base_model.model."): module
            for name, module in model.named_modules()
            if hasattr(module, "lora_A")
        }
        assert {name: layer.r["default"] for name, layer in layers.items()} == {
            name: module.rank for name, module in plan.modules.items()
        }
        scalings = {layer.scaling["default"] for layer in layers.values()}
        assert scalings == {plan.alpha / plan.r_ref}
        assert {layer.lora_dropout["default"].p for layer in layers.values()} == {0.25}


class Suffixes(nn.Module):
    """Modules whose names are ends of one another, or differ from one by a wildcard."""

    SHAPES = ("proj", "a.proj", "b.a.proj", "b_a.proj", "bxa.proj", "x.proj")

    def __init__(self) -> None:
        super().__init__()
        for name in self.SHAPES:
            parent: nn.Module = self
            *parents, last = name.split(".")
            for part in parents:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, nn.Linear(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.SHAPES:
            x = torch.tanh(self.get_submodule(name)(x))
        return x


def suffix_plan(adapter: Any, **ranks_and_blocks: tuple[int, int]) -> RankPlan:
    modules = {
        name.replace("__", "."): ModulePlan(d_in=32, d_out=32, rank=rank, blocks=blocks)
        for name, (rank, blocks) in ranks_and_blocks.items()
    }
    return RankPlan(
        method="by hand", adapter=adapter, r_ref=8, alpha=16, budget=None, modules=modules
    )


class TestNamesThatEndAlike:
    @pytest.mark.parametrize("adapter", ["lora", "ralora"])
    def test_each_has_its_own_rank_also_after_loading(self, adapter: str, tmp_path: Path) -> None:
        # x.proj and b.a.proj have the reference rank and one block, the defaults that another
        # module's entry must not override
        n = 1 if adapter == "lora" else 4
        plan = suffix_plan(
            adapter,
            proj=(2, n),
            a__proj=(4, n),
            b__a__proj=(8, 1),
            b_a__proj=(3, n),
            x__proj=(8, 1),
        )
        self.check(attach(Suffixes(), plan), plan)
        attach(Suffixes(), plan).save_pretrained(tmp_path)
        self.check(PeftModel.from_pretrained(Suffixes(), tmp_path), plan)

    @pytest.mark.parametrize("adapter", ["lora", "ralora"])
    @pytest.mark.parametrize("name", ["proj", "a__proj", "b__a__proj", "x__proj"])
    def test_one_alone_is_adapted_alone(self, adapter: str, name: str, tmp_path: Path) -> None:
        plan = suffix_plan(adapter, **{name: (2, 1)})
        self.check(attach(Suffixes(), plan), plan)
        attach(Suffixes(), plan).save_pretrained(tmp_path)
        self.check(PeftModel.from_pretrained(Suffixes(), tmp_path), plan)

    @staticmethod
    def check(model: nn.Module, plan: RankPlan) -> None:
        found = {
            name.removeprefix("base_model.model."): (
                module.r["default"],
                module.blocks["default"] if plan.adapter == "ralora" else 1,
                module.scaling["default"],
            )
            for name, module in model.named_modules()
            if hasattr(module, "scaling")
        }
        assert found == {
            name: (m.rank, m.blocks, plan.scaling * math.sqrt(m.blocks))
            for name, m in plan.modules.items()
        }


class TestWrongPlans:
    @pytest.fixture
    def modules(self, plan: RankPlan) -> dict[str, ModulePlan]:
        return dict(plan.modules)

    def refused(self, plan: RankPlan, match: str, **options: Any) -> None:
        model = tiny_llama(**SIZES)
        names = [(name, type(module)) for name, module in model.named_modules()]
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        with pytest.raises((PlanError, ValueError), match=match):
            attach(model, plan, **options)
        assert [(name, type(module)) for name, module in model.named_modules()] == names
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
        assert model.state_dict().keys() == weights.keys()
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, weights[name])
        assert not hasattr(model, "peft_config")

    @pytest.mark.parametrize("other", [RaLoraPro(r=2), "plan.json", None])
    def test_no_plan(self, other: Any) -> None:
        self.refused(other, rf"a rank plan is needed, .* not a {type(other).__name__}\.")

    def test_a_module_the_model_lacks(self, plan: RankPlan, modules: dict[str, ModulePlan]) -> None:
        last = list(modules)[-1]
        modules[last.replace("down", "up_and_down")] = modules.pop(last)
        self.refused(replace(plan, modules=modules), re.escape(last))

    def test_a_module_that_is_not_linear(
        self, plan: RankPlan, modules: dict[str, ModulePlan]
    ) -> None:
        modules["model.norm"] = next(iter(modules.values()))
        self.refused(replace(plan, budget=None, modules=modules), r"'model\.norm'.* linear layer")

    def test_another_shape(self, plan: RankPlan, modules: dict[str, ModulePlan]) -> None:
        last = list(modules)[-1]
        modules[last] = replace(modules[last], d_in=modules[last].d_in * 2)
        plan = replace(plan, budget=None, modules=modules)
        self.refused(plan, r"down_proj is 64 x 128 here and 64 x 256 in the plan")

    def test_other_weights(self, plan: RankPlan) -> None:
        other = replace(plan, model_fingerprint="0" * 16)
        self.refused(other, "fingerprint 0000000000000000.*allow_other_base=True")
        assert ralora_layers(attach(tiny_llama(**SIZES), other, allow_other_base=True))

    def test_options_that_peft_refuses_late(self, plan: RankPlan) -> None:
        self.refused(plan, "bias='most'", bias="most")

    def test_a_model_that_has_adapters_already(self, plan: RankPlan, base: nn.Module) -> None:
        model = attach(base, plan)
        before = ralora_layers(model)
        with pytest.raises(PlanError):
            attach(model, plan)
        assert ralora_layers(model) == before


LOADER = """
import sys
import torch
from safetensors.torch import load_file, save_file
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
import rankwise

adapter, base, inputs, outputs, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
tokens = load_file(inputs)["tokens"]
models = {
    "peft": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    "auto": AutoPeftModelForCausalLM.from_pretrained(adapter),
    "transformers": AutoModelForCausalLM.from_pretrained(adapter),
    "low_memory": PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), adapter, low_cpu_mem_usage=True
    ),
}
with torch.no_grad():
    save_file({name: model.eval()(tokens).logits for name, model in models.items()}, outputs)
"""


class Reloaded(NamedTuple):
    """A saved adapter, what the live model computes, and what a fresh process computes."""

    folder: Path
    live: Tensor
    base: Tensor
    fresh: dict[str, Tensor]


@pytest.fixture(scope="module")
def reloaded(
    plan: RankPlan, base_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Reloaded:
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    with torch.no_grad():
        base_logits = base(tokens()).logits
        model = attach(base, plan)
        train_by_chance_(model)
        live = model.eval()(tokens()).logits
    model.save_pretrained(folder)
    inputs, outputs = folder.parent / "inputs.safetensors", folder.parent / "outputs.safetensors"
    save_file({"tokens": tokens()}, inputs)
    arguments = [folder, base_folder, inputs, outputs, torch.get_num_threads()]
    process = subprocess.run(
        [sys.executable, "-c", LOADER, *map(str, arguments)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return Reloaded(folder, live, base_logits, load_file(outputs))


class TestFreshProcess:
    @pytest.mark.parametrize("way", ["peft", "auto", "transformers", "low_memory"])
    def test_the_logits_are_the_same_bit_for_bit(self, reloaded: Reloaded, way: str) -> None:
        assert torch.equal(reloaded.fresh[way], reloaded.live)
        assert not torch.allclose(reloaded.live, reloaded.base)

    def test_the_saved_file_holds_the_factors_and_nothing_else(
        self, reloaded: Reloaded, plan: RankPlan
    ) -> None:
        saved = load_file(reloaded.folder / "adapter_model.safetensors")
        expected: dict[str, tuple[int, ...]] = {}
        for name, m in plan.modules.items():
            prefix = f"base_model.model.{name}.ralora_"
            expected[prefix + "A.weight"] = (m.blocks, m.rank, m.d_in // m.blocks)
            expected[prefix + "B.weight"] = (m.blocks, m.d_out // m.blocks, m.rank)
        assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == expected


class TestLanguageModel:
    def test_merged_logits_are_the_live_ones(self, base: nn.Module, plan: RankPlan) -> None:
        model = attach(base.double(), plan).eval()
        train_by_chance_(model)
        live = model(tokens()).logits
        merged = model.merge_and_unload(safe_merge=True)
        assert not ralora_layers(merged)
        torch.testing.assert_close(merged(tokens()).logits, live, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_gives_the_same_gradients(
        self, base: nn.Module, plan: RankPlan, use_reentrant: bool
    ) -> None:
        model = attach(base, plan).train()
        train_by_chance_(model)
        plain = self.gradients(model)
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        calls: list[nn.Module] = []
        watched = next(iter(ralora_layers(model).values()))
        watched.register_forward_hook(lambda module, *_: calls.append(module))
        checkpointed = self.gradients(model)
        assert len(calls) == 2, "checkpointing computes each layer again in the backward pass"
        assert plain.keys() == checkpointed.keys()
        assert len(plain) == 2 * len(plan.modules)
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-6, atol=1e-9)

    @staticmethod
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        batch = tokens()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def test_it_learns(self, base: nn.Module, plan: RankPlan) -> None:
        model = attach(base, plan).train()
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        batch, losses = tokens(), []
        for _ in range(30):
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
