"""A Markdown block for a model card, and the drawings it shows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.errors import FileError
from rankwise.files import write_text
from rankwise.report.grid import heat_sources
from rankwise.report.measures import telling_measure
from rankwise.report.svg import heatmap_svg
from rankwise.report.views import Report
from rankwise.report.words import joined, loss, whole

_SPECIAL = re.compile(r"([\\`*_\[\]#|~<>])")


def write_card(report: Report, document: Mapping[str, Any], out: Path) -> None:
    """Write a Markdown block, and beside it one SVG for each profile, plan and adapter.

    Raises:
        FileError: `out` does not end in .md, or a file cannot be written.
    """
    if out.suffix.lower() != ".md":
        raise FileError(f"card={out}: must end in .md.")
    drawings = {}
    for source in heat_sources(report):
        measure = telling_measure(source.view)
        svg = heatmap_svg(source, measure)
        if svg is not None:
            kind, i = source.where
            name = f"{out.stem}-{kind.removesuffix('s')}-{i + 1}.svg"
            drawings[name] = (f"{measure.label} by layer and kind: {source.label}", svg)
    for name, (_, svg) in drawings.items():
        write_text(out.parent / name, svg + "\n")
    captions = {name: caption for name, (caption, _) in drawings.items()}
    write_text(out, card_text(report, document, captions))


def card_text(report: Report, document: Mapping[str, Any], images: Mapping[str, str]) -> str:
    """The block: what happened, the runs, the drawings, and what the numbers cannot say."""
    title = literal(joined(report.models)) if report.models else "a model"
    parts = [f"## Adapter ranks of {title}, by rankwise"]
    parts += [literal(text) for text in document["takeaway"]]
    if report.runs:
        parts.append(_runs(report))
    parts += [f"![{literal(caption)}]({_path(name)})" for name, caption in images.items()]
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
    rows = ["| run | trainable parameters | held-out loss, nats per token |", "|---|---:|---:|"]
    for run in report.runs:
        change = "–"
        if run.held_out:
            change = f"{loss(run.held_out[0].loss)} → {loss(run.held_out[-1].loss)}"
        rows.append(f"| {literal(run.label)} | {whole(run.trainable_parameters)} | {change} |")
    return "\n".join(rows)


def _path(name: str) -> str:
    return "<" + name.replace("<", "").replace(">", "") + ">"
