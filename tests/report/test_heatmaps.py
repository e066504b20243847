"""Heatmaps: where modules stand, what is left blank, when a scale is logarithmic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from rankwise.methods import Lora
from rankwise.profiling.profile import GradientProfile
from rankwise.report.grid import Grid, paint
from rankwise.report.heatmaps import heatmap_groups
from rankwise.report.labels import kind_labels, plain
from rankwise.report.load import load_report, report_of
from rankwise.report.measures import Measure
from rankwise.report.words import short
from rankwise.spectra import effective_rank
from report_samples import make_profile


def test_a_zero_gradient_is_left_blank_and_said(tmp_path: Path) -> None:
    profile = make_profile(outside=False)
    first = next(iter(profile.modules))
    modules = {**profile.modules, first: replace(profile.modules[first], sensitivity=0.0)}
    spectra = {**profile.singular_values, first: torch.zeros(64, dtype=torch.float64)}
    GradientProfile(modules, spectra, profile.provenance).save(tmp_path / "profile")
    group = heatmap_groups(load_report([tmp_path / "profile"]))[0]
    sensitivity = next(view for view in group["views"] if view["key"] == "sensitivity")
    assert sensitivity["trace"]["z"][0][0] is None
    assert "1 modules of value 0" in sensitivity["reading"]
    gid = next(view for view in group["views"] if view["key"] == "gid")
    assert gid["trace"]["z"][0][0] == effective_rank(spectra[first]) == 0


def test_kind_labels_are_short_and_distinct() -> None:
    kinds = ["attn.q", "attn.out", "mlp.out", "out", "mlp.experts.0.up"]
    assert kind_labels(kinds) == ["q", "attn.out", "mlp.out", "out", "up"]


def test_plain_neutralises_what_plotly_reads() -> None:
    assert plain("a<b>c</b>&lt;") == "a&lt;b&gt;c&lt;/b&gt;&amp;lt;"


def test_a_wide_measure_turns_logarithmic() -> None:
    measure = Measure("rank", "Rank", "", "", short, wide=True)
    assert paint(measure, {"a": 1, "b": 15}) == (None, {"a": 1, "b": 15})
    assert paint(measure, {"a": 1, "b": 16, "c": 0, "d": None}) == (2, {"a": 0, "b": 4})


def test_a_module_without_adapter_is_a_blank_cell() -> None:
    profile = make_profile(outside=False)
    bare, *others = profile.modules
    plan = Lora(r=4).plan(profile)
    plan = replace(plan, modules={name: plan.modules[name] for name in others})
    whole, group = heatmap_groups(report_of(profiles=[profile], plans=[plan]))
    assert whole["figure"]["data"][0]["customdata"][0][0][0] == bare
    assert whole["figure"]["data"][0]["x"] == group["figure"]["data"][0]["x"]
    cells = [cell for row in group["figure"]["data"][0]["customdata"] for cell in row]
    assert cells[0] is None
    assert [cell[0] for cell in cells[1:]] == others
    for view in group["views"]:
        assert [z is None for row in view["trace"]["z"] for z in row] == [True] + [False] * 5


def test_two_stacks_keep_apart() -> None:
    names = ["model.vision.layers.0.q", "model.text.layers.0.q", "model.text.layers.1.q", "head"]
    grid = Grid.of(names)
    assert grid is not None
    assert grid.rows == ["vision 0", "text 0", "text 1"]
    assert grid.columns == ["q"]
    assert set(grid.at) == set(names[:3])
    assert Grid.of(["head"]) is None
