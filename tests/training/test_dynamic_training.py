"""`method: NAME-dynamic` and `dynamic:` in a run configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rankwise.adapters import load_adapter
from rankwise.adapters.factors import lora_factors
from rankwise.dynamic import DynamicOptions
from rankwise.errors import ConfigError
from rankwise.plan import RankPlan
from rankwise.training.config import validate
from rankwise.training.data import load_token_data
from rankwise.training.evaluate import held_out_loss
from rankwise.training.train import load_model, train
from tiny_folder import save_tiny_llama, write_texts


def document(folder: Path, **changes: object) -> dict[str, object]:
    save_tiny_llama(folder / "model")
    write_texts(folder / "train.jsonl")
    write_texts(folder / "held.jsonl", 5)
    settings: dict[str, object] = {
        "model": str(folder / "model"),
        "output": str(folder / "run"),
        "data": {"train": str(folder / "train.jsonl"), "held_out": str(folder / "held.jsonl")},
        "method": {"name": "water-fill-dynamic", "r": 2, "r_min": 1, "r_max": 6},
        "profile": {"batches": 1, "batch_size": 1},
        "dynamic": {"interval": 3, "window": 2},
        "training": {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "evaluate_every": 3},
    }
    return settings | changes


def test_a_dynamic_run_ends_as_plain_lora_with_its_events(tmp_path: Path) -> None:
    run = train(validate(document(tmp_path), "test"))
    assert run.events is not None and [event.step for event in run.events] == [3]
    assert any(move.before != move.after for event in run.events for move in event.moves)
    assert run.record.held_out[-1].loss < run.record.held_out[0].loss
    assert run.record.ranks == {name: m.rank for name, m in run.plan.modules.items()}
    assert run.record.trainable_parameters == run.plan.parameters <= run.plan.budget
    assert RankPlan.load(tmp_path / "run/plan.json") == run.plan
    events = json.loads((tmp_path / "run/rank_events.json").read_text())
    assert [event["step"] for event in events] == [3]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded = PeftModel.from_pretrained(base, tmp_path / "run/adapter").eval()
    assert {n: f.slots for n, f in lora_factors(loaded).items()} == run.record.ranks
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded(ids).logits, run.model.eval()(ids).logits)


def test_the_last_loss_is_that_of_the_saved_adapter(tmp_path: Path) -> None:
    """An event that is due at the last step would take rows that the loss still had."""
    settings = {"steps": 6, "batch_size": 4, "learning_rate": 0.05, "scheduler": "constant"}
    dynamic = {"interval": 6, "window": 2, "shrink_by": "norm"}
    config = validate(document(tmp_path, dynamic=dynamic, training=settings), "test")
    last = train(config).record.held_out[-1]
    model, tokenizer = load_model(config.model, config.dtype)
    loader = load_token_data(config.data, tokenizer, seed=0).held_out_loader(8)
    loaded = load_adapter(model, tmp_path / "run/adapter")
    assert last.step == 6
    assert held_out_loss(loaded, loader, step=6).loss == pytest.approx(last.loss, rel=1e-6)


def test_dynamic_is_a_name_or_a_section(tmp_path: Path) -> None:
    def options(**changes: object) -> DynamicOptions | None:
        return validate(document(tmp_path, **changes), "test").make_dynamic()

    gard = {"name": "gard"}
    assert options(method=gard, dynamic=None) is None
    assert options(method=gard, dynamic={}) == DynamicOptions()
    assert options(method={"name": "gard-dynamic"}, dynamic=None) == DynamicOptions()
    assert options(method=gard, dynamic={"beta": 0.5}) == DynamicOptions(beta=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dynamic": {"intervall": 3}},
            "dynamic.intervall: no such option; did you mean 'interval'",
        ),
        ({"dynamic": {"beta": 2}}, "beta=2 must be at least 0"),
        ({"dynamic": {"beta": "x"}}, "dynamic.beta='x': it should be a valid number"),
        ({"dynamic": {"floors": {"q_proj": "x"}}}, "dynamic.floors=.* valid integer"),
        ({"method": {"name": "ralora-dynamic"}}, "'ralora' cannot move ranks while training"),
        ({"method": {"name": "gord-dynamic"}}, "'gord' is not a method"),
    ],
)
def test_bad_options_are_found_before_anything_is_loaded(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(document(tmp_path, **changes), "test")
