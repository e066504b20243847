"""Six plans of two models on one page, in a real Chromium: a click opens the right module."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from page_samples import Shown
from rankwise.methods import Gard, Lora, LoraGid, LsLora, RaLora, WaterFill
from rankwise.report import write_report
from report_samples import make_profile

KINDS = ("attn.q_proj", "attn.k_proj", "mlp.down_proj")
FIRST, SECOND = "model.layers", "decoder.blocks"
PLANS = {
    FIRST: (Lora(r=4), LsLora(r=8), RaLora(r=4), Gard(r=8)),
    SECOND: (LoraGid(r=4), WaterFill(r=8)),
}


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The page's path and its JSON; the second model has more layers, and larger ones."""
    folder = tmp_path_factory.mktemp("plans")
    paths = []
    for size, prefix in enumerate((FIRST, SECOND), start=1):
        profile = make_profile(2 + size, prefix, prefix, outside=False, more=True, size=size)
        profile.save(folder / prefix)
        paths.append(folder / prefix)
        for method in PLANS[prefix]:
            plan = method.plan(profile)
            paths.append(folder / f"{prefix}-{plan.method}.json")
            plan.save(paths[-1])
    write_report(paths, folder / "page.html")
    return folder / "page.html", json.loads((folder / "page.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(browser: Any, document: tuple[Path, dict[str, Any]]) -> Iterator[Any]:
    shown = Shown(browser, document[0])
    yield shown.page
    shown.close()


def click_cell(page: Any, row: int, column: int) -> None:
    x, y = page.evaluate(
        """([row, column]) => {
        const { xaxis, yaxis } = document.getElementById("heatmap-plot")._fullLayout;
        return [xaxis._offset + xaxis.l2p(column), yaxis._offset + yaxis.l2p(row)]; }""",
        [row, column],
    )
    page.locator("#heatmap-plot").click(position={"x": x, "y": y})


def drawn(page: Any, plot: str) -> list[dict[str, Any]]:
    return page.evaluate(
        "id => document.getElementById(id).data.map(({ x, y, name }) => ({ x, y, name }))", plot
    )


def show_plan(page: Any, index: int) -> None:
    """Paint the heatmap with the plan's first measure."""
    sources = page.evaluate(
        "JSON.parse(document.getElementById('figures').textContent).heatmaps.map(h => h.source)"
    )
    group = sources.index(["plans", index])
    page.locator(f'input[name="view"][value="{group}.0"]').check(force=True)


@pytest.mark.parametrize(
    ("index", "row", "column"),
    [(0, 1, 0), (1, 2, 1), (2, 1, 2), (3, 2, 2), (4, 0, 1), (5, 3, 0)],
)
def test_a_click_on_a_plan_opens_its_modules_spectrum(
    page: Any, document: tuple[Path, dict[str, Any]], index: int, row: int, column: int
) -> None:
    record = document[1]
    assert len(record["plans"]) == 6
    plan = record["plans"][index]
    profile = next(p for p in record["profiles"] if p["modules"].keys() >= plan["modules"].keys())
    prefix = profile["provenance"]["model"]
    show_plan(page, index)
    name = f"{prefix}.{row}.{KINDS[column]}"
    click_cell(page, row, column)
    assert page.locator("#detail-name").inner_text() == name

    module = profile["modules"][name]
    [spectrum] = drawn(page, "spectrum-plot")
    assert spectrum["y"] == module["singular_values"]
    [energy] = drawn(page, "energy-plot")
    assert energy["y"] == module["energy"]
    own = {p["label"]: p["modules"][name] for p in record["plans"] if name in p["modules"]}
    assert plan["label"] in own and len(own) == len(PLANS[prefix])
    for plot in ("spectrum-plot", "energy-plot"):
        cuts = page.evaluate("id => document.getElementById(id).layout.shapes.map(s => s.x0)", plot)
        assert cuts == sorted({m["reach"] for m in own.values()}), plot
        names = page.evaluate(
            "id => document.getElementById(id).layout.annotations.map(a => a.text)", plot
        )
        shown = next(text for text in names if plan["label"] in text.split(":")[0].split(", "))
        assert shown.endswith(f": {plan['modules'][name]['reach']}"), plot
    facts = page.locator("#detail-facts dl").all_inner_texts()
    [said] = [text for text in facts if text.split("\n")[0] == f"plan {plan['label']}"]
    assert said.split("\n")[1:3] == ["rank", str(plan["modules"][name]["rank"])]


def test_a_module_that_a_plan_left_out_is_blank_and_opens_nothing(
    page: Any, document: tuple[Path, dict[str, Any]]
) -> None:
    left_out = f"{SECOND}.2.{KINDS[2]}"
    assert left_out not in document[1]["plans"][5]["modules"]
    show_plan(page, 5)
    click_cell(page, 2, 1)
    assert page.locator("#detail-name").inner_text() == f"{SECOND}.2.{KINDS[1]}"
    z = page.evaluate("document.getElementById('heatmap-plot').data[0].z")
    assert z[2][2] is None and z[2][1] is not None
    click_cell(page, 2, 2)
    assert page.locator("#detail-name").inner_text() == f"{SECOND}.2.{KINDS[1]}"


def test_the_plans_can_be_told_apart(document: tuple[Path, dict[str, Any]]) -> None:
    """What the clicks above are held against differs from plan to plan and module to module."""
    record = document[1]
    labels = [plan["label"] for plan in record["plans"]]
    assert len(set(labels)) == 6
    spectra = [
        tuple(module["singular_values"])
        for profile in record["profiles"]
        for module in profile["modules"].values()
    ]
    assert len(set(spectra)) == len(spectra) == 3 * 3 + 3 * 4
    shapes = [
        tuple((m["rank"], m["blocks"]) for m in p["modules"].values()) for p in record["plans"]
    ]
    assert len(set(shapes)) == 6
