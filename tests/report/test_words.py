"""Numbers as words: sensible digits, and next steps that follow from what was measured."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.artifacts import SavedRun
from rankwise.methods import Lora, RaLora, WaterFill
from rankwise.report.load import SourceRun, report_of
from rankwise.report.words import next_step, percent, short, takeaway
from rankwise.training.config import load_config
from report_samples import make_profile, make_record


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (312.4, "312"),
        (31.24, "31.2"),
        (3.124, "3.12"),
        (99.96, "100"),
        (9.996, "10.0"),
        (0.5, "0.500"),
        (0.001234, "1.23e-03"),
        (12345.6, "12,346"),
        (5e9, "5.00e+09"),
    ],
)
def test_digits(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "100 %"), (0.5, "50.0 %"), (0.99984, "99.984 %"), (0.9999999, "99.999 %"), (0, "0.0 %")],
)
def test_a_share_is_whole_only_if_it_is(value: float, text: str) -> None:
    assert percent(value) == text


def test_many_plans_share_a_paragraph() -> None:
    profile = make_profile()
    plans = [Lora(r=4).plan(profile), RaLora(r=4).plan(profile), WaterFill(r=4).plan(profile)]
    assert len(takeaway(report_of(plans=plans[:2]))) == 2
    [words] = takeaway(report_of(plans=plans))
    assert words.startswith("3 plans of ")
    assert "lora 4; ralora 4 in up to" in words


def test_the_next_step_follows_from_the_profile() -> None:
    profile = make_profile()
    assert next_step(report_of(profiles=[profile]))[1].startswith("rankwise plan ")
    climbing = dict.fromkeys(profile.modules, torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    flat = dict.fromkeys(profile.modules, torch.tensor([3.9, 4.0, 4.0], dtype=torch.float64))
    growing, settled = (replace(profile, convergence=curve) for curve in (climbing, flat))
    assert "--batches 8 " in next_step(report_of(profiles=[growing]))[1]
    assert next_step(report_of(profiles=[settled]))[1].startswith("rankwise plan ")


DOCUMENT = {"model": "m", "output": "o", "data": {"train": "a.jsonl"}}


@pytest.mark.parametrize(
    ("config", "method", "next_method"),
    [
        ({"method": {"name": "lora", "r": 4}}, "lora", "ralora"),
        ({"method": {"name": "ralora", "n_max": 16}}, "ralora", "lora"),
        ({"method": {"name": "gard-dynamic"}, "dynamic": {"every": 5}}, "gard", "lora"),
        ({"adapter": {"kind": "lr-lora", "points": 50}}, "ralora, lr-lora", "lora"),
        ({"method": {}, "plan": "plan.json"}, "water-fill", "lora"),
        ({"method": {"name": "full"}}, "full", "ralora"),
    ],
)
def test_what_to_train_next_is_another_run_whatever_the_first_was(
    config: dict[str, Any], method: str, next_method: str, tmp_path: Path
) -> None:
    plan = Lora(r=4, alpha=8).plan(make_profile())
    changes: dict[str, Any] = {"ranks": {}, "blocks": {}} if method == "full" else {}
    record = make_record(plan, method=method, **changes)
    saved = [] if method == "full" else [plan]
    _, command = next_step(report_of(runs=[SourceRun(record, "a")], plans=saved))
    program, verb, file, *overrides = shlex.split(command)
    assert (program, verb, file) == ("rankwise", "train", "run.yaml")
    (tmp_path / file).write_text(json.dumps(DOCUMENT | config))
    found = load_config(tmp_path / file, overrides)
    assert found.method["name"] == next_method
    assert (found.adapter, found.dynamic, found.plan) == ({}, None, None)
    if method == "ralora, lr-lora":  # of a run's own plan, whose functions have parameters too
        saved_run = SavedRun(record, replace(plan, adapter="lr-lora"))
        _, command = next_step(report_of(runs=[SourceRun(record, "a")], plans=[saved_run]))
        assert "name: lora, r: 4, alpha: 8" in command
    if method != "full":
        assert (found.method["r"], found.method["alpha"]) == (4, 8)
