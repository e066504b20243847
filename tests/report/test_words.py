"""Numbers as words: sensible digits, and next steps that follow from what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rankwise.methods import Lora, RaLora, WaterFill
from rankwise.report.load import report_of
from rankwise.report.words import next_step, percent, short, takeaway
from report_samples import make_profile


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
