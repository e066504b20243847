"""LR-LoRA as plain LoRA: the best of its rank, the loss stated, refused above a tolerance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from contracts import train_by_chance_
from rankwise import (
    LrLoraConfig,
    RaLoraConfig,
    attach,
    export_truncated,
    find_targets,
    load_adapter,
)
from rankwise.adapters import LrLoraLinear
from rankwise.errors import ExportError, FileError
from rankwise.methods import Lora
from tiny_models import VOCABULARY, tiny_gpt2, tiny_llama

TOKENS = torch.arange(3, 19).reshape(2, 8) % VOCABULARY


def live_model(make=tiny_llama, **options) -> PeftModel:
    base = make()
    torch.manual_seed(1)
    model = attach(base, Lora(r=2).plan(find_targets(base)), adapter="lr-lora", **options)
    train_by_chance_(model)
    return model.eval()


def updates(model: PeftModel) -> dict[str, Tensor]:
    return {
        name: layer.delta_weight("default").detach().double()
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LrLoraLinear)
    }


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_rank_is_chosen_for_the_tolerance(make, tmp_path: Path) -> None:
    model = live_model(make)
    expected = updates(model)
    found = export_truncated(
        model, tmp_path / "out", tolerance=0.02, mode="compact", example={"input_ids": TOKENS}
    )
    assert found.errors.keys() == expected.keys()
    for name, update in expected.items():
        sigma = torch.linalg.svdvals(update)
        left = [float(sigma[k:].norm() / sigma.norm()) for k in range(len(sigma) + 1)]
        rank = next(k for k, error in enumerate(left) if error <= 0.02)
        assert found.exported.ranks[name] == max(1, rank)
        assert found.errors[name] == pytest.approx(left[max(1, rank)], rel=1e-3, abs=1e-6)
    stored = json.loads((tmp_path / "out/truncation.json").read_text())
    assert stored["modules"] == found.errors
    assert stored["error"] == max(found.errors.values()) <= 0.02
    assert stored["output_error"] == found.output_error
    assert f"off by up to {found.error:.2%}" in str(found)
    loaded = PeftModel.from_pretrained(make(), tmp_path / "out").eval()
    live, base = model(TOKENS).logits, make().eval()(TOKENS).logits
    off = (loaded(TOKENS).logits - live).abs().max() / (live - base).abs().max()
    assert found.output_error == pytest.approx(float(off.detach()), rel=0.05)
    assert updates(model).keys() == expected.keys(), "the live model is as it was"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "rankwise_export.json",
        "truncation.json",
    ]
    with pytest.raises(FileError, match="allow_other_base"):
        load_adapter(make(seed=5), tmp_path / "out")


def test_full_rank_loses_nothing(tmp_path: Path) -> None:
    model = live_model()
    found = export_truncated(model, tmp_path / "out", rank=10**6, tolerance=1e-5)
    assert found.error == 0 and found.output_error < 1e-4
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_too_large_an_error_is_refused(tmp_path: Path) -> None:
    model = live_model()
    with pytest.raises(
        ExportError, match=r"rank 1 leaves .* more than 1.00% in \d+ of \d+ modules"
    ):
        export_truncated(model, tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()
    found = export_truncated(model, tmp_path / "out", rank=1, tolerance=2.0)
    assert 0.01 < found.error < 1 and set(found.exported.ranks.values()) == {1}


def test_an_untrained_adapter_is_nothing(tmp_path: Path) -> None:
    base = tiny_llama()
    model = attach(base, Lora(r=2).plan(find_targets(base)), adapter="lr-lora")
    found = export_truncated(model, tmp_path / "out")
    assert found.error == found.output_error == 0 and set(found.exported.ranks.values()) == {1}


def test_whole_modules_come_along(tmp_path: Path) -> None:
    model = live_model(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(0.1)
    export_truncated(model, tmp_path / "out", rank=10**6)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-3)


def test_what_is_refused(tmp_path: Path) -> None:
    model = live_model()
    for options, match in (
        ({"rank": 0}, "rank=0 must be a whole number"),
        ({"tolerance": -1.0}, "tolerance=-1.0 must be a positive number"),
        ({"adapter": "other"}, "there are only default"),
    ):
        with pytest.raises(ExportError, match=match):
            export_truncated(model, tmp_path / "out", **options)
    model.merge_adapter()
    with pytest.raises(ExportError, match="merged into the base"):
        export_truncated(model, tmp_path / "out")
    ralora = get_peft_model(tiny_llama(), RaLoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ExportError, match="is no LR-LoRA; export_lora writes it"):
        export_truncated(ralora, tmp_path / "out")
    biased = get_peft_model(tiny_llama(), LrLoraConfig(target_modules=["q_proj"], bias="all"))
    with pytest.raises(ExportError, match="trained biases need merged weights"):
        export_truncated(biased, tmp_path / "out")
