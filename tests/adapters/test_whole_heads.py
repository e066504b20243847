"""Adapters beside a head that is trained whole and made of several layers, as RoBERTa's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import RobertaConfig, RobertaForSequenceClassification

import rankwise as rw
from contracts import train_by_chance_
from rankwise.adapters.export import export_merged
from rankwise.errors import FileError
from saved_adapters import edit_config
from tiny_models import bert_config, build, class_batch, logits_of, tiny_bert_classifier

BATCH = {key: value for key, value in class_batch([9, 6]).items() if key != "labels"}
ADAPTERS = ["lora", "ralora", "lr-lora"]


def _roberta() -> torch.nn.Module:
    options = bert_config().to_dict() | {"model_type": "roberta", "pad_token_id": 0}
    return build(RobertaForSequenceClassification, RobertaConfig(**options), 0)


def _adapted(base: torch.nn.Module, adapter: Any, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    plan = rw.Lora(r=2).plan({n: s for n, s in rw.find_targets(base).items() if "layer" in n})
    model = rw.attach(base, plan, adapter=adapter, task_type="SEQ_CLS", **options)
    train_by_chance_(model)
    return model.eval()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_it_is_merged_and_taken_off(adapter: str, tmp_path: Path) -> None:
    model = _adapted(_roberta(), adapter)
    expected = logits_of(model, BATCH)
    export_merged(model, tmp_path / "merged", example=BATCH)
    loaded = RobertaForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(loaded, BATCH), expected, rtol=1e-4, atol=1e-4)
    if adapter != "lr-lora":
        rw.export_lora(model, tmp_path / "lora", example=BATCH)
        again = PeftModel.from_pretrained(_roberta(), tmp_path / "lora")
        torch.testing.assert_close(logits_of(again, BATCH), expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, BATCH), expected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in merged.named_modules())


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("make", [_roberta, tiny_bert_classifier])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_it_loads_as_peft_saved_it(adapter: str, make: Any, bias: str, tmp_path: Path) -> None:
    model = _adapted(make(), adapter, bias=bias)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and parameter.requires_grad:
                parameter += 0.25
    model.save_pretrained(tmp_path)
    assert {"classifier", "score"} <= set(model.peft_config["default"].modules_to_save)
    loaded = rw.load_adapter(make(), tmp_path)
    assert torch.equal(logits_of(loaded, BATCH), logits_of(model, BATCH))


def test_a_head_that_nothing_is_named_by(tmp_path: Path) -> None:
    _adapted(_roberta(), "ralora").save_pretrained(tmp_path)
    edit_config(tmp_path, modules_to_save=["score"])
    with pytest.raises(FileError, match=r"modules_to_save=\['score'\]; no module ends so"):
        rw.load_adapter(_roberta(), tmp_path)
    edit_config(tmp_path, modules_to_save=["classifier", "scores"])
    with pytest.raises(FileError, match="modules_to_save has 'scores'; no module ends so"):
        rw.load_adapter(_roberta(), tmp_path)
