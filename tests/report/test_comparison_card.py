"""Short forms of a comparison: the model card's table and drawing, and the terminal's text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.report import write_report
from rankwise.report.comparison_svg import _Scale, comparison_svg
from rankwise.report.comparison_view import ComparisonRow, SummaryView, load_comparison
from training_samples import make_results

_SVG = "{http://www.w3.org/2000/svg}"


def card_of(folder: Path, results: Any) -> tuple[str, str]:
    """The card and the terminal's text; the drawings lie beside the card."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    text = write_report([folder], folder / "page.html", card=folder / "card.md")
    return (folder / "card.md").read_text(encoding="utf-8"), text


def rows_of(folder: Path, results: Any, task: str = "cola", rank: int = 2) -> list[ComparisonRow]:
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return load_comparison(folder / "results.json").tables[task, rank]


def test_the_card_holds_every_table_best_first(tmp_path: Path) -> None:
    card, _ = card_of(tmp_path, make_results())
    title, *tables = card.split("\n### ")
    assert title.startswith("## Methods compared: small comparison, by rankwise\n")
    assert "against lora, corrected for all methods of the table" in title
    assert len(tables) == 4
    assert tables[0].splitlines()[2:7] == [
        "| method | parameters | mean | 95 % interval | p (Holm) |",
        "|---|---:|---:|---:|---:|",
        r"| slow \<b\>one\</b\> | 2,002† | 0.6328 | 0.6016 to 0.6641 | 0.210 |",
        "| RaLoRA | 2,001 | 0.5703 | 0.5391 to 0.6016 | 0.008 |",
        "| lora | 2,000 | 0.5078 | 0.4766 to 0.5391 | reference |",
    ]
    assert [line[:8] for line in tables[3].splitlines()[4:6]] == ["| lora |", "| RaLoRA"]
    assert card.count("- MoRA: not available: no code.") == 4


def test_every_table_of_the_card_has_its_drawing(tmp_path: Path) -> None:
    card, _ = card_of(tmp_path, make_results())
    names = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert names == [f"card-comparison-1-{i}.svg" for i in (1, 2, 3, 4)]
    for name, table in zip(names, card.split("\n### ")[1:], strict=True):
        assert f"](<{name}>)" in table
        drawn = ElementTree.parse(tmp_path / name).getroot()
        assert drawn.findtext(f"{_SVG}title") == table.splitlines()[0]


def test_a_label_cannot_end_its_cell(tmp_path: Path) -> None:
    card, _ = card_of(tmp_path, make_results(labels=("a|b", "c")))
    assert r"| a\|b | 2,001 |" in card


def test_a_diverged_seed_is_said_on_card_page_and_terminal(tmp_path: Path) -> None:
    results = make_results()
    results["rows"][1]["diverged"] = [1, 2]
    card, text = card_of(tmp_path, results)
    said = "RaLoRA: diverged at seed 1 and 2, which the mean leaves out."
    assert f"- {said}" in card
    assert f"  {said}" in text
    assert said in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_terminal_shows_every_table(tmp_path: Path) -> None:
    _, text = card_of(tmp_path, make_results())
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "method parameters mean 95 % interval p (Holm)" in lines
    assert "RaLoRA 2,001 0.5703 0.5391 to 0.6016 0.008" in lines
    assert lines.count("MoRA: not available: no code.") == 4


def test_a_table_without_results_has_no_drawing(tmp_path: Path) -> None:
    results = make_results()
    for row in results["rows"][:4]:
        row.update(summary=None, against=None, values={}, status="not started")
    card, text = card_of(tmp_path, results)
    first = card.split("\n### ")[1]
    assert "| method" not in first and "svg" not in first
    assert "- lora, RaLoRA, slow" in first and "and MoRA: not started." in first
    assert not (tmp_path / "card-comparison-1-1.svg").exists()
    assert "  lora, RaLoRA, slow <b>one</b> and MoRA: not started." in text


def drawn(rows: list[ComparisonRow], reference: str = "lora") -> ElementTree.Element:
    svg = comparison_svg(rows, reference)
    assert svg is not None
    return ElementTree.fromstring(svg)


def places(root: ElementTree.Element, tag: str, *keys: str) -> list[tuple[float, ...]]:
    return [
        tuple(float(e.get(key, "nan")) for key in keys)
        for e in root.iter(f"{_SVG}{tag}")
        if e.get("stroke-width") == "2"
    ]


def test_dots_and_intervals_stand_at_their_values(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, make_results())
    root = drawn(rows)
    ranked = [rows[2], rows[1], rows[0]]  # higher is better
    dots, bars = places(root, "circle", "cx", "cy"), places(root, "line", "x1", "x2", "y1")
    assert [y for _, y in dots] == sorted(y for _, y in dots) == [y for *_, y in bars]
    values, shown = [], []
    for row, (x, _), (left, right, _) in zip(ranked, dots, bars, strict=True):
        assert row.summary is not None
        values += [row.summary.mean, row.summary.low, row.summary.high]
        shown += [x, left, right]
    for line in root.iter(f"{_SVG}line"):  # the reference's, and below those of the ticks
        if line.get("stroke-dasharray"):
            assert line.get("x1") == line.get("x2") == f"{dots[2][0]:.1f}"
    ticks = [e for e in root.iter(f"{_SVG}text") if (e.text or "").replace(".", "").isdigit()]
    assert len(ticks) >= 3
    values += [float(tick.text or "") for tick in ticks]
    shown += [float(tick.get("x", "nan")) for tick in ticks]
    low, high = values.index(min(values[:9])), values.index(max(values[:9]))  # type: ignore[type-var]
    scale = (shown[high] - shown[low]) / (values[high] - values[low])  # type: ignore[operator]
    for value, place in zip(values, shown, strict=True):
        assert place == pytest.approx(shown[low] + scale * (value - values[low]), abs=0.2)  # type: ignore[operator]


def test_a_filled_dot_differs_and_one_seed_has_no_interval(tmp_path: Path) -> None:
    fills = {}
    for dot in drawn(rows_of(tmp_path, make_results())).iter(f"{_SVG}circle"):
        hint = dot.findtext(f"{_SVG}title") or ""
        fills[hint.split(": ")[0]] = dot.get("fill") != "#ffffff"
    assert fills == {"slow <b>one</b>": False, "RaLoRA": True, "lora": False}
    alone = drawn(rows_of(tmp_path, make_results(seeds=1)))
    assert len(places(alone, "circle", "cx")) == 3
    assert places(alone, "line", "x1") == []


def test_a_reference_that_is_not_there_draws_no_line(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, make_results())
    dashed: Callable[[ElementTree.Element], int] = lambda root: sum(  # noqa: E731
        e.get("stroke-dasharray") is not None for e in root.iter(f"{_SVG}line")
    )
    assert dashed(drawn(rows)) == 1
    assert dashed(drawn(rows, reference="MoRA")) == 0


@given(st.floats(-1e4, 1e4), st.floats(1e-6, 1e4))
def test_a_scale_has_round_ticks_inside_that_read_apart(middle: float, half: float) -> None:
    scale = _Scale.of([_row(middle, half)])
    assert scale.low < middle - half < middle + half < scale.high
    assert 2 <= len(scale.ticks) <= 7
    air = 1e-9 * (abs(scale.low) + abs(scale.high))
    for tick, text in scale.ticks:
        assert scale.low - air <= tick <= scale.high + air
        assert float(text.replace(",", "")) == pytest.approx(tick, rel=1e-9, abs=1e-12)
    assert len({text for _, text in scale.ticks}) == len(scale.ticks)


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1e12])
def test_one_value_alone_has_a_scale(value: float) -> None:
    scale = _Scale.of([_row(value, 0.0)])
    assert scale.low < value < scale.high
    assert len(scale.ticks) >= 2


def _row(middle: float, half: float) -> ComparisonRow:
    return ComparisonRow(
        task="t",
        metric="m",
        lower_is_better=True,
        rank=1,
        label="l",
        method="l",
        ours=False,
        status="finished",
        summary=SummaryView(middle, None, middle - half, middle + half, 2),
    )
