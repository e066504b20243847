"""A Markdown block for a model card, and the drawings it shows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import FileError
from rankwise.files import write_text
from rankwise.report.comparison_svg import comparison_svg
from rankwise.report.comparison_view import ComparisonView, best_first
from rankwise.report.comparison_words import (
    COLUMNS,
    SHORT_READING,
    remarks,
    short_cells,
    table_title,
)
from rankwise.report.grid import heat_sources
from rankwise.report.measures import telling_measure
from rankwise.report.svg import heatmap_svg
from rankwise.report.views import Report
from rankwise.report.words import joined, loss, whole

TablePlace = tuple[int, int]
"""Which comparison of the report, and which of its tables."""
_SPECIAL = re.compile(r"([\\`*_\[\]#|~<>])")


@dataclass(frozen=True)
class Drawing:
    """A picture beside the card: its file's name, its caption, and the SVG itself."""

    name: str
    caption: str
    svg: str


def write_card(report: Report, document: Mapping[str, Any], out: Path) -> None:
    """Write a Markdown block, and beside it the SVGs it shows.

    There is one for each profile, plan and adapter, and for each task and budget of a comparison.

    Raises:
        FileError: `out` does not end in .md, or a file cannot be written.
    """
    if out.suffix.lower() != ".md":
        raise FileError(f"card={out}: must end in .md.")
    heatmaps, tables = _heatmaps(report, out.stem), _comparison_drawings(report, out.stem)
    for drawing in (*heatmaps, *tables.values()):
        write_text(out.parent / drawing.name, drawing.svg + "\n")
    write_text(out, card_text(report, document, heatmaps, tables))


def card_text(
    report: Report,
    document: Mapping[str, Any],
    heatmaps: Sequence[Drawing],
    tables: Mapping[TablePlace, Drawing],
) -> str:
    """The block: what happened, tables and drawings, and what the numbers cannot say."""
    parts = [_title(report)]
    parts += [literal(text) for text in document["takeaway"]]
    for i, comparison in enumerate(report.comparisons):
        parts += _comparison(i, comparison, tables)
    if report.runs:
        parts.append(_runs(report))
    parts += [_image(drawing) for drawing in heatmaps]
    if document["caveats"]:
        parts.append("> " + " ".join(literal(text) for text in document["caveats"]))
    parts.append(f"Made with rankwise {literal(str(document['rankwise']))}.")
    return "\n\n".join(parts) + "\n"


def literal(text: str) -> str:
    r"""Text that Markdown and HTML show as it is.

    Example:
        >>> print(literal("a_b <i>"))
        a\_b \<i\>
    """
    return _SPECIAL.sub(r"\\\1", text.replace("&", "&amp;").replace("\n", " "))


def _runs(report: Report) -> str:
    rows = []
    for run in report.runs:
        change = "–"
        if run.held_out:
            change = f"{loss(run.held_out[0].loss)} → {loss(run.held_out[-1].loss)}"
        rows.append((run.label, whole(run.trainable_parameters), change))
    return _table(("run", "trainable parameters", "held-out loss, nats per token"), rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns after the first are right-aligned; `literal` escapes what would end a cell."""
    lines = [columns, *rows]
    shown = ["| " + " | ".join(map(literal, line)) + " |" for line in lines]
    return "\n".join([shown[0], "|---|" + "---:|" * (len(columns) - 1), *shown[1:]])


def _title(report: Report) -> str:
    if report.comparisons and not report.models:
        return f"## Methods compared: {literal(report.title)}, by rankwise"
    title = joined(report.models) if report.models else "a model"
    return f"## Adapter ranks of {literal(title)}, by rankwise"


def _heatmaps(report: Report, stem: str) -> list[Drawing]:
    found = []
    for source in heat_sources(report):
        measure = telling_measure(source.view)
        svg = heatmap_svg(source, measure)
        if svg is not None:
            kind, i = source.where
            name = f"{stem}-{kind.removesuffix('s')}-{i + 1}.svg"
            found.append(Drawing(name, f"{measure.label} by layer and kind: {source.label}", svg))
    return found


def _comparison_drawings(report: Report, stem: str) -> dict[TablePlace, Drawing]:
    found = {}
    for i, comparison in enumerate(report.comparisons):
        for j, rows in enumerate(comparison.tables.values()):
            svg = comparison_svg(rows, comparison.reference)
            if svg is not None:
                name = f"{stem}-comparison-{i + 1}-{j + 1}.svg"
                caption = f"Means and 95 % intervals, {table_title(rows[0], rows)}"
                found[i, j] = Drawing(name, caption, svg)
    return found


def _comparison(
    i: int, comparison: ComparisonView, drawings: Mapping[TablePlace, Drawing]
) -> list[str]:
    """Every table with its drawing, and what has no result."""
    parts = [literal(SHORT_READING.format(reference=comparison.reference))]
    for j, rows in enumerate(comparison.tables.values()):
        cells = [short_cells(row, comparison.reference) for row in best_first(rows)]
        parts.append(f"### {literal(table_title(rows[0], rows))}")
        if cells:
            parts.append(_table(COLUMNS, cells))
        if (i, j) in drawings:
            parts.append(_image(drawings[i, j]))
        parts += ["\n".join(f"- {literal(remark)}" for remark in remarks(rows))]
    return [part for part in parts if part]


def _image(drawing: Drawing) -> str:
    return f"![{literal(drawing.caption)}]({_path(drawing.name)})"


def _path(name: str) -> str:
    return "<" + name.replace("<", "").replace(">", "") + ">"
