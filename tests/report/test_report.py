"""The report: its numbers are the records', it asks the network for nothing, names stay text."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from rankwise.errors import FileError, RankwiseError
from rankwise.methods import Lora, RaLora
from rankwise.records import RunRecord
from rankwise.report import write_report
from rankwise.report.load import load_report
from report_samples import Page, make_profile, numbers, save_run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    profile = make_profile()
    return [
        save_run(tmp_path / "a", RaLora(r=4).plan(profile), profile),
        save_run(tmp_path / "b", Lora(r=4).plan(profile), None),
    ]


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
    shown = strings([v["figure"] for some in figures["plots"].values() for v in some]) + strings(
        [g["figure"] for g in figures["heatmaps"]]
    )
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
    assert ("plans" in ids, "serving" in ids) == (kind != "profile", kind != "profile")
    assert ("curve" in ids) == (kind == "profile")
    assert not {"convergence", "fisher", "updates", "stable-ranks"} & ids
    assert {"layers", "outside", "modules", "provenance"} <= ids
    views = [v["key"] for g in page.data("figures")["heatmaps"] for v in g["views"]]
    measured = ["gid", "directions", "stable_rank", "participation_ratio", "sensitivity"]
    assert views == {
        "profile": [*measured, "gradient_norm"],
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


@pytest.mark.parametrize(
    ("part", "name"), [("modules", "d_in"), ("provenance", "tokens"), ("plan", "budget")]
)
def test_numbers_that_no_float_holds_are_refused(part: str, name: str, tmp_path: Path) -> None:
    profile = make_profile(layers=1)
    profile.save(tmp_path / "profile")
    plan = Lora(r=2).plan(profile)
    plan.save(tmp_path / "plan.json")
    file = tmp_path / ("plan.json" if part == "plan" else "profile/profile.json")
    document = json.loads(file.read_text())
    place = document if part == "plan" else document[part]
    (next(iter(place.values())) if part == "modules" else place)[name] = 10**400
    file.write_text(json.dumps(document))
    path = file if part == "plan" else file.parent
    with pytest.raises(FileError, match=rf"{name} is beyond \d+; the file is broken"):
        write_report([path], tmp_path / "report.html")


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


def test_a_profile_without_any_gradient_still_makes_a_page(tmp_path: Path) -> None:
    profile = make_profile(more=True)
    dead = replace(
        profile,
        modules={n: replace(m, gradient_norm=0.0, fisher=0.0) for n, m in profile.modules.items()},
        singular_values={n: v * 0 for n, v in profile.singular_values.items()},
        gram={n: g * 0 for n, g in (profile.gram or {}).items()},
    )
    dead.save(tmp_path / "profile")
    write_report([tmp_path / "profile"], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert {"curve", "fisher"}.isdisjoint(page.data("figures")["plots"])
    assert "7 of 7" in page.text
