"""PiSSA, OLoRA and their like, whose factors belong to other weights than the base's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import rankwise as rw
from contracts import train_by_chance_
from rankwise.adapters.export import export_merged
from rankwise.adapters.factors import lora_factors
from rankwise.errors import ExportError, FileError, PlanError
from tiny_models import logits_of, tiny_llama, token_batch

CHANGING = ["pissa", "pissa_niter_4", "olora"]
BATCH = token_batch([9, 6])


def _adapted(init: Any) -> PeftModel:
    torch.manual_seed(0)
    base = tiny_llama()
    names = list(rw.find_targets(base))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=names, init_lora_weights=init))
    train_by_chance_(model)
    return model.eval()


@pytest.mark.parametrize("init", CHANGING)
class TestRefused:
    def test_loading(self, init: str, tmp_path: Path) -> None:
        _adapted(init).save_pretrained(tmp_path)
        base = tiny_llama()
        before = logits_of(base, BATCH)
        with pytest.raises(FileError, match=f"init_lora_weights='{init}' took a part"):
            rw.load_adapter(base, tmp_path)
        assert torch.equal(logits_of(base, BATCH), before)

    def test_plain_export(self, init: str, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match=rf"'{init}' took .* Export merged weights instead"):
            rw.export_lora(_adapted(init), tmp_path / "out", example=BATCH)
        assert not (tmp_path / "out").exists()

    def test_ranks_that_move(self, init: str) -> None:
        with pytest.raises(PlanError, match=f"'{init}' took .* its ranks cannot move"):
            lora_factors(_adapted(init))

    def test_merged_weights_are_right(self, init: str, tmp_path: Path) -> None:
        model = _adapted(init)
        export_merged(model, tmp_path / "out", example=BATCH)
        merged = type(model.get_base_model()).from_pretrained(tmp_path / "out")
        torch.testing.assert_close(
            logits_of(merged, BATCH), logits_of(model, BATCH), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_other_starts_load_and_export(init: Any, tmp_path: Path) -> None:
    model = _adapted(init)
    model.save_pretrained(tmp_path / "own")
    assert torch.equal(
        logits_of(rw.load_adapter(tiny_llama(), tmp_path / "own"), BATCH), logits_of(model, BATCH)
    )
    rw.export_lora(model, tmp_path / "out", example=BATCH)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    torch.testing.assert_close(
        logits_of(again, BATCH), logits_of(model, BATCH), rtol=1e-4, atol=1e-4
    )
    assert lora_factors(model)
