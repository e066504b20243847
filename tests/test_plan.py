from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from adapter_fuzzer import fuzz_files
from rankwise.errors import FileError, PlanError
from rankwise.methods import Lora, RaLora, RaLoraPro
from rankwise.plan import BlockOptions, ModulePlan, RankPlan
from rankwise.profiling import profile_gradients
from rankwise.targets import find_targets
from tiny_models import synthetic_profile, tiny_gpt2, tiny_llama, tiny_t5, token_batch

NAME = "model.layers.0.self_attn.q_proj"


def measured_plan(model: nn.Module) -> RankPlan:
    batches = [token_batch([9, 6])]
    return RaLoraPro(r=2).plan(profile_gradients(model, batches, batches=1))


@pytest.fixture(scope="module")
def plan() -> RankPlan:
    return measured_plan(tiny_llama())


@pytest.fixture
def path(plan: RankPlan, tmp_path: Path) -> Path:
    plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def small_plan(**changes: Any) -> RankPlan:
    settings: dict[str, Any] = {
        "method": "ralora",
        "adapter": "ralora",
        "r_ref": 4,
        "alpha": 8.0,
        "budget": None,
        "modules": {"layers.0.q": ModulePlan(16, 16, 4, 2), "layers.0.k": ModulePlan(16, 8, 4)},
    }
    return RankPlan(**(settings | changes))


class TestValues:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ((16, 16, 0), "rank=0"),
            ((16, 16, -1), "rank=-1"),
            ((16, 8, 9), r"rank=9 exceeds min\(d_in, d_out\)=8"),
            ((16, 16, 4, 0), "blocks=0"),
            ((16, 16, 4, 3), "blocks=3 must be a power of two"),
            ((16, 24, 4, 16), "blocks=16 must be .* divides d_in=16 and d_out=24"),
            ((24, 16, 4, 16), "blocks=16 must be .* divides d_in=24 and d_out=16"),
        ],
    )
    def test_impossible_module(self, values: tuple[int, ...], message: str) -> None:
        with pytest.raises(PlanError, match=message):
            ModulePlan(*values)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"modules": {}}, "at least one module"),
            ({"alpha": 0.0}, "alpha=0.0 must be"),
            ({"alpha": -1.0}, "alpha=-1.0 must be"),
            ({"alpha": math.nan}, "alpha=nan must be"),
            ({"r_ref": 0}, "r_ref=0 must be"),
            ({"adapter": "lora"}, "one block per module"),
            ({"budget": 223}, "takes 224 parameters, over its budget of 223"),
        ],
    )
    def test_impossible_plan(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(PlanError, match=message):
            small_plan(**changes)

    def test_numbers(self) -> None:
        plan = small_plan(budget=224)
        assert plan.parameters == 4 * 32 + 4 * 24 == 224
        assert plan.scaling == 2.0

    def test_text(self) -> None:
        text = str(small_plan(budget=230))
        assert "r=4 n=2" in text
        assert "2 modules, 224 trainable parameters of 230 (6 left)" in text
        assert "blocks: mean 1.5, min 1, max 2" in text
        assert "layer" in text and "0 " in text

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (
                BlockOptions(),
                "alpha / r_ref x sqrt(n), A drawn for the full fan-in, with alpha = 8",
            ),
            (BlockOptions("paper", "r", "block"), "by alpha / r, A drawn for the block"),
        ],
    )
    def test_text_says_how_blocks_are_scaled(self, options: BlockOptions, said: str) -> None:
        plan = small_plan(block_options=options)
        assert said in str(plan).replace("\n", " ")
        assert said in plan.to_markdown()

    @pytest.mark.parametrize("measured", [{}, {"model": "m", "batches": 2, "tokens": "7"}, None])
    def test_block_for_a_model_card_of_a_plan_that_says_less(self, measured: object) -> None:
        assert "Measured on" not in small_plan(provenance={"profile": measured}).to_markdown()

    def test_text_of_a_lora_plan_has_no_blocks(self, tiny_llama: PreTrainedModel) -> None:
        text = str(Lora(r=2).plan(find_targets(tiny_llama)))
        assert "n=" not in text and "blocks" not in text
        assert text.count("r=2") == 14


class TestFiles:
    def test_roundtrip(self, plan: RankPlan, path: Path) -> None:
        loaded = RankPlan.load(path)
        assert loaded == plan
        assert list(loaded.modules) == list(plan.modules)
        assert loaded.parameters == plan.parameters
        assert str(loaded) == str(plan)

    def test_roundtrip_of_every_method(self, tmp_path: Path) -> None:
        profile = synthetic_profile({"a": (64, 32), "b.0.c": (16, 16)}, gid=10)
        for method in (
            Lora(r=2),
            RaLora(r=2, alpha=3.5, scaling="paper"),
            RaLoraPro(r=2, budget="paper", rank_scaling="r", init_fan_in="block"),
        ):
            plan = method.plan(profile)
            plan.save(str(tmp_path / "deep" / "plan.json"))
            assert RankPlan.load(str(tmp_path / "deep" / "plan.json")) == plan
        assert [p.name for p in (tmp_path / "deep").iterdir()] == ["plan.json"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda d: d.update(schema_version=0), "schema_version 0; .*reads 1"),
            (lambda d: d.update(schema_version="1"), "schema_version .1.; .*reads 1"),
            (lambda d: d.update(rank=3), "rank: Unexpected keyword"),
            (lambda d: d["modules"][NAME].update(lr=3), rf"modules\.{NAME}\.lr: Unexpected"),
            (lambda d: d.pop("alpha"), "alpha: Field required"),
            (lambda d: d.update(alpha=float("nan")), "alpha: .*finite"),
            (lambda d: d.update(alpha=float("inf")), "alpha: .*finite"),
            (lambda d: d.update(alpha=-16), "alpha=-16.* must be a positive"),
            (lambda d: d.update(alpha="16"), "alpha: .*number"),
            (lambda d: d.update(r_ref=0), "r_ref: .*greater than 0"),
            (lambda d: d.update(r_ref=True), "r_ref: .*integer"),
            (lambda d: d.update(adapter="dora"), "adapter: .*'lora', 'ralora' or 'lr-lora'"),
            (lambda d: d["block_options"].update(scaling="loud"), r"scaling: .*'function'"),
            (lambda d: d["block_options"].update(init="full"), r"block_options\.init: Unexpected"),
            (lambda d: d.update(budget=1), "over its budget of 1"),
            (lambda d: d.update(modules={}), "at least one module"),
            (lambda d: d.update(modules=[]), "modules: "),
            (lambda d: d["modules"][NAME].update(rank=0), rf"modules\.{NAME}\.rank: "),
            (
                lambda d: d["modules"][NAME].update(rank=17),
                rf"modules\.{NAME}: rank=17 exceeds min",
            ),
            (lambda d: d["modules"][NAME].update(rank=1.0), rf"modules\.{NAME}\.rank: "),
            (lambda d: d["modules"][NAME].update(rank=-3), rf"modules\.{NAME}\.rank: "),
            (lambda d: d["modules"][NAME].update(rank="4"), rf"modules\.{NAME}\.rank: "),
            (lambda d: d["modules"][NAME].update(rank=1e9), rf"modules\.{NAME}\.rank: "),
            (lambda d: d["modules"][NAME].update(rank=10**400), rf"modules\.{NAME}\.rank: "),
            (lambda d: d["modules"][NAME].update(d_in=10**400), rf"modules\.{NAME}\.d_in: "),
            (lambda d: d.update(r_ref=10**400), "r_ref: "),
            (lambda d: d["modules"][NAME].update(blocks=0), rf"modules\.{NAME}\.blocks: "),
            (lambda d: d["modules"][NAME].update(blocks=-2), rf"modules\.{NAME}\.blocks: "),
            (lambda d: d["modules"][NAME].update(blocks=3), rf"modules\.{NAME}: blocks=3 must"),
            (lambda d: d["modules"][NAME].update(blocks=32), "blocks=32 must be"),
            (lambda d: d["modules"][NAME].update(gid=float("nan")), r"gid: .*finite"),
            (lambda d: d["left_out"].update(a={"d_in": -3, "d_out": 4}), "module a has d_in=-3"),
            (
                lambda d: d["left_out"].update(a={"d_in": 3, "d_out": 0}),
                "module a .* d_out=0; both",
            ),
            (lambda d: d["left_out"].update(a={"d_in": 2**31, "d_out": 4}), "positive sizes"),
            (
                lambda d: d["left_out"].update({NAME: {"d_in": 16, "d_out": 16}}),
                f"{NAME} is both adapted and left out",
            ),
        ],
    )
    def test_bad_values(
        self, path: Path, change: Callable[[dict[str, Any]], object], message: str
    ) -> None:
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))
        with pytest.raises(FileError, match=message) as info:
            RankPlan.load(path)
        assert str(path) in str(info.value)
        assert "\n" not in str(info.value)

    @pytest.mark.parametrize("size", [0, 1, 100, -3])
    def test_truncated(self, path: Path, size: int) -> None:
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(FileError, match=r"rank plan .*plan\.json"):
            RankPlan.load(path)

    def test_a_plan_from_before_there_were_options(self, plan: RankPlan, path: Path) -> None:
        document = json.loads(path.read_text())
        del document["block_options"]
        path.write_text(json.dumps(document))
        assert RankPlan.load(path) == plan

    @pytest.mark.parametrize("text", ["[" * 10_000, '{"modules":' * 10_000])
    def test_nested_too_deep(self, path: Path, text: str) -> None:
        path.write_text(text)
        started = time.perf_counter()
        with pytest.raises(FileError):
            RankPlan.load(path)
        assert time.perf_counter() - started < 1

    def test_a_gigabyte(self, path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(2**30)
        started = time.perf_counter()
        with pytest.raises(FileError, match="1073741824 bytes; at most"):
            RankPlan.load(path)
        assert time.perf_counter() - started < 1

    def test_broken_bytes_give_our_errors_only(self, path: Path, tmp_path: Path) -> None:
        outcomes = fuzz_files(RankPlan.load, path, tmp_path / "broken", runs=150, seed=0)
        assert outcomes["FileError"] > 90
        assert set(outcomes) <= {"FileError", "loaded"}

    def test_missing_and_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileError, match="no such file"):
            RankPlan.load(tmp_path / "plan.json")
        with pytest.raises(FileError, match="is a folder"):
            RankPlan.load(tmp_path)

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_full_disk(
        self, plan: RankPlan, path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        def full_disk(*_args: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        before = path.read_bytes()
        monkeypatch.setattr(os, call, full_disk)
        for target in (path, path.with_name("new.json")):
            with pytest.raises(FileError, match=r"No space left.*nothing was changed"):
                small_plan().save(target)
        assert [p.name for p in path.parent.iterdir()] == ["plan.json"]
        assert path.read_bytes() == before

    def test_plan_that_is_not_json_writes_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="JSON compliant"):
            small_plan(provenance={"loss": math.nan}).save(tmp_path / "plan.json")
        assert list(tmp_path.iterdir()) == []


class TestCheckFits:
    def test_own_model(self, plan: RankPlan) -> None:
        plan.check_fits(tiny_llama())
        RankPlan.check_fits(measured_plan(tiny_gpt2()), tiny_gpt2())

    def test_same_model_in_bf16(self, plan: RankPlan) -> None:
        plan.check_fits(tiny_llama().to(torch.bfloat16))

    def test_other_weights(self, plan: RankPlan) -> None:
        with pytest.raises(PlanError, match=r"another model: profiled .*allow-other-base"):
            plan.check_fits(tiny_llama(seed=1))
        plan.check_fits(tiny_llama(seed=1), allow_other_base=True)

    def test_one_changed_tensor(self, plan: RankPlan) -> None:
        model = tiny_llama()
        model.model.layers[1].mlp.up_proj.weight.data.mul_(1.1)
        with pytest.raises(PlanError, match="fingerprint"):
            plan.check_fits(model)

    @pytest.mark.parametrize("allow", [False, True])
    def test_other_shape(self, plan: RankPlan, allow: bool) -> None:
        with pytest.raises(PlanError, match=r"gate_proj is 32 x 16 here and 24 x 16 in the plan"):
            plan.check_fits(tiny_llama(intermediate_size=32), allow_other_base=allow)

    @pytest.mark.parametrize("allow", [False, True])
    def test_fewer_layers(self, plan: RankPlan, allow: bool) -> None:
        with pytest.raises(PlanError, match=r"adapts 'model\.layers\.1\..*is no linear layer"):
            plan.check_fits(tiny_llama(num_hidden_layers=1), allow_other_base=allow)

    def test_other_architecture_names_the_nearest(self, plan: RankPlan) -> None:
        with pytest.raises(PlanError, match="is no linear layer of this GPT2LMHeadModel"):
            plan.check_fits(tiny_gpt2())

    def test_module_that_is_not_linear(self) -> None:
        plan = small_plan(modules={"model.embed_tokens": ModulePlan(16, 16, 4)})
        with pytest.raises(PlanError, match="is no linear layer of"):
            plan.check_fits(tiny_llama())

    def test_tied_head(self) -> None:
        plan = small_plan(modules={"lm_head": ModulePlan(16, 61, 4)})
        plan.check_fits(tiny_gpt2(tie_word_embeddings=False))
        with pytest.raises(PlanError, match=r"adapts lm_head, .*tied.*wte\. Plan again without it"):
            plan.check_fits(tiny_gpt2())

    def test_layer_that_attention_reads_without_calling_it(self) -> None:
        plan = small_plan(modules={"attention.out_proj": ModulePlan(16, 16, 4)})
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
        with pytest.raises(PlanError, match=r"attention\.out_proj, .*read by MultiheadAttention"):
            plan.check_fits(model)

    def test_plan_without_a_profile_checks_shapes_only(self) -> None:
        plan = Lora(r=2).plan(find_targets(tiny_llama()))
        plan.check_fits(tiny_llama(seed=5))
        with pytest.raises(PlanError, match="24 x 16 in the plan"):
            plan.check_fits(tiny_llama(intermediate_size=32))

    def test_target_modules_match_the_plan_and_nothing_else(self) -> None:
        model = tiny_t5()
        plan = Lora(r=2).plan(find_targets(model, r"decoder\.block\.1\..*q"))
        adapted = get_peft_model(model, LoraConfig(target_modules=plan.target_modules(model)))
        assert lora_layers(adapted) == set(plan.modules)


def lora_layers(model: nn.Module) -> set[str]:
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


class TestLoraConfig:
    @staticmethod
    def lora_plan(model: nn.Module, alpha: float) -> RankPlan:
        shapes = find_targets(model)
        modules = {
            name: ModulePlan(s.d_in, s.d_out, rank=1 + i % 7)
            for i, (name, s) in enumerate(shapes.items())
        }
        return RankPlan("by hand", "lora", r_ref=4, alpha=alpha, budget=None, modules=modules)

    @pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT sees to it itself
    @pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2, tiny_t5])
    @pytest.mark.parametrize("alpha", [8.0, 3.0])
    def test_saved_reloaded_and_applied_by_plain_peft(
        self, tmp_path: Path, make_model: Callable[[], nn.Module], alpha: float
    ) -> None:
        plan = self.lora_plan(make_model(), alpha)
        plan.to_lora_config(lora_dropout=0.1).save_pretrained(tmp_path)
        config = PeftConfig.from_pretrained(tmp_path)
        assert type(config) is LoraConfig
        assert config.lora_dropout == 0.1
        adapted = get_peft_model(make_model(), config)
        assert lora_layers(adapted) == set(plan.modules)
        for name, module in plan.modules.items():
            layer = adapted.get_submodule("base_model.model." + name)
            assert layer.r["default"] == module.rank
            assert layer.lora_A["default"].weight.shape == (module.rank, module.d_in)
            assert layer.scaling["default"] == pytest.approx(alpha / 4, rel=1e-12)
        assert adapted.get_nb_trainable_parameters()[0] == plan.parameters

    def test_uniform_plan_needs_no_patterns(self, tiny_llama: PreTrainedModel) -> None:
        config = Lora(r=4, alpha=8).plan(find_targets(tiny_llama)).to_lora_config()
        assert (config.r, config.lora_alpha) == (4, 8)
        assert isinstance(config.lora_alpha, int)
        assert config.rank_pattern == config.alpha_pattern == {}

    def test_names_that_end_alike_keep_their_own_ranks(self) -> None:
        class Inner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q = nn.Linear(8, 8)
                self.x = nn.ModuleDict({"q": nn.Linear(8, 8), "aq": nn.Linear(8, 8)})

        ranks = {"q": 1, "x.q": 2, "x.aq": 3}
        modules = {name: ModulePlan(8, 8, rank) for name, rank in ranks.items()}
        plan = RankPlan("by hand", "lora", r_ref=5, alpha=10.0, budget=None, modules=modules)
        adapted = get_peft_model(Inner(), plan.to_lora_config())
        for name, rank in ranks.items():
            layer = adapted.get_submodule("base_model.model." + name)
            assert (layer.r["default"], layer.scaling["default"]) == (rank, 2.0)

    def test_blocks_cannot_be_expressed(self) -> None:
        with pytest.raises(PlanError, match="ralora plan has block-diagonal adapters"):
            small_plan().to_lora_config()
