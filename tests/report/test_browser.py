"""The page in a real Chromium: it loads clean, draws everything, and answers clicks and keys.

`conftest.py` finds the browser.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from page_samples import Shown
from rankwise.methods import LsLora, RaLora
from rankwise.report import write_report
from rankwise.report.words import percent, scientific, short
from report_samples import make_profile, save_adapter, save_run

HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>&lt;b&gt;%{z}"


def make_page(folder: Path, prefix: str = "model.layers", name: str = "tiny", **size: Any) -> Path:
    profile = make_profile(prefix=prefix, model=name, more=True, **size)
    plan = RaLora(r=4).plan(profile)
    run = save_run(folder / "run", plan, profile, model=name)
    save_adapter(run / "adapter", plan)
    LsLora(r=4).plan(profile).save(folder / "ls.json")
    write_report([run, folder / "ls.json"], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_page(tmp_path_factory.mktemp("page"), layers=3, size=2)


@pytest.fixture(scope="module")
def page(browser: Any, path: Path) -> Iterator[Any]:
    """The page of `path`, which most tests share because it takes a second to draw."""
    shown = Shown(browser, path)
    yield shown.page
    shown.close()


def document(path: Path) -> Any:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def shown_numbers(page: Any) -> list[float]:
    values = page.eval_on_selector_all("#detail-facts data", "all => all.map(d => d.value)")
    return [float(value) for value in values]


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1600, "light")])
def test_every_view_has_marks_and_fits(page: Any, width: int, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    fits = (
        "[...document.querySelectorAll('[data-plot]')]"
        ".every(plot => plot._fullLayout.width === plot.clientWidth)"
    )
    # not wait_for_function: it polls from inside the page, whose policy forbids that
    for _ in range(300):
        if page.evaluate(fits):
            break
        page.wait_for_timeout(50)
    assert page.evaluate(fits)
    plots = page.eval_on_selector_all("[data-plot]", "all => all.map(p => p.dataset.plot)")
    assert set(plots) == {
        "loss", "ranks", "histogram", "curve", "convergence", "fisher", "updates", "stable-ranks",
    }  # fmt: skip
    for plot in plots:
        marks = page.locator(f'[data-plot="{plot}"] :is(.scatterlayer .trace, .barlayer .point)')
        assert marks.count() > 0, plot
        assert page.locator(f'[data-reading="{plot}"]').inner_text().endswith(".")
    assert page.locator("#heatmap-plot .heatmaplayer image").count() == 1
    for plot in ("spectrum", "energy", "update"):
        assert page.locator(f"#{plot}-plot .scatterlayer path.js-line").count() == 1, plot
    assert page.locator("#detail-blocks rect.block").count() > 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_axes_have_titles(page: Any) -> None:
    bare = page.evaluate(
        """[...document.querySelectorAll(".js-plotly-plot")].filter(plot => !plot.hidden)
        .filter(plot => plot.id !== "heatmap-plot")
        .filter(plot => !plot.querySelector(".xtitle") || !plot.querySelector(".ytitle"))
        .map(plot => plot.id || plot.dataset.plot)"""
    )
    assert bare == []


def test_every_switch_repaints(page: Any) -> None:
    views = page.locator('input[name="view"]')
    readings = set()
    for i in range(views.count()):
        views.nth(i).check(force=True)
        reading = page.locator("#view-reading").inner_text()
        label = page.locator('input[name="view"]:checked + span').inner_text()
        assert reading.startswith(f"{label}: ")
        cells = "document.getElementById('heatmap-plot').data[0].z.flat()"
        painted = page.evaluate(f"{cells}.filter(z => z !== null).length")
        assert painted > 0, label
        readings.add(reading)
    assert len(readings) >= 14
    drawn = "document.querySelector('[data-plot=ranks]').data.map(trace => trace.y).flat().join()"
    before = page.evaluate(drawn)
    page.locator('input[name="plot-ranks"]').nth(1).check(force=True)
    assert page.evaluate(drawn) != before
    lines = page.locator('[data-plot="loss"] .scatterlayer .trace')
    both = lines.count()
    page.locator("#show-training").uncheck()
    assert lines.count() == both - 1


def test_a_click_and_the_keys_choose_a_module(page: Any, path: Path) -> None:
    record = document(path)
    places = page.evaluate(
        """(() => { const { xaxis, yaxis } = document.getElementById("heatmap-plot")._fullLayout;
        return [xaxis._offset + xaxis.l2p(1), yaxis._offset + yaxis.l2p(2)]; })()"""
    )
    page.locator("#heatmap-plot").click(position={"x": places[0], "y": places[1]})
    name = page.locator("#detail-name")
    assert name.inner_text() == "model.layers.2.attn.k_proj"
    expected = []
    for kind in ("profiles", "plans", "updates"):
        for view in record[kind]:
            module = view["modules"][name.inner_text()]
            expected += [v for v in module.values() if isinstance(v, float | int)]
    assert set(shown_numbers(page)) <= set(map(float, expected))
    assert len(shown_numbers(page)) >= 18
    module = record["profiles"][0]["modules"][name.inner_text()]
    drawn = page.evaluate("document.getElementById('spectrum-plot').data[0].y")
    assert drawn == module["singular_values"]
    assert page.evaluate("document.getElementById('energy-plot').data[0].y") == module["energy"]
    cuts = page.evaluate("document.getElementById('energy-plot').layout.shapes.map(s => s.x0)")
    assert cuts == sorted({p["modules"][name.inner_text()]["reach"] for p in record["plans"]})

    page.locator("#heatmap-plot").focus()
    page.keyboard.press("ArrowUp")
    assert name.inner_text() == "model.layers.1.attn.k_proj"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")  # there is nothing left of the first kind
    assert name.inner_text() == "model.layers.1.attn.q_proj"
    page.locator("#next-module").press("Enter")
    assert name.inner_text() == "model.layers.1.attn.k_proj"
    page.locator("#choose-module").select_option("model.projector")
    assert name.inner_text() == "model.projector"
    assert page.locator(".chosen-cell").is_hidden()


def test_the_table_of_modules_is_the_json(page: Any, path: Path) -> None:
    assert page.locator("#modules td").count() == 0
    page.locator("#modules summary").click()
    rows = page.locator("#modules tbody tr")
    record = document(path)
    names = list(record["profiles"][0]["modules"])
    rows.first.wait_for()
    assert rows.count() == len(names)
    name = "model.layers.2.mlp.down_proj"
    row = rows.nth(names.index(name))
    assert row.locator("th").inner_text() == name
    shown = row.locator("data").evaluate_all("all => all.map(d => Number(d.value))")
    profile, plans = record["profiles"][0]["modules"][name], record["plans"]
    expected = [profile["d_out"], profile["d_in"]]
    expected += [profile[key] for key in (
        "gid", "energy_rank", "directions", "stable_rank", "participation_ratio", "sensitivity",
        "gradient_norm", "fisher",
    )]  # fmt: skip
    for plan in plans:
        module = plan["modules"][name]
        expected += [module[key] for key in ("rank", "blocks", "parameters", "captured")]
    update = record["updates"][0]["modules"][name]
    expected += [update[key] for key in ("update_stable_rank", "update_rank", "update_norm")]
    assert shown == [value for value in expected if value is not None]
    texts = row.locator("data").all_inner_texts()
    assert texts[2] == short(profile["gid"])
    assert texts[7] == scientific(profile["sensitivity"])
    assert texts[-4] == percent(plans[-1]["modules"][name]["captured"])


def test_every_control_is_reached_with_the_tab_key(page: Any) -> None:
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.name || ''"))
    assert {
        "show-training", "view", "heatmap-plot", "choose-module", "previous-module", "next-module",
        "plot-ranks", "save-json",
    } <= reached  # fmt: skip


def test_names_with_markup_appear_as_text(tmp_path: Path, show: Callable[..., Any]) -> None:
    prefix = f"model.{HOSTILE.replace('.', '')}.layers"
    page = show(make_page(tmp_path, prefix=prefix, name=HOSTILE))
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.locator("#detail-name").inner_text() == f"{prefix}.0.attn.q_proj"
    page.locator("#heatmap-plot").hover(position={"x": 200, "y": 120})
    page.wait_for_selector("#heatmap-plot .hoverlayer .hovertext")
    assert "<img src=x" in page.locator("#heatmap-plot .hoverlayer").text_content()
    assert page.locator("img").count() == 0


def test_printing_shows_every_plot_on_light_ground(page: Any) -> None:
    page.emulate_media(color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(20, 23, 28)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    printed = page.evaluate(ground)
    widths = page.evaluate(
        "[...document.querySelectorAll('[data-plot]')].map(plot => plot._fullLayout.width)"
    )
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert set(widths) == {700}
    assert printed == "rgb(255, 255, 255)"
    assert page.evaluate(ground) == "rgb(20, 23, 28)"


def test_two_thousand_modules_answer_in_time(tmp_path: Path, show: Callable[..., Any]) -> None:
    page = show(make_page(tmp_path, layers=667))
    devtools = page.context.new_cdp_session(page)
    # seconds of the page's own thread, which other processes of the machine do not count into
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def busy() -> float:
        metrics = devtools.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    seconds = []
    for i in range(9):
        before = busy()
        page.evaluate(
            """index => { const chooser = document.getElementById("choose-module");
            chooser.selectedIndex = index;
            chooser.dispatchEvent(new Event("change"));
            document.body.getBoundingClientRect(); }""",
            200 * i + 7,
        )
        seconds.append(busy() - before)
    assert page.locator("#detail-name").inner_text() == "model.layers.535.mlp.down_proj"
    assert 0 < sorted(seconds)[len(seconds) // 2] < 0.2
