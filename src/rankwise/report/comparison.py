"""Comparisons of methods: tables with intervals, and the metric against parameters."""

from __future__ import annotations

import math
from html import escape

import plotly.graph_objects as go

from rankwise.report.comparison_dots import interval_bars
from rankwise.report.comparison_view import (
    ComparisonRow,
    ComparisonView,
    SummaryView,
    best_first,
)
from rankwise.report.comparison_words import (
    extent,
    interval,
    probability,
    rate,
    remarks,
    signed,
    table_title,
)
from rankwise.report.labels import plain
from rankwise.report.plots import SYMBOLS, Variant, axis, line, shape_layout, variant
from rankwise.report.tables import data_cell, table
from rankwise.report.views import Report
from rankwise.report.words import loss, whole

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
    "Thick lines are this project's methods. Methods of one size are drawn side by side; the true "
    "size is under the pointer."
)
_BESIDE, _SPREAD = 0.03, 0.3
"""Between two methods of one size in the logarithm of the parameters, and from the first to the
last at most: budgets are mostly a factor of 2 apart, which is 0.7."""


def comparison_tables(comparison: ComparisonView) -> str:
    """One table a task and budget, best mean first, what has no result last."""
    parts = [
        f'<p class="reading">{_READING}</p>',
        f'<p class="reading">{escape(extent(comparison))}</p>',
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
        if cells:
            parts.append(table(columns, cells, kind="cards", caption=title))
        parts += [f'<p class="reading">{escape(remark)}</p>' for remark in remarks(rows)]
    return "\n".join(parts)


def parameter_variants(report: Report) -> list[Variant]:
    """The metric against parameters with intervals, one variant a task of several budgets."""
    found = []
    for comparison in report.comparisons:
        for task in dict.fromkeys(row.task for row in comparison.rows):
            rows = [row for row in comparison.rows if row.task == task and row.summary is not None]
            rows = [row for row in rows if row.size is not None]
            if len({row.rank for row in rows}) < 2:
                continue
            labels = list(dict.fromkeys(row.label for row in rows))
            figure = go.Figure(
                [
                    _curve([row for row in rows if row.label == label], series, len(labels))
                    for series, label in enumerate(labels)
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


def _curve(rows: list[ComparisonRow], series: int, count: int) -> go.Scatter:
    """One method of several over its budgets; bars only where there is more than one seed."""
    placed = [(row.size or 0, row.summary) for row in rows if row.summary is not None]
    placed.sort(key=lambda pair: pair[0])  # sizes may repeat, and summaries have no order
    sizes, summaries = [size for size, _ in placed], [summary for _, summary in placed]
    beside = math.exp((series - (count - 1) / 2) * min(_BESIDE, _SPREAD / count))
    return line(
        [size * beside for size in sizes],
        [summary.mean for summary in summaries],
        rows[0].label,
        series,
        line={"width": 3 if rows[0].ours else 1.5},
        # seven colours by seven symbols tell forty-nine methods apart
        marker={"symbol": SYMBOLS[(series + series // len(SYMBOLS)) % len(SYMBOLS)], "size": 9},
        error_y=interval_bars(summaries),
        customdata=[[_span(s), size] for s, size in zip(summaries, sizes, strict=True)],
        hovertemplate="%{fullData.name}<br>%{customdata[1]:,} parameters<br>%{y:.4f}<br>"
        "%{customdata[0]}"
        "<extra></extra>",
    )


def _cells(row: ComparisonRow) -> list[str]:
    assert row.summary is not None
    against = row.against
    return [
        data_cell(row.size, whole) + ("†" if row.matched is False else ""),
        data_cell(row.learning_rate, rate) + ("!" if row.at_edge else ""),
        data_cell(row.summary.mean, loss),
        _interval(row.summary),
        data_cell(None if against is None else against.difference.mean, signed),
        "–" if against is None else _interval(against.difference, with_sign=True),
        data_cell(None if against is None else against.holm_p, probability),
        f"{data_cell(len(row.values), whole)} of {data_cell(row.wanted, whole)}",
    ]


def _interval(summary: SummaryView, *, with_sign: bool = False) -> str:
    if summary.low is None or summary.high is None:
        return "–"
    show = signed if with_sign else loss
    return f"{data_cell(summary.low, show)} to {data_cell(summary.high, show)}"


def _span(summary: SummaryView) -> str:
    if summary.low is None:
        return "one seed"
    return plain(f"{interval(summary)}, {summary.count} seeds")
