"""The tables of the page; every number carries its full precision in `<data value>`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rankwise.report.measures import (
    PLAN_MEASURES,
    PROFILE_MEASURES,
    UPDATE_MEASURES,
    Measure,
)
from rankwise.report.views import Report, RunView
from rankwise.report.words import loss, short, whole
from rankwise.targets import layer_position

_Row = tuple[str, Sequence[str]]


def data_cell(value: float | None, show: Callable[[float], str]) -> str:
    """A number as shown, with its exact value; a dash where there is none."""
    if value is None:
        return "–"
    return f'<data value="{value!r}">{escape(show(value))}</data>'


def table(columns: Sequence[str], rows: Iterable[_Row], *, kind: str, caption: str) -> str:
    """Rows of cells that are already HTML; the column names ride along for narrow screens."""
    heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    labels = [escape(column) for column in columns[1:]]
    cards = kind.startswith("cards")
    body = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(
            f'<td data-label="{label}"><span>{cell}</span></td>' if cards else f"<td>{cell}</td>"
            for label, cell in zip(labels, cells, strict=True)
        )
        + "</tr>"
        for name, cells in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="{kind}">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>'
        "</table></div>"
    )


def comparison_table(runs: Sequence[RunView]) -> str:
    """One row per run: size, blocks, losses before and after, times, memory."""
    columns = [
        "run",
        "trainable parameters",
        "blocks: mean (min to max)",
        "held-out loss, nats per token",
        "perplexity",
        "training, s",
        "profiling, s",
        "peak memory, MiB",
    ]
    readings = [
        "The arrow goes from before to after training; perplexity is the exponential of the loss.",
        "Blocks are the diagonal blocks of each adapter; 1 is plain LoRA.",
        "Peak memory is that of the process so far, or of the GPU where one was used.",
    ]
    rows = [(run.label, _comparison_cells(run)) for run in runs]
    return f'<p class="reading">{" ".join(readings)}</p>\n' + table(
        columns, rows, kind="cards", caption="Comparison of the runs"
    )


def _comparison_cells(run: RunView) -> list[str]:
    blocks = run.blocks
    return [
        data_cell(run.trainable_parameters, whole),
        "–"
        if blocks is None
        else data_cell(blocks.min, whole)
        if blocks.min == blocks.max
        else f"{data_cell(blocks.mean, short)} ({data_cell(blocks.min, whole)} to "
        f"{data_cell(blocks.max, whole)})",
        _before_after(run, "loss", loss),
        _before_after(run, "perplexity", short),
        data_cell(run.seconds.get("train"), short),
        data_cell(run.seconds.get("profile"), short),
        data_cell(run.peak_memory_mib, whole),
    ]


def _before_after(run: RunView, what: str, show: Callable[[float], str]) -> str:
    if not run.held_out:
        return "–"
    before, after = (
        data_cell(getattr(point, what), show) for point in (run.held_out[0], run.held_out[-1])
    )
    return f"{before} → <strong>{after}</strong>"


@dataclass(frozen=True)
class Column:
    """A number that the table of modules shows, and where `report.json` holds it."""

    title: str
    part: str
    index: int
    measure: Measure

    def to_json(self) -> dict[str, Any]:
        """What the page's script needs to fill the column."""
        return {
            "title": self.title,
            "part": self.part,
            "index": self.index,
            "key": self.measure.key,
            "show": self.measure.show.__name__,
        }


def module_columns(report: Report) -> list[Column]:
    """Every number that is known of some module, in the order of the report."""
    several = len(report.profiles) > 1
    sources: list[tuple[str, str, Sequence[Any], Sequence[Measure]]] = [
        ("profiles", "{}: " if several else "", report.profiles, PROFILE_MEASURES),
        ("plans", "{}: ", report.plans, PLAN_MEASURES),
        ("updates", "learned, {}: ", report.updates, UPDATE_MEASURES),
    ]
    return [
        Column(
            prefix.replace("{}", view.label) + (measure.label.lower() if prefix else measure.label),
            part,
            index,
            measure,
        )
        for part, prefix, views, measures in sources
        for index, view in enumerate(views)
        for measure in measures
        if any(getattr(module, measure.key) is not None for module in view.modules.values())
    ]


def module_table(report: Report, names: Sequence[str]) -> str:
    """One row per module with all that is known of it."""
    columns = module_columns(report)
    rows = [(name, _module_cells(report, columns, name)) for name in names]
    titles = ["module", "out × in", *(column.title for column in columns)]
    return table(titles, rows, kind="modules", caption="Modules and their numbers")


def outside_table(report: Report) -> str:
    """The rows of the modules that no heatmap can place; empty if there are none."""
    names: dict[str, None] = {}
    for view in _views(report):
        names |= dict.fromkeys(name for name in view.modules if layer_position(name).index is None)
    return module_table(report, list(names)) if names else ""


def _views(report: Report) -> list[Any]:
    return [*report.profiles, *report.plans, *report.updates]


def _module_cells(report: Report, columns: Sequence[Column], name: str) -> list[str]:
    modules = [view.modules[name] for view in _views(report) if name in view.modules]
    shapes = {(m.d_out, m.d_in) for m in modules if m.d_in is not None}
    cells = [_shape(shapes.pop() if len(shapes) == 1 else None)]  # of two models neither
    for column in columns:
        module = getattr(report, column.part)[column.index].modules.get(name)
        value = None if module is None else getattr(module, column.measure.key)
        cells.append(data_cell(value, column.measure.show))
    return cells


def _shape(shape: tuple[int, int] | None) -> str:
    if shape is None:
        return "–"
    return f"{data_cell(shape[0], str)} × {data_cell(shape[1], str)}"
