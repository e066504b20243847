"""The report: its numbers are the records', it asks the network for nothing, names stay text."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plotly.offline import get_plotlyjs

from rankwise.errors import FileError, RankwiseError
from rankwise.methods import Lora, RaLora
from rankwise.plan import RankPlan
from rankwise.profiling.profile import GradientProfile
from rankwise.records import RunRecord
from rankwise.report import write_report
from rankwise.report.figures import heatmap_groups, kind_labels, plain
from rankwise.report.load import load_report
from rankwise.report.words import short
from rankwise.spectra import effective_rank
from report_samples import Page, make_profile, numbers, save_run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    profile = make_profile()
    return [
        save_run(tmp_path / "a", RaLora(r=4).plan(profile), profile),
        save_run(tmp_path / "b", Lora(r=4).plan(profile), None),
    ]


def test_every_number_is_the_records(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out" / "report.html"
    write_report(runs, out)
    page = Page(out)
    saved = json.loads((out.parent / "report.json").read_text(encoding="utf-8"))
    assert page.data("report") == saved
    assert saved["schema_version"] == 1

    for run, folder in zip(saved["runs"], runs, strict=True):
        record = RunRecord.load(folder / "record.json")
        assert run["trainable_parameters"] == record.trainable_parameters
        assert [(p["step"], p["loss"], p["perplexity"], p["tokens"]) for p in run["held_out"]] == [
            (p.step, p.loss, p.perplexity, p.tokens) for p in record.held_out
        ]
        assert [(p["step"], p["loss"]) for p in run["train_loss"]] == [
            (p.step, p.loss) for p in record.train_loss
        ]
        assert run["seconds"] == record.seconds
        assert run["peak_memory_mib"] == record.peak_memory_mib
        assert run["blocks"]["max"] == max(record.blocks.values())
    for plan, folder in zip(saved["plans"], runs, strict=True):
        modules = RankPlan.load(folder / "plan.json").modules
        assert {
            n: (m["rank"], m["blocks"], m["parameters"]) for n, m in plan["modules"].items()
        } == {n: (m.rank, m.blocks, m.parameters) for n, m in modules.items()}
    profile = GradientProfile.load(runs[0] / "profile")
    assert {n: m["gid"] for n, m in saved["profiles"][0]["modules"].items()} == profile.gid

    known = numbers(saved)
    assert page.values
    assert set(page.values) <= known

    figures = page.data("figures")
    drawn = {(t["name"], t["meta"]["part"]): t for t in figures["losses"]["data"]}
    for run in saved["runs"]:
        for part, key in (("training", "train_loss"), ("held-out", "held_out")):
            trace = drawn[f"{run['label']}: {part}", part]
            assert trace["x"] == [p["step"] for p in run[key]]
            assert trace["y"] == [p["loss"] for p in run[key]]
    sources = [*saved["profiles"], *saved["plans"]]
    assert len(figures["heatmaps"]) == len(sources) == 3
    for group, source in zip(figures["heatmaps"], sources, strict=True):
        grid = group["figure"]["data"][0]["customdata"]
        assert group["views"]
        for view in group["views"]:
            base = {"sensitivity": 10, "blocks": 2}.get(view["key"])
            cells = {
                cell[0]: z
                for names, row in zip(grid, view["trace"]["z"], strict=True)
                for cell, z in zip(names, row, strict=True)
            }
            assert len(cells) == 6
            for name, z in cells.items():
                value = source["modules"][name][view["key"]]
                assert (z if base is None else base**z) == pytest.approx(value, rel=1e-12)


def test_the_page_is_self_contained(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_report(runs, out)
    page = Page(out)
    assert page.source.count(get_plotlyjs()) == 1
    ours = page.source.replace(get_plotlyjs(), "")
    for loader in ("http:", "https:", "url(", "@import", "fetch(", "XMLHttpRequest", "import("):
        assert loader not in ours
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert not any({"src", "href", "srcset"} & attrs.keys() for _, attrs in page.tags)
    policies = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert policies
    assert policies[0] is not None
    assert policies[0].startswith("default-src 'none'")
    assert "showSendToCloud: false" in ours
    assert str(tmp_path) not in ours
    assert "secret/place" not in ours


HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<!--<script>",
    '"><img src=x onerror=alert(3)>',
    "<a href='javascript:alert(4)'>b</a>%{z}",
    "&lt;script&gt;",
)


def test_names_with_markup_stay_text(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    bad = "".join(HOSTILE)
    profile = make_profile(prefix=f"model.{bad.replace('.', '')}.layers", model=bad)
    plan = replace(RaLora(r=4).plan(profile), method=bad)
    folder = save_run(
        tmp_path / "run",
        plan,
        profile,
        model=bad,
        versions={bad: bad},
        hardware={bad: bad, "processor": bad},
        commit=bad,
        data={bad: {"fingerprint": bad}},
    )
    write_report([folder], out)
    page = Page(out)
    ours = page.source.replace(get_plotlyjs(), "")
    assert len(page.raw) == len(re.findall("<script", ours)) + 1 == 6
    assert "alert(1)</script>" not in ours
    assert "<!--" not in ours
    assert not {"img", "a"} & {tag for tag, _ in page.tags}
    assert bad in page.text
    assert page.data("report")["runs"][0]["method"] == bad

    def strings(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [s for key, item in value.items() for s in strings(item) if key != "template"]
        if isinstance(value, list):
            return [s for item in value for s in strings(item)]
        return [value] if isinstance(value, str) else []

    figures = page.data("figures")
    shown = strings(figures["losses"]) + strings([g["figure"] for g in figures["heatmaps"]])
    tags = {tag for text in shown for tag in re.findall(r"<[^>]*>", text)}
    assert tags <= {"<br>", "<extra>", "</extra>"}


@pytest.mark.parametrize("kind", ["profile", "plan", "run", "record"])
def test_each_kind_alone(kind: str, tmp_path: Path) -> None:
    profile = make_profile()
    plan = RaLora(r=4).plan(profile)
    folder = save_run(tmp_path / "run", plan, None)
    profile.save(tmp_path / "profile")
    paths = {
        "profile": tmp_path / "profile",
        "plan": folder / "plan.json",
        "run": folder,
        "record": folder / "record.json",
    }
    out = tmp_path / "page.html"
    write_report([paths[kind]], out)
    page = Page(out)
    ids = {attrs.get("id") for tag, attrs in page.tags if tag == "section"}
    has_run = kind in ("run", "record")
    assert ("runs" in ids, "loss" in ids) == (has_run, has_run)
    assert {"layers", "outside", "modules", "provenance"} <= ids
    views = [v["key"] for g in page.data("figures")["heatmaps"] for v in g["views"]]
    assert views == {
        "profile": ["gid", "stable_rank", "sensitivity"],
        "record": ["rank", "blocks"],
    }.get(kind, ["rank", "blocks", "parameters"])
    assert set(page.values) <= numbers(json.loads(out.with_suffix(".json").read_text()))


@pytest.mark.parametrize("content", [None, "folder", "not json", "[]", '{"a": 1}', "[" * 100_000])
def test_unknown_paths_are_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "thing"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    out = tmp_path / "report.html"
    with pytest.raises(FileError, match="thing"):
        write_report([path], out)
    assert not out.exists()
    assert not out.with_suffix(".json").exists()


def test_no_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="at least one"):
        write_report([], tmp_path / "report.html")


def test_a_json_file_of_another_kind_is_never_replaced(runs: list[Path]) -> None:
    before = (runs[0] / "record.json").read_bytes()
    with pytest.raises(FileError, match="choose another name"):
        write_report(runs, runs[0] / "record.html")
    assert (runs[0] / "record.json").read_bytes() == before
    assert not (runs[0] / "record.html").exists()
    with pytest.raises(FileError, match=r"\.html"):
        write_report(runs, runs[0] / "record.json")
    write_report(runs, runs[0] / "report.html")
    write_report(runs[:1], runs[0] / "report.html")
    assert len(json.loads((runs[0] / "report.json").read_text())["runs"]) == 1


def test_without_plotly_the_remedy_is_named(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.startswith("rankwise.report.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(RankwiseError, match=r"pip install 'rankwise\[report\]'"):
        write_report(runs, tmp_path / "report.html")


def test_two_thousand_modules_are_quick_and_small(tmp_path: Path) -> None:
    profile = make_profile(layers=667)
    assert len(profile.modules) == 2002
    folder = save_run(tmp_path / "run", RaLora(r=4).plan(profile), profile)
    out = tmp_path / "report.html"
    started = time.perf_counter()
    write_report([folder], out)
    assert time.perf_counter() - started < 10
    assert out.stat().st_size < 12_000_000


def test_the_words_claim_no_winner_from_single_seeds(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_report(runs, out)
    text = Page(out).text
    assert "not to say which method is better" in text
    other = replace(
        RunRecord.load(runs[1] / "record.json"), data={"held_out": {"fingerprint": "0"}}
    )
    other.save(runs[1] / "record.json")
    write_report(runs, out)
    assert "held-out text differs" in Page(out).text


def test_equal_plans_and_profiles_appear_once_and_labels_differ(tmp_path: Path) -> None:
    profile = make_profile()
    plan = RaLora(r=4).plan(profile)
    folders = [save_run(tmp_path / f"s{seed}", plan, profile, seed=seed) for seed in (0, 1)]
    twin = save_run(tmp_path / "twin", plan, profile, seed=0)
    report = load_report([*folders, twin])
    assert [run.label for run in report.runs] == [
        "ralora, seed 0, s0",
        "ralora, seed 1",
        "ralora, seed 0, twin",
    ]
    assert (len(report.profiles), len(report.plans)) == (1, 1)


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


def test_plain_neutralises_what_plotly_reads() -> None:
    assert plain("a<b>c</b>&lt;") == "a&lt;b&gt;c&lt;/b&gt;&amp;lt;"
