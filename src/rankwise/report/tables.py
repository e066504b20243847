"""The tables of the page; every number carries its full precision in `<data value>`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from rankwise.report.load import Report, RunView
from rankwise.report.words import loss, short, whole
from rankwise.targets import layer_position

_Row = tuple[str, Sequence[str]]


def _data(value: float | None, show: Callable[[float], str]) -> str:
    """A number as shown, with its exact value; a dash where there is none."""
    if value is None:
        return "–"
    return f'<data value="{value!r}">{escape(show(value))}</data>'


def _table(columns: Sequence[str], rows: Iterable[_Row], *, kind: str, caption: str) -> str:
    """Rows of cells that are already HTML; the column names ride along for narrow screens."""
    heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    labels = [escape(column) for column in columns[1:]]
    cards = kind == "cards"
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
    return f'<p class="reading">{" ".join(readings)}</p>\n' + _table(
        columns, rows, kind="cards", caption="Comparison of the runs"
    )


def _comparison_cells(run: RunView) -> list[str]:
    blocks = run.blocks
    return [
        _data(run.trainable_parameters, whole),
        _data(blocks.min, whole)
        if blocks.min == blocks.max
        else f"{_data(blocks.mean, short)} ({_data(blocks.min, whole)} to "
        f"{_data(blocks.max, whole)})",
        _before_after(run, "loss", loss),
        _before_after(run, "perplexity", short),
        _data(run.seconds.get("train"), short),
        _data(run.seconds.get("profile"), short),
        _data(run.peak_memory_mib, whole),
    ]


def _before_after(run: RunView, what: str, show: Callable[[float], str]) -> str:
    if not run.held_out:
        return "–"
    before, after = (
        _data(getattr(point, what), show) for point in (run.held_out[0], run.held_out[-1])
    )
    return f"{before} → <strong>{after}</strong>"


def module_table(report: Report, only: Sequence[str] | None = None) -> str:
    """One row per module with all that is known of it."""
    columns = ["module", "out × in"]
    getters: list[Callable[[str], str]] = []
    shapes: dict[str, tuple[int, int] | None] = {}
    views: list[Any] = [*report.profiles, *report.plans]
    for view in views:
        for name, module in view.modules.items():
            known = None if module.d_in is None else (module.d_out, module.d_in)
            shapes[name] = shapes.get(name) or known
    fields: list[tuple[Any, str, str, Callable[[float], str]]] = []
    for profile in report.profiles:
        several = f" ({profile.label})" if len(report.profiles) > 1 else ""
        fields += [
            (profile, "gid", f"GID{several}", short),
            (profile, "stable_rank", f"stable rank{several}", short),
            (profile, "sensitivity", f"sensitivity{several}", lambda value: f"{value:.2e}"),
        ]
    for plan in report.plans:
        fields += [
            (plan, "rank", f"{plan.label}: rank", whole),
            (plan, "blocks", f"{plan.label}: blocks", whole),
            (plan, "parameters", f"{plan.label}: parameters", whole),
        ]
    for view, key, title, show in fields:
        columns.append(title)
        getters.append(_getter(view, key, show))
    rows = [
        (name, [_shape(shapes[name]), *(get(name) for get in getters)])
        for name in (shapes if only is None else only)
    ]
    return _table(columns, rows, kind="modules", caption="Modules and their numbers")


def outside_table(report: Report) -> str:
    """The rows of the modules that no heatmap can place; empty if there are none."""
    names: dict[str, None] = {}
    views: list[Any] = [*report.profiles, *report.plans]
    for view in views:
        names |= dict.fromkeys(name for name in view.modules if layer_position(name).index is None)
    return module_table(report, list(names)) if names else ""


def _getter(view: Any, key: str, show: Callable[[float], str]) -> Callable[[str], str]:
    def get(name: str) -> str:
        module = view.modules.get(name)
        return "–" if module is None else _data(getattr(module, key), show)

    return get


def _shape(shape: tuple[int, int] | None) -> str:
    if shape is None:
        return "–"
    return f"{_data(shape[0], str)} × {_data(shape[1], str)}"
