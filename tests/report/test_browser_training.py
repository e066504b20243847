"""Views of training and of comparisons in a real Chromium; `conftest.py` finds it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from page_samples import Shown
from rankwise.methods import Lora, RaLora
from rankwise.report import write_report
from report_samples import make_profile, save_adapter, save_run
from training_samples import (
    make_analysis,
    make_results,
    save_events,
    save_landscape,
    save_lr_adapter,
    save_tracking,
)

HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>&lt;b&gt;%{z}"
NEW = ("history", "tracking", "functions", "learned", "landscape")


def make_page(folder: Path, prefix: str = "model.layers", layers: int = 2) -> Path:
    plan = Lora(r=4).plan(profile := make_profile(prefix=prefix, layers=layers))
    run = save_run(folder / "run", plan, profile)
    names = list(plan.modules)
    save_lr_adapter(run / "adapter", plan)
    save_tracking(run, names)
    save_events(run, plan)
    save_landscape(run)
    (run / "analysis.json").write_text(json.dumps(make_analysis(names)), encoding="utf-8")
    write_report([run], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_page(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def page(browser: Any, path: Path) -> Iterator[Any]:
    """The page of `path`, which most tests share because it takes a second to draw."""
    shown = Shown(browser, path)
    yield shown.page
    shown.close()


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1600, "light")])
def test_every_variant_has_marks_titles_and_fits(page: Any, width: int, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_timeout(400)
    for plot in NEW:
        radios = page.locator(f'input[name="plot-{plot}"]')
        readings = set()
        for i in range(max(1, radios.count())):
            if radios.count():
                radios.nth(i).check(force=True)
            place = f'[data-plot="{plot}"]'
            marks = page.locator(
                f"{place} :is(.scatterlayer .trace path, .heatmaplayer image, .contourlayer path)"
            )
            assert marks.count() > 0, (plot, i)
            for title in (".xtitle", ":is(.ytitle, .y2title)"):
                assert page.locator(f"{place} {title}").count() >= 1, (plot, i)
            readings.add(page.locator(f'[data-reading="{plot}"]').inner_text())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert all(reading.endswith(".") for reading in readings), plot
    assert page.locator('[data-plot="functions"] .barlayer .point').count() == 3
    assert page.locator('[data-plot="functions"] .y2title').count() == 1


def test_switches_draw_the_json(page: Any, path: Path) -> None:
    [run] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["runs"]
    labels = {"stable rank": "stable_rank", "gradient norm": "gradient_norm"}
    for label, key in labels.items():
        page.locator('[for], label:has(input[name="plot-tracking"])').filter(
            has_text=label
        ).first.click()
        drawn = page.evaluate(
            "document.querySelector('[data-plot=tracking]').data.map(trace => trace.y)"
        )
        assert drawn == [values[key] for values in run["tracking"]["modules"].values()]
    shapes = "document.querySelector('[data-plot=tracking]').layout.shapes.map(s => s.x0)"
    assert page.evaluate(shapes) == [3, 7]
    colors = page.evaluate(
        "document.querySelector('[data-plot=tracking]').layout.shapes.map(s => s.line.color)"
    )
    assert all(color.startswith("#") for color in colors)
    z = page.evaluate("document.querySelector('[data-plot=landscape]').data[0].z")
    assert z == run["landscape"]["loss"]
    events = "document.querySelector('[data-plot=loss]').data.filter(t => t.meta.part === 'events')"
    assert page.evaluate(f"{events}[0].x") == [3, 7]
    # the learned update has as many singular values as the layer's smaller side
    drawn = page.evaluate("document.getElementById('update-plot').data[0].x.at(-1)")
    assert drawn == 64
    facts = page.locator("#detail-facts").inner_text()
    assert "condition number" in facts and "directions above 1e-6" in facts


def test_names_with_markup_appear_as_text(tmp_path: Path, show: Callable[..., Any]) -> None:
    name = HOSTILE.replace(".", "")
    page = show(make_page(tmp_path, prefix=f"model.{name}.layers", layers=1))
    assert page.locator("img").count() == 0
    switch = page.locator('label:has(input[name="plot-functions"])').first
    assert f"model.{name}.layers.0.attn.q_proj" in switch.inner_text()
    page.locator('input[name="plot-history"]').nth(1).check(force=True)
    page.locator('[data-plot="history"]').hover(position={"x": 300, "y": 120})
    page.wait_for_selector('[data-plot="history"] .hoverlayer .hovertext')
    assert "<img src=x" in page.locator('[data-plot="history"] .hoverlayer').text_content()


def test_an_adapter_alone_shows_its_blocks(tmp_path: Path, show: Callable[..., Any]) -> None:
    plan = RaLora(r=4).plan(make_profile())
    save_adapter(tmp_path / "adapter", plan)
    write_report([tmp_path / "adapter"], tmp_path / "page.html")
    page = show(tmp_path / "page.html")
    name = page.locator("#detail-name").inner_text()
    assert page.locator("#detail-blocks rect.block").count() == plan.modules[name].blocks > 1


def test_a_comparison_alone(tmp_path: Path, show: Callable[..., Any]) -> None:
    labels = ("RaLoRA", HOSTILE, *(f"method {i}" for i in range(20)))
    (tmp_path / "results.json").write_text(json.dumps(make_results(labels)), encoding="utf-8")
    write_report([tmp_path], tmp_path / "page.html")
    page = show(tmp_path / "page.html")
    assert page.locator("h1").inner_text() == "small comparison"
    assert page.locator("#comparison-0 table").count() == 4
    assert HOSTILE in page.locator("#comparison-0 tbody").first.inner_text()
    assert page.locator('[data-plot="methods"] .scatterlayer .point').count() > 9
    bars = page.locator('[data-plot="parameters"] .errorbar')
    assert bars.count() == 2 * 23
    looks = page.evaluate(
        """document.querySelector('[data-plot=parameters]').data
        .map(trace => trace.line.color + trace.marker.symbol)"""
    )
    assert len(set(looks)) == 23
    for width in (400, 1600):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
