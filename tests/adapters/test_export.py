"""Exports load in plain PEFT and compute what the live model computes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from contracts import OneLayer, inputs, train_by_chance_
from rankwise import ModulePlan, RankPlan, attach, export_lora, export_merged, find_targets
from rankwise.adapters import LrLoraConfig, RaLoraConfig, save_native
from rankwise.adapters.export import MODES, Mode
from rankwise.adapters.readers import (
    READERS,
    VLLM_RANKS,
    llama_cpp_scale,
    one_scale,
    peft_scale,
    readers_that_are_right,
    sglang_scale,
    vllm_max_rank,
)
from rankwise.allocation import dividing_blocks
from rankwise.errors import ExportError, FileError
from tiny_models import VOCABULARY, tiny_gpt2, tiny_llama

TOKENS = torch.arange(3, 19).reshape(2, 8) % VOCABULARY


def mixed_plan(model: nn.Module, **options: Any) -> RankPlan:
    """Ranks 1, 2, 3 and blocks 1, 2, 4 in turn."""
    modules = {
        name: ModulePlan(
            shape.d_in,
            shape.d_out,
            1 + i % 3,
            dividing_blocks((1, 2, 4)[i // 2 % 3], shape.d_in, shape.d_out),
        )
        for i, (name, shape) in enumerate(find_targets(model).items())
    }
    return RankPlan(
        "by hand", "ralora", r_ref=3, alpha=4.0, budget=None, modules=modules, **options
    )


def live_model(base: nn.Module, **options: Any) -> PeftModel:
    model = attach(base, mixed_plan(base), **options)
    train_by_chance_(model)
    return model.eval()


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


PLAIN = """
import sys
import torch
from safetensors.torch import load_file, save_file
sys.modules["rankwise"] = None  # importing it raises ImportError
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, folder = sys.argv[1:]
outputs = {}
for mode in ("padded", "compact", "vllm"):
    fresh = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(fresh, f"{folder}/{mode}")
    with torch.no_grad():
        outputs[mode] = model.eval()(load_file(f"{folder}/tokens.safetensors")["tokens"]).logits
try:
    import rankwise
except ImportError:
    save_file(outputs, f"{folder}/outputs.safetensors")
"""


def test_plain_peft_without_rankwise_gives_the_live_models_logits(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = live_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    for mode in MODES:
        export_lora(model, tmp_path / mode, mode=mode)
    save_file({"tokens": TOKENS}, tmp_path / "tokens.safetensors")
    process = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, str(tmp_path / "base"), str(tmp_path)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    found = load_file(tmp_path / "outputs.safetensors")
    live = logits(model)
    assert set(found) == set(MODES)
    for output in found.values():
        assert_close(output, live)
    assert not torch.allclose(live, logits(tiny_llama()), rtol=1e-2)


def saved_scales(folder: Path, rule: Any) -> dict[str, Tensor]:
    """Module -> scale B A as a reader would have it, from the files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    deltas = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            deltas[module] = rule(config, module, a.shape[0]) * (b @ a)
    return deltas


def live_deltas(model: PeftModel) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model."): layer.delta_weight("default")
        for name, layer in model.named_modules()
        if hasattr(layer, "delta_weight")
    }


class TestReaders:
    """What each program would compute from the files alone."""

    @pytest.mark.parametrize("mode", MODES)
    def test_updates_are_the_live_ones(self, mode: Mode, tmp_path: Path) -> None:
        model = live_model(tiny_llama())
        exported = export_lora(model, tmp_path / "out", mode=mode)
        expected = live_deltas(model)
        for reader, rule in READERS.items():
            found = saved_scales(tmp_path / "out", rule)
            assert found.keys() == expected.keys()
            right = all(
                torch.allclose(found[name], delta, rtol=1e-5, atol=1e-6)
                for name, delta in expected.items()
            )
            assert right == (mode != "compact" or reader not in ("llama.cpp", "SGLang"))
            assert right == (reader in exported.readers)

    def test_rules_disagree_where_ranks_differ(self) -> None:
        """So that an export which left alpha as it was would be found out."""
        config = {"r": 8, "lora_alpha": 16, "rank_pattern": {"^a.q": 4}, "alpha_pattern": {"q": 6}}
        assert peft_scale(config, "a.q", 4) == 6 / 4
        assert peft_scale(config, "a.k", 4) == 16 / 8
        assert one_scale(config, "a.q", 4) == 16 / 8
        assert llama_cpp_scale(config, "a.q", 4) == 16 / 4
        assert one_scale(config | {"use_rslora": True}, "a.q", 4) == 16 / 8**0.5
        named = config | {"target_modules": ["q", "k"]}
        assert sglang_scale(named, "a.k", 8) == 16 / 8
        assert math.isnan(sglang_scale(named, "a.q", 4)), "its slot has rows for rank 8"
        assert math.isnan(sglang_scale(config | {"target_modules": "a.(q|k)"}, "a.k", 8))
        assert readers_that_are_right(config, {"a.q": 4}, {"a.q": 4.0}) == ["llama.cpp"]

    def test_pefts_rule_is_pefts(self) -> None:
        config = LoraConfig(
            r=8,
            lora_alpha=12,
            target_modules=["0", "1"],
            rank_pattern={"^0": 4},
            alpha_pattern={"^0": 7},
        )
        layers = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        model = get_peft_model(layers, config).base_model.model
        for name, rank in (("0", 4), ("1", 8)):
            assert model.get_submodule(name).scaling["default"] == peft_scale(
                config.to_dict(), name, rank
            )

    @pytest.mark.parametrize(
        ("rank", "allowed"), [(1, 1), (2, 8), (20, 32), (257, 320), (513, None)]
    )
    def test_vllms_ranks(self, rank: int, allowed: int | None) -> None:
        assert vllm_max_rank(rank) == allowed


class TestModes:
    def test_padded_has_one_rank_and_no_patterns(self, tmp_path: Path) -> None:
        exported = export_lora(live_model(tiny_llama()), tmp_path / "out")
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == max(exported.ranks.values()) == 12
        assert set(exported.ranks.values()) == {12}
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
        assert exported.error < 5e-6  # 3e-6 where the BLAS has eight lanes

    def test_compact_has_each_modules_own_rank(self, tmp_path: Path) -> None:
        model = live_model(tiny_llama())
        exported = export_lora(model, tmp_path / "out", mode="compact")
        plan = mixed_plan(tiny_llama())
        assert exported.ranks == {n: m.rank * m.blocks for n, m in plan.modules.items()}

    def test_vllm_says_what_to_pass(self, tmp_path: Path) -> None:
        exported = export_lora(live_model(tiny_llama()), tmp_path / "out", mode="vllm")
        assert exported.vllm_rank == 16
        assert "--max-lora-rank 16 --lora-modules" in str(exported)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["r"] in VLLM_RANKS

    def test_vllm_refuses_what_it_cannot_serve(self, tmp_path: Path) -> None:
        large = get_peft_model(OneLayer(), RaLoraConfig(r=32, blocks=32, target_modules=["layer"]))
        with pytest.raises(ExportError, match="rank 1024 is over vLLM's largest, 512"):
            export_lora(large, tmp_path / "out", mode="vllm", example={"x": inputs()})
        whole = live_model(tiny_llama(), modules_to_save=["lm_head"])
        with pytest.raises(ExportError, match=r"vLLM loads no .*lm_head"):
            export_lora(whole, tmp_path / "out", mode="vllm")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("mode", MODES)
    def test_conv1d(self, mode: Mode, tmp_path: Path) -> None:
        model = live_model(tiny_gpt2())
        export_lora(model, tmp_path / "out", mode=mode)
        loaded = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "out")
        assert_close(logits(loaded), logits(model))

    @pytest.mark.parametrize("bias", ["all", "ralora_only"])
    def test_biases_and_whole_modules_travel(self, bias: str, tmp_path: Path) -> None:
        model = live_model(tiny_gpt2(), modules_to_save=["ln_f"], bias=bias)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1
        export_lora(model, tmp_path / "out")
        loaded = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "out")
        assert_close(logits(loaded), logits(model))

    def test_pefts_own_lora_with_mixed_ranks(self, tmp_path: Path) -> None:
        config = LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules="all-linear",
            rank_pattern={"q_proj": 2},
            use_rslora=True,
            init_lora_weights=False,
        )
        model = get_peft_model(tiny_llama(), config)
        exported = export_lora(model, tmp_path / "out")
        assert exported.readers == tuple(READERS)
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
        assert_close(logits(loaded), logits(model))

    @pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
    def test_what_is_no_plain_lora_is_refused(
        self, options: dict[str, Any], tmp_path: Path
    ) -> None:
        base = tiny_llama(attention_bias=True)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], **options))
        with pytest.raises(ExportError, match=r"q_proj cannot be exported as plain LoRA: adapter"):
            export_lora(model, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_other_arguments_are_checked(self, tmp_path: Path) -> None:
        model = live_model(tiny_llama())
        with pytest.raises(ExportError, match="mode='zip' must be one of 'padded'"):
            export_lora(model, tmp_path / "out", mode="zip")  # type: ignore[arg-type]
        with pytest.raises(ExportError, match="there are only default"):
            export_lora(model, tmp_path / "out", adapter="other")
        with pytest.raises(ExportError, match="pass the model of attach"):
            export_lora(tiny_llama(), tmp_path / "out")  # type: ignore[arg-type]
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("")
        with pytest.raises(FileError, match="is not replaced"):
            export_lora(model, tmp_path / "mine")
        model.merge_adapter()
        with pytest.raises(ExportError, match="unmerge_adapter"):
            export_lora(model, tmp_path / "out")

    def test_a_model_without_vocabulary_needs_an_example(self, tmp_path: Path) -> None:
        model = get_peft_model(
            OneLayer(), RaLoraConfig(r=2, blocks=4, target_modules=["layer"], init_weights=False)
        )
        with pytest.raises(ExportError, match="pass example="):
            export_lora(model, tmp_path / "out")
        export_lora(model, tmp_path / "out", example={"x": inputs()})
        loaded = PeftModel.from_pretrained(OneLayer(), tmp_path / "out")
        assert_close(loaded(inputs()), model(inputs()))


class TestSafety:
    @pytest.mark.parametrize("training", [True, False])
    def test_the_live_model_stays_as_it_was(self, training: bool, tmp_path: Path) -> None:
        model = live_model(tiny_llama()).train(training)
        model.add_adapter("other", RaLoraConfig(r=2, target_modules=["q_proj"]))
        train_by_chance_(model, "other")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainable = [p.requires_grad for p in model.parameters()]
        random = torch.get_rng_state()
        export_lora(model, tmp_path / "out", adapter="other", mode="compact")
        assert torch.equal(random, torch.get_rng_state())
        assert model.active_adapters == ["default"]
        assert model.training == training
        assert [p.requires_grad for p in model.parameters()] == trainable
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
        model.set_adapter("other")
        assert_close(logits(loaded), logits(model))

    def test_nothing_is_written_when_the_outputs_differ(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        model = live_model(tiny_llama())
        export_lora(model, tmp_path / "out")
        before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()

        def forgets_the_scale(tensors: dict[str, Tensor], *args: Any, **options: Any) -> None:
            halved = {n: t / 2 if "lora_B" in n else t for n, t in tensors.items()}
            save_file(halved, *args, **options)

        monkeypatch.setattr("rankwise.adapters.export.save_file", forgets_the_scale)
        with pytest.raises(ExportError, match="differ from the live model's by"):
            export_lora(model, tmp_path / "out")
        with pytest.raises(ExportError, match="nothing was written"):
            export_lora(model, tmp_path / "new")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before


class TestMerged:
    @pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
    def test_it_is_a_transformers_folder(self, base: Any, tmp_path: Path) -> None:
        model = live_model(base())
        exported = export_merged(model, tmp_path / "out")
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert_close(logits(loaded), logits(model))
        assert exported.error <= 1e-5
        assert str(exported).startswith(f"merged export: {tmp_path / 'out'}")

    def test_broken_adapters_are_refused(self, tmp_path: Path) -> None:
        model = live_model(tiny_llama())
        next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)
        with pytest.raises(ValueError, match="non-finite"):
            export_merged(model, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_nothing_is_written_when_the_outputs_differ(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        model = live_model(tiny_llama())
        kind = type(model.get_base_model())
        save = kind.save_pretrained

        def damaged(self: PreTrainedModel, folder: str, **options: Any) -> None:
            with torch.no_grad():
                self.get_submodule("model.layers.0.mlp.down_proj").weight.mul_(0.5)
            save(self, folder, **options)

        monkeypatch.setattr(kind, "save_pretrained", damaged)
        with pytest.raises(ExportError, match="outputs of the merged model differ from the live"):
            export_merged(model, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


class TestNative:
    @pytest.mark.parametrize("adapter", ["default", "other"])
    def test_dual_layout(self, adapter: str, tmp_path: Path) -> None:
        model = live_model(tiny_llama(), adapter_name=adapter)
        train_by_chance_(model, adapter)
        export_lora(model, tmp_path / "out", native=True)
        for folder in ("out", "out/native"):
            loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / folder)
            assert_close(logits(loaded), logits(model))
        saved = load_file(tmp_path / "out" / "native" / "adapter_model.safetensors")
        assert {tensor.dim() for tensor in saved.values()} == {3}
        assert "native/" in (tmp_path / "out" / "README.md").read_text()

    @pytest.mark.parametrize(
        ("config", "says"),
        [
            (LoraConfig(target_modules=["q_proj"]), "alpha_pattern"),
            (LrLoraConfig(target_modules=["q_proj"]), "rankwise.load_adapter"),
            (LoraConfig(target_modules=["q_proj"]), "AutoModelForCausalLM.from_pretrained"),
            (
                RaLoraConfig(target_modules=["q_proj"], task_type="FEATURE_EXTRACTION"),
                "AutoModel.from_pretrained",
            ),
        ],
    )
    def test_cards_of_other_kinds(self, config: Any, says: str, tmp_path: Path) -> None:
        save_native(get_peft_model(tiny_llama(), config), tmp_path / "native")
        card = (tmp_path / "native" / "README.md").read_text()
        assert says in card
        assert "folded" not in card

    @pytest.mark.parametrize("options", [{}, {"scaling": "paper", "rank_scaling": "sqrt_r"}])
    def test_the_cards_recipe_without_rankwise(
        self, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = live_model(tiny_llama(), **options)
        save_native(model, tmp_path / "this-folder")
        card = (tmp_path / "this-folder" / "README.md").read_text()
        (recipe,) = (part for part in card.split("```") if "block_diag" in part)
        base = tiny_llama()
        monkeypatch.chdir(tmp_path)
        exec(recipe.removeprefix("python"), {"base": base})
        assert_close(logits(base), logits(model))
