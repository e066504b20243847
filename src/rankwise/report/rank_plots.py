"""Plots of plans and of what training made of them: ranks by layer, histograms, spectra."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import plotly.graph_objects as go

from rankwise.report.grid import Grid
from rankwise.report.labels import kind_labels, plain
from rankwise.report.plots import Variant, axis, line, shape_layout, variant
from rankwise.report.views import PlanView, Report, UpdateView
from rankwise.report.words import percent, whole
from rankwise.targets import layer_position

_WIDE = 16  # ranks that span this factor are shown on a logarithmic axis


def rank_variants(report: Report) -> list[Variant]:
    """Ranks layer by layer against the uniform rank of the same budget, one variant a plan."""
    found = []
    for plan in _uneven_first(report):
        grid = Grid.of(plan.modules)
        if grid is None:
            continue
        reach = {name: module.reach for name, module in plan.modules.items()}
        figure = _by_layer(grid, reach)
        if plan.even_rank is not None:
            even = f"{plan.even_rank:.3g}"
            figure.add_trace(
                go.Scatter(
                    x=[grid.rows[0], grid.rows[-1]],
                    y=[plan.even_rank, plan.even_rank],
                    name=f"uniform LoRA, r = {even}",
                    mode="lines",
                    line={"width": 3, "dash": "dash"},
                    meta={"ink": True},
                    hovertemplate=f"uniform LoRA of as many parameters: r = {even}<extra></extra>",
                )
            )
        low, high = min(reach.values()), max(reach.values())
        wide = high >= _WIDE * low
        scale = {"type": "log", "dtick": math.log10(2)} if wide else {"rangemode": "tozero"}
        blocked = plan.blocks.max > 1
        title = "reach n × r, dimensions" if blocked else "rank, dimensions"
        shape_layout(figure, axis("layer", type="category"), axis(title, **scale))
        found.append(variant(plan.label, _rank_reading(plan), figure))
    return found


def histogram_variants(report: Report) -> list[Variant]:
    """How many modules have which rank, stacked by kind; of blocks where the plan has any."""
    found = []
    for plan in _uneven_first(report):
        blocked = plan.blocks.max > 1
        reach = {name: module.reach for name, module in plan.modules.items()}
        kinds: dict[str, list[int]] = {}
        for name, value in reach.items():
            kinds.setdefault(layer_position(name).kind, []).append(value)
        values = sorted(set(reach.values()))
        bars = []
        for series, (label, members) in enumerate(
            zip(kind_labels(list(kinds)), kinds.values(), strict=True)
        ):
            counts = Counter(members)
            bars.append(
                go.Bar(
                    x=[str(value) for value in values],
                    y=[counts[value] for value in values],
                    name=plain(label),
                    meta={"series": series},
                    hovertemplate="%{fullData.name}: %{y} modules of rank %{x}<extra></extra>",
                )
            )
        title = "reach n × r, dimensions" if blocked else "rank, dimensions"
        figure = shape_layout(
            go.Figure(bars),
            axis(
                title, type="category", categoryorder="array", categoryarray=list(map(str, values))
            ),
            axis("modules", tickformat=",d"),
        )
        figure.update_layout(barmode="stack", bargap=0.15, legend_traceorder="normal")
        found.append(variant(plan.label, _HISTOGRAM, figure))
    return found


def _uneven_first(report: Report) -> list[PlanView]:
    """The plans, those with equal ranks everywhere last."""
    return sorted(report.plans, key=lambda plan: not plan.serving.uneven)


def update_variants(report: Report) -> list[Variant]:
    """Median singular values of the learned updates, by kind, one variant an adapter."""
    found = []
    for update in report.updates:
        lines = [
            line(
                list(range(1, len(values) + 1)),
                values,
                label,
                series,
                hovertemplate="%{fullData.name}, singular value %{x}<br>%{y:.2e}<extra></extra>",
            )
            for series, (label, values) in enumerate(
                zip(
                    kind_labels(list(update.median_spectra)),
                    update.median_spectra.values(),
                    strict=True,
                )
            )
        ]
        figure = shape_layout(
            go.Figure(lines),
            axis("singular value, largest first", tickformat=",d"),
            axis("median over layers, units of weight", type="log", exponentformat="power"),
        )
        found.append(variant(update.label, _UPDATES, figure))
    return found


def stable_rank_variants(report: Report) -> list[Variant]:
    """Stable rank of the learned updates, layer by layer."""
    found = []
    for update in report.updates:
        grid = Grid.of(update.modules)
        if grid is None:
            continue
        ranks = {name: module.update_stable_rank for name, module in update.modules.items()}
        figure = shape_layout(
            _by_layer(grid, ranks),
            axis("layer", type="category"),
            axis("stable rank, dimensions", rangemode="tozero"),
        )
        found.append(variant(update.label, _stable_reading(update), figure))
    return found


def _by_layer(grid: Grid, values: Mapping[str, float]) -> go.Figure:
    """One line a kind, over the layers in order."""
    columns: list[dict[int, float]] = [{} for _ in grid.columns]
    for name, (row, column) in grid.at.items():
        columns[column][row] = values[name]
    return go.Figure(
        [
            line(
                [plain(grid.rows[row]) for row in sorted(points)],  # type: ignore[misc]
                [points[row] for row in sorted(points)],
                label,
                series,
                marker={"size": 5},
                hovertemplate="%{fullData.name}, layer %{x}<br>%{y}<extra></extra>",
            )
            for series, (label, points) in enumerate(zip(grid.columns, columns, strict=True))
        ]
    ).update_xaxes(categoryorder="array", categoryarray=[plain(row) for row in grid.rows])


def _rank_reading(plan: PlanView) -> str:
    """How to read the ranks, and how much of the budget they use."""
    what = (
        "Lines show the highest rank n × r that each module's n blocks can reach"
        if plan.blocks.max > 1
        else "Lines show each module's rank"
    )
    words = f"{what}; the dashed line is what equal ranks would give everywhere. "
    words += f"The plan uses {whole(plan.parameters)} trainable parameters"
    if plan.budget is not None and plan.used is not None:
        words += f", {percent(plan.used)} of its budget of {whole(plan.budget)}"
    return words + "."


def _stable_reading(update: UpdateView) -> str:
    if update.kind == "lrlora":
        return (
            "How many directions each learned update s·f(B·A) really uses; f can lift it above the "
            "rank of B·A, up to the smaller side of the layer."
        )
    ranks = [module.reach for module in update.modules.values()]
    given = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    return (
        "How many directions each learned update really uses; the adapters could reach rank "
        f"{given}. Values far below that say that the rank lies mostly idle."
    )


_HISTOGRAM = (
    "How many modules got which rank, by kind of module: one tall bar is a uniform plan, a wide "
    "spread one that follows the gradients."
)
_UPDATES = (
    "Median over the layers of each singular value of the scaled update, s·B·A or s·f(B·A). A line "
    "that drops early has learned few directions; a flat one uses the rank it was given."
)
