"""What needs no browser: the SVG, the model card, the notebook's HTML, the terminal's text."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rankwise.errors import FileError
from rankwise.methods import Lora, RaLora
from rankwise.report import write_report
from rankwise.report.grid import heat_sources
from rankwise.report.load import report_of
from rankwise.report.measures import PROFILE_MEASURES, telling_measure
from rankwise.report.svg import cividis, heatmap_svg
from report_samples import make_profile, save_adapter, save_run

_SVG = "{http://www.w3.org/2000/svg}"
_BAD = "<script>alert(1)</script>|`*[x](y)&lt;b&gt;"


def test_the_svg_has_a_cell_a_module_with_its_value() -> None:
    profile = make_profile(prefix=f"model.{_BAD}.layers", more=True)
    [source] = heat_sources(report_of(profiles=[profile]))
    for measure in PROFILE_MEASURES:
        drawn = heatmap_svg(source, measure)
        assert drawn is not None
        root = ElementTree.fromstring(drawn)
        cells = [e for e in root.iter(f"{_SVG}rect") if e.find(f"{_SVG}title") is not None]
        assert len(cells) == 6
        texts = {cell.findtext(f"{_SVG}title") for cell in cells}
        values = {n: getattr(m, measure.key) for n, m in source.view.modules.items()}
        expected = {
            f"{name}: {measure.label} {measure.show(value)}"
            for name, value in values.items()
            if "layers" in name
        }
        assert texts == expected
        assert {e.tag for e in root.iter()} == {
            f"{_SVG}{t}" for t in ("svg", "title", "rect", "g", "text")
        }


def test_the_colour_grows_with_the_value() -> None:
    profile = make_profile(outside=False)
    [source] = heat_sources(report_of(profiles=[profile]))
    drawn = heatmap_svg(source, PROFILE_MEASURES[0])
    assert drawn is not None
    highest = max(profile.gid, key=lambda name: profile.gid[name])
    lowest = min(profile.gid, key=lambda name: profile.gid[name])
    for cell in ElementTree.fromstring(drawn).iter(f"{_SVG}rect"):
        title = cell.findtext(f"{_SVG}title") or ""
        assert (cell.get("fill") == cividis(1) and bool(title)) == title.startswith(highest)
        assert (cell.get("fill") == cividis(0) and bool(title)) == title.startswith(lowest)


def test_a_card_names_files_that_exist_and_no_markup(tmp_path: Path) -> None:
    profile = make_profile(model=_BAD)
    plan = RaLora(r=4).plan(profile)
    run = save_run(tmp_path / "run", replace(plan, method="ralora"), profile, model=_BAD)
    save_adapter(run / "adapter", plan)
    write_report([run], tmp_path / "r.html", card=tmp_path / "card" / "c.md")
    card = (tmp_path / "card" / "c.md").read_text()
    drawings = sorted(path.name for path in (tmp_path / "card").glob("*.svg"))
    assert drawings == ["c-plan-1.svg", "c-profile-1.svg", "c-update-1.svg"]
    assert all(f"](<{name}>)" in card for name in drawings)
    assert "2.9000 → 2.8230" in card
    assert not any(markup in card for markup in ("<script>", "&lt;b", "[x]"))
    assert str(tmp_path) not in card
    with pytest.raises(FileError, match=r"\.md"):
        write_report([run], tmp_path / "r.html", card=tmp_path / "c.txt")


def test_the_terminal_hears_what_happened_and_what_to_look_at(tmp_path: Path) -> None:
    profile = make_profile()
    dropped = replace(profile, provenance=replace(profile.provenance, dropped_batches=[2]))
    run = save_run(tmp_path / "run", Lora(r=4).plan(profile), dropped)
    text = write_report([run], tmp_path / "r.html")
    assert "held-out loss went from 2.9000 to 2.8230" in text
    assert "look: gradients: dropped batches: 1 of 5." in text
    assert "rankwise train run.yaml" in text


def test_notebooks_show_profiles_and_plans() -> None:
    profile = make_profile(model=_BAD, more=True)
    plan = RaLora(r=4).plan(profile)
    for shown in (profile._repr_html_(), plan._repr_html_()):
        assert shown is not None
        assert shown.count("<svg") == 1
        assert "<script>" not in shown
        ElementTree.fromstring(f"<div>{shown}</div>")
    assert "GID" in str(profile._repr_html_())


def test_importing_the_package_neither_loads_plotly_nor_loses_the_notebook_form() -> None:
    code = (
        "import sys, rankwise; from rankwise.display import _renderers; "
        "print('plotly' in sys.modules, sorted(k.__name__ for k in _renderers))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == ["False", "['GradientProfile', 'RankPlan']\n"]


def test_the_telling_measure_shows_what_varies() -> None:
    profile = make_profile()
    keys = [
        telling_measure(source.view).key
        for source in heat_sources(
            report_of(
                profiles=[profile], plans=[RaLora(r=4).plan(profile), Lora(r=4).plan(profile)]
            )
        )
    ]
    assert keys == ["gid", "blocks", "rank"]
