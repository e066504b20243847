from __future__ import annotations

from pathlib import Path

import pytest

from rankwise.errors import ConfigError
from rankwise.experiments.baselines import BASELINES
from rankwise.experiments.config import make_experiment
from rankwise.experiments.dry_run import NEEDS_WEIGHTS, dry_run, empty_model
from tiny_experiment import write_experiment
from tiny_models import bert_config, tiny_llama


def test_every_method_is_sized_without_weights(tmp_path: Path) -> None:
    methods = [*BASELINES, "ralora", "gard", "lr-lora", "melora", "full", "mora"]
    document = write_experiment(tmp_path, methods=methods, learning_rates=[1e-3, 1e-2])
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "train.jsonl").unlink()
    found = dry_run(make_experiment(document))
    plans = {plan.label: plan for plan in found.plans}
    assert set(plans) == set(methods)
    lora = plans["lora"]
    assert lora.size is not None and lora.size.parameters == lora.budget
    for name in {*BASELINES, "lr-lora", "melora"} - NEEDS_WEIGHTS:
        assert plans[name].built, name
    assert plans["ia3"].remark == "cannot be matched"
    assert plans["gard"].remark == "ranks by profile, at most the budget"
    assert plans["mora"].remark.startswith("not available")
    # all but mora: two seeds, and a search of two rates
    runnable = len(methods) - 1
    assert found.cells == runnable * 4
    assert found.steps == runnable * 4 * 4
    assert "14 targets" in str(found)


def test_configurations_can_be_given(tmp_path: Path) -> None:
    document = write_experiment(tmp_path, model="nobody/nothing")
    config = tiny_llama(num_hidden_layers=3).config
    found = dry_run(make_experiment(document), configs={"nobody/nothing": config})
    assert found.models["lines"][1] == 21
    task = {"name": "c", "kind": "classification", "train": "x", "test": "y", "labels": 5}
    spec = make_experiment(document | {"tasks": [task]}).make_tasks()[0]
    model = empty_model(spec.task, bert_config())
    assert model.classifier.weight.shape == (5, 16)
    assert model.classifier.weight.is_meta
    with pytest.raises(ConfigError, match="no configuration"):
        empty_model(make_experiment(document | {"model": str(tmp_path)}).make_tasks()[0].task)
