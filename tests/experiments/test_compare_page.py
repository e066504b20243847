"""docs/compare.md lists every key and every method, and its example is an experiment."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from pydantic import BaseModel

from rankwise.experiments.config import ExperimentConfig, make_experiment
from rankwise.experiments.methods import known_methods

PAGE = (Path(__file__).parents[2] / "docs/compare.md").read_text(encoding="utf-8")


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def test_the_example_is_an_experiment() -> None:
    block = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    document = yaml.safe_load(block[1])
    document["learning_rates"] = [float(rate) for rate in document["learning_rates"]]
    for scale, budgets in (("full", [4, 8]), ("small", [4])):
        assert make_experiment(document, scale=scale).budgets == budgets


def test_every_key_is_documented_with_its_default() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| ([^|]+) \|", PAGE, re.MULTILINE)
    assert {key for key, _ in rows} == set(_keys(ExperimentConfig))
    minimal = {
        "output": "o",
        "tasks": [{"kind": "completion", "model": "m", "train": "t", "test": "t"}],
        "methods": ["lora"],
        "budgets": [1],
        "seeds": [0],
        "learning_rates": [1e-3],
    }
    config = make_experiment(minimal)
    for key, default in rows:
        value: object = config
        for part in key.split("."):
            value = getattr(value, part)
        if default.startswith("`"):
            shown = "null" if value is None else str(value).lower()
            assert shown == default.strip("`"), key


def test_every_method_is_documented() -> None:
    section = PAGE.split("## Methods")[1].split("## Keys")[0]
    named = set(re.findall(r"`([\w+-]+)`", section))
    plain = [n for n in known_methods() if not n.endswith("-dynamic")]
    assert set(plain) <= named
