"""A comparison's methods side by side: every seed, the mean and its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from rankwise.report.comparison_view import ComparisonRow, SummaryView, best_first
from rankwise.report.comparison_words import interval
from rankwise.report.labels import plain
from rankwise.report.plots import Variant, axis, line, shape_layout, variant
from rankwise.report.views import Report

_READING = (
    "Small open marks are single seeds, large ones means with their 95 % intervals, which may go "
    "on outside; {better} is better. The line is the mean of {reference}. A mark far from the "
    "others of its row is a run that failed, which a mean alone hides."
)
_ROW = 26
"""Pixels of a method."""


def method_variants(report: Report) -> list[Variant]:
    """One variant a task and budget, the best mean on top."""
    found = []
    for comparison in report.comparisons:
        for (task, rank), rows in comparison.tables.items():
            ranked = best_first(rows)
            if not ranked:
                continue
            label = f"{task}, r = {rank}"
            if len(report.comparisons) > 1:
                label = f"{comparison.title}: {label}"
            reading = _READING.format(
                better="lower" if rows[0].lower_is_better else "higher",
                reference=comparison.reference,
            )
            found.append(variant(label, reading, _figure(ranked, comparison.reference)))
    return found


def _figure(ranked: list[ComparisonRow], reference: str) -> go.Figure:
    labels = [plain(row.label) for row in ranked]
    traces = []
    goal = next((row.summary for row in ranked if row.label == reference), None)
    if goal is not None:
        ends = [goal.mean, goal.mean]
        traces.append(
            line(ends, [labels[0], labels[-1]], plain(reference), 3, mode="lines",
                 line={"width": 1.5, "dash": "dot"}, hoverinfo="skip")
        )  # fmt: skip
    traces += [_seeds(ranked, labels), _means(ranked, labels)]
    figure = go.Figure(traces)
    values = [value for row in ranked for value in row.values.values()]
    room = 0.06 * (max(values) - min(values)) or 0.01 * abs(values[0]) or 1.0
    shape_layout(
        figure,
        axis(ranked[0].metric, range=[min(values) - room, max(values) + room]),
        axis("", type="category", categoryorder="array", categoryarray=labels[::-1]),
    )
    figure.update_layout(height=140 + _ROW * len(ranked))
    return figure


def interval_bars(summaries: Sequence[SummaryView]) -> dict[str, Any]:
    """Plotly's bars from means to the ends of their intervals; none where there is no interval."""
    up = [0.0 if s.high is None else s.high - s.mean for s in summaries]
    down = [0.0 if s.low is None else s.mean - s.low for s in summaries]
    return {"type": "data", "array": up, "arrayminus": down, "thickness": 1.25, "width": 4}


def _seeds(ranked: list[ComparisonRow], labels: list[str]) -> go.Scatter:
    points = [
        (value, label, seed)
        for row, label in zip(ranked, labels, strict=True)
        for seed, value in row.values.items()
    ]
    xs, ys, seeds = map(list, zip(*points, strict=True))
    return line(
        xs, ys, "a seed", 0, mode="markers", marker={"symbol": "circle-open", "size": 6},
        customdata=seeds, hovertemplate="%{y}<br>seed %{customdata}: %{x:.4f}<extra></extra>",
    )  # fmt: skip


def _means(ranked: list[ComparisonRow], labels: list[str]) -> go.Scatter:
    summaries = [row.summary for row in ranked if row.summary is not None]
    said = [plain(f"{interval(s)}, {s.count} seeds") for s in summaries]
    return line(
        [s.mean for s in summaries], labels, "mean", 1, mode="markers",
        marker={"symbol": "diamond", "size": 9},
        error_x=interval_bars(summaries),
        customdata=said, hovertemplate="%{y}<br>%{x:.4f}<br>%{customdata}<extra></extra>",
    )  # fmt: skip
