"""Comparisons of methods: tables with intervals, and the metric against parameters."""

from __future__ import annotations

from html import escape

import plotly.graph_objects as go

from rankwise.report.comparison_view import (
    SIGNIFICANT,
    ComparisonRow,
    ComparisonView,
    SummaryView,
    best_first,
)
from rankwise.report.labels import plain
from rankwise.report.plots import SYMBOLS, Variant, axis, line, shape_layout, variant
from rankwise.report.tables import data_cell, table
from rankwise.report.views import Report
from rankwise.report.words import joined, loss, short, whole

_READING = (
    "Means over seeds on the test part, each with its 95 % interval (Student). The difference is "
    "paired over seeds, method minus reference; its p is that of the paired t-test after Holm's "
    "correction for all methods of the table. An interval that holds 0, or a p above 0.05, says "
    "that these seeds cannot tell the two apart. Sizes marked † are not within 2 % of the budget, "
    "learning rates marked ! lie at the edge of their grid."
)
_PARAMETERS = (
    "Every method at every budget it was run at: to the left is cheaper, {better} is better. Bars "
    "are 95 % intervals over the seeds; where two overlap widely, the order of the points is luck. "
    "Thick lines are this project's methods."
)


def comparison_tables(comparison: ComparisonView) -> str:
    """One table a task and budget, best mean first, what has no result last."""
    parts = [
        f'<p class="reading">{_READING}</p>',
        f'<p class="reading">{escape(_foot(comparison))}</p>',
    ]
    columns = [
        "method",
        "parameters",
        "learning rate",
        "mean",
        "95 % interval",
        f"against {comparison.reference}",
        "95 % interval of it",
        "p (Holm)",
        "seeds",
    ]
    for rows in comparison.tables.values():
        ranked = best_first(rows)
        title = table_title(rows[0], rows)
        cells = [(row.label, _cells(row)) for row in ranked]
        parts.append(f"<h3>{escape(title)}</h3>")
        parts.append(table(columns, cells, kind="cards", caption=title))
        rest = [row for row in rows if row.summary is None or row.status != "finished"]
        parts += [
            f'<p class="reading">{escape(row.label)}: {escape(row.status)}.</p>' for row in rest
        ]
    return "\n".join(parts)


def table_title(first: ComparisonRow, rows: list[ComparisonRow]) -> str:
    """Task, metric, which way is better, and the budget."""
    budget = next((row.budget for row in rows if row.budget is not None), None)
    size = "" if budget is None else f", {whole(budget)} parameters"
    better = "lower" if first.lower_is_better else "higher"
    return (
        f"{first.task}: {first.metric}, {better} is better; budget of LoRA r = {first.rank}{size}"
    )


def parameter_variants(report: Report) -> list[Variant]:
    """The metric against parameters with intervals, one variant a task."""
    found = []
    for comparison in report.comparisons:
        for task in dict.fromkeys(row.task for row in comparison.rows):
            rows = [row for row in comparison.rows if row.task == task and row.summary is not None]
            rows = [row for row in rows if row.size is not None]
            if not rows:
                continue
            figure = go.Figure(
                [
                    _curve([row for row in rows if row.label == label], series)
                    for series, label in enumerate(dict.fromkeys(row.label for row in rows))
                ]
            )
            shape_layout(
                figure,
                axis("trainable parameters", type="log", dtick="D2", tickformat="~s"),
                axis(f"{rows[0].metric}, mean over seeds"),
            )
            figure.update_layout(height=520)
            better = "lower" if rows[0].lower_is_better else "higher"
            label = task if len(report.comparisons) == 1 else f"{comparison.title}: {task}"
            found.append(variant(label, _PARAMETERS.format(better=better), figure))
    return found


def _curve(rows: list[ComparisonRow], series: int) -> go.Scatter:
    """One method over its budgets; bars only where there is more than one seed."""
    placed = sorted((row.size or 0, row.summary) for row in rows if row.summary is not None)
    sizes, summaries = [size for size, _ in placed], [summary for _, summary in placed]
    up = [0.0 if s.high is None else s.high - s.mean for s in summaries]
    down = [0.0 if s.low is None else s.mean - s.low for s in summaries]
    return line(
        sizes,
        [summary.mean for summary in summaries],
        rows[0].label,
        series,
        line={"width": 3 if rows[0].ours else 1.5},
        # seven colours by seven symbols tell forty-nine methods apart
        marker={"symbol": SYMBOLS[(series + series // len(SYMBOLS)) % len(SYMBOLS)], "size": 9},
        error_y={"type": "data", "array": up, "arrayminus": down, "thickness": 1.25, "width": 4},
        customdata=[_span(summary) for summary in summaries],
        hovertemplate="%{fullData.name}<br>%{x:,} parameters<br>%{y:.4f}<br>%{customdata}"
        "<extra></extra>",
    )


def takeaways(report: Report) -> list[str]:
    """What each comparison found, in one paragraph that claims no more than its tests."""
    return [_takeaway(comparison) for comparison in report.comparisons]


def _takeaway(comparison: ComparisonView) -> str:
    words = [f"{comparison.title}: {_foot(comparison)}"]
    for rows in comparison.tables.values():
        ranked = best_first(rows)
        if not ranked:
            continue
        first = ranked[0]
        assert first.summary is not None
        against = [row for row in ranked if row.against is not None]
        holding = [row for row in against if _p(row) < SIGNIFICANT]
        words.append(
            f"{first.task} at the budget of r = {first.rank}: the best mean {first.metric} is "
            f"{loss(first.summary.mean)} ({first.label})."
        )
        if against:
            names = f": {joined([row.label for row in holding])}" if 0 < len(holding) <= 4 else ""
            words.append(
                f"{len(holding)} of {len(against)} methods differ from {comparison.reference} "
                f"after Holm's correction (p < {SIGNIFICANT:g}){names}."
            )
    return " ".join(words)


def next_of(comparison: ComparisonView) -> tuple[str, str]:
    """What to do next, and a command or an empty string."""
    if comparison.finished < comparison.cells:
        return (
            "Next: finish the comparison; what is done is kept.",
            "rankwise compare experiment.yaml",
        )
    edge = list(dict.fromkeys(row.label for row in comparison.rows if row.at_edge))
    if edge:
        return (
            f"Next: widen the grid of learning rates, at whose edge {joined(edge[:4])} ended.",
            "rankwise compare experiment.yaml 'learning_rates=[...]'",
        )
    return "Next: train with the method you chose.", "rankwise train run.yaml"


def _foot(comparison: ComparisonView) -> str:
    machines = joined(comparison.hardware) if comparison.hardware else "no machine yet"
    return (
        f"{whole(comparison.finished)} of {whole(comparison.cells)} runs finished, "
        f"{short(comparison.hours)} hours of computing on {machines}."
    )


def _p(row: ComparisonRow) -> float:
    p = None if row.against is None else row.against.holm_p
    return 1.0 if p is None else p


def _cells(row: ComparisonRow) -> list[str]:
    assert row.summary is not None
    against = row.against
    return [
        data_cell(row.size, whole) + ("†" if row.matched is False else ""),
        data_cell(row.learning_rate, _rate) + ("!" if row.at_edge else ""),
        data_cell(row.summary.mean, loss),
        _interval(row.summary),
        data_cell(None if against is None else against.difference.mean, _signed),
        "–" if against is None else _interval(against.difference, signed=True),
        data_cell(None if against is None else against.holm_p, _probability),
        f"{data_cell(len(row.values), whole)} of {data_cell(row.wanted, whole)}",
    ]


def _interval(summary: SummaryView, *, signed: bool = False) -> str:
    if summary.low is None or summary.high is None:
        return "–"
    show = _signed if signed else loss
    return f"{data_cell(summary.low, show)} to {data_cell(summary.high, show)}"


def _span(summary: SummaryView) -> str:
    if summary.low is None or summary.high is None:
        return "one seed"
    return plain(f"{loss(summary.low)} to {loss(summary.high)}, {summary.count} seeds")


def _rate(value: float) -> str:
    return f"{value:g}"


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _probability(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
