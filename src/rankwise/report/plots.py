"""Line, bar and scatter plots, made with Plotly; the page's script adds colours and widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from rankwise.report.labels import kind_labels, plain
from rankwise.report.views import Curve, ProfileView, Report, RunView
from rankwise.report.words import short
from rankwise.targets import layer_position

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")

Variant = dict[str, Any]


def variant(label: str, reading: str, figure: go.Figure, **facts: Any) -> Variant:
    """One figure that a plot can switch to, with the sentence that says how to read it."""
    return {"label": label, "reading": reading, "figure": figure.to_plotly_json(), **facts}


def line(
    x: Sequence[float],
    y: Sequence[float | None] | Sequence[str],
    name: str,
    series: int,
    **more: Any,
) -> go.Scatter:
    """A line with markers in the symbol of its series; the page's styles hold its colour."""
    options: dict[str, Any] = {
        "mode": "lines+markers",
        "line": {"width": 2},
        "marker": {"symbol": SYMBOLS[series % len(SYMBOLS)], "size": 7},
        "meta": {"series": series},
    }
    return go.Scatter(x=list(x), y=list(y), name=plain(name), **(options | more))


def shape_layout(figure: go.Figure, x: Mapping[str, Any], y: Mapping[str, Any]) -> go.Figure:
    """What every plot shares: no template, a legend above, titled axes."""
    figure.update_layout(
        template=go.layout.Template(),
        margin={"l": 60, "r": 12, "t": 12, "b": 48},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        xaxis=dict(x),
        yaxis=dict(y),
        dragmode=False,
        hovermode="closest",
        height=400,
    )
    return figure


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with its title, which names the unit."""
    return {"title": {"text": title}, "automargin": True, **more}


def doubling_axis(title: str, values: Sequence[int]) -> dict[str, Any]:
    """A logarithmic axis with a tick at each of the values, which double."""
    shown = list(values)[:: max(1, len(values) // 8)]
    texts = [f"{value:,}" for value in shown]
    return axis(title, type="log", tickvals=shown, ticktext=texts)


def loss_variants(report: Report) -> list[Variant]:
    """Held-out loss as lines with markers, training loss as thin lines, of all runs."""
    methods = list(dict.fromkeys(run.method for run in report.runs))
    behind, front = [], []
    nth = dict.fromkeys(methods, 0)
    for run in report.runs:
        series = methods.index(run.method)
        symbol = SYMBOLS[(nth[run.method] if len(methods) == 1 else series) % len(SYMBOLS)]
        nth[run.method] += 1
        if run.train_loss:
            behind.append(_training_loss(run, series))
        if run.held_out:
            front.append(_held_out_loss(run, series, symbol))
        front += _event_marks(run, series)
    if not behind and not front:
        return []
    few = max(run.steps for run in report.runs) < 8
    figure = shape_layout(
        go.Figure(behind + front),
        axis("optimizer steps", tickformat=",d", dtick=1 if few else None),
        axis("loss, nats per token"),
    )
    moved = any(run.events for run in report.runs)
    return [variant("", f"{_LOSS} {_EVENTS}" if moved else _LOSS, figure)]


def _training_loss(run: RunView, series: int) -> go.Scatter:
    return line(
        [point.step for point in run.train_loss],
        [point.loss for point in run.train_loss],
        f"{run.label}: training",
        series,
        mode="lines" if len(run.train_loss) > 1 else "markers",
        line={"width": 1.25},
        opacity=0.5,
        meta={"series": series, "part": "training"},
        hovertemplate="%{fullData.name}, step %{x}<br>%{y:.4f} nats per token<extra></extra>",
    )


def _held_out_loss(run: RunView, series: int, symbol: str) -> go.Scatter:
    return line(
        [point.step for point in run.held_out],
        [point.loss for point in run.held_out],
        f"{run.label}: held-out",
        series,
        customdata=[
            "too large" if point.perplexity is None else short(point.perplexity)
            for point in run.held_out
        ],
        line={"width": 2.5},
        marker={"symbol": symbol, "size": 9},
        meta={"series": series, "part": "held-out"},
        hovertemplate="%{fullData.name}, step %{x}<br>%{y:.4f} nats per token"
        "<br>perplexity %{customdata}<extra></extra>",
    )


def _event_marks(run: RunView, series: int) -> list[go.Scatter]:
    """Where ranks moved, on a curve of the run that has the step, else at its last loss before."""
    exact = {point.step: point.loss for point in (*run.train_loss, *run.held_out)}
    placed = [
        (event, exact[max(before)])
        for event in run.events
        if (before := [step for step in exact if step <= event.step])
    ]
    if not placed:
        return []
    return [
        line(
            [event.step for event, _ in placed],
            [loss for _, loss in placed],
            f"{run.label}: ranks moved",
            series,
            mode="markers",
            marker={"symbol": "triangle-down", "size": 12, "line": {"width": 1}},
            meta={"series": series, "part": "events"},
            customdata=[
                f"{e.grew} modules grew, {e.shrank} shrank<br>{e.used:,} of {e.budget:,} parameters"
                for e, _ in placed
            ],
            hovertemplate="%{fullData.name}, step %{x}<br>%{customdata}<extra></extra>",
        )
    ]


def curve_variants(report: Report) -> list[Variant]:
    """Share of the gradient energy that uniform and water-filled ranks capture, by budget."""
    return [
        variant(profile.label, f"{_CURVE} {curve.recommendation}", _budget_curve(curve))
        for profile in report.profiles
        if (curve := profile.curve) is not None
    ]


def _budget_curve(curve: Curve) -> go.Figure:
    budgets = [point.parameters for point in curve.points]
    hover = "%{fullData.name}<br>r = %{customdata}, %{x:,} parameters<br>%{y:.1%}"
    chosen = next(point for point in curve.points if point.r == curve.recommended_r)
    curves = [
        line(
            budgets,
            [getattr(point, key) for point in curve.points],
            name,
            series,
            customdata=[point.r for point in curve.points],
            hovertemplate=f"{hover}<extra></extra>",
        )
        for series, (key, name) in enumerate(
            {"water_fill": "best ranks", "uniform": "equal ranks"}.items()
        )
    ]
    ring = go.Scatter(
        x=[chosen.parameters],
        y=[chosen.water_fill],
        name=f"recommended: r = {chosen.r}",
        mode="markers",
        marker={"symbol": "circle-open", "size": 18, "line": {"width": 3}},
        meta={"ink": True},
        hoverinfo="skip",
    )
    return shape_layout(
        go.Figure([*curves, ring]),
        doubling_axis("budget, trainable parameters", budgets),
        axis("captured gradient energy, %", tickformat=".0%"),
    )


def convergence_variants(report: Report) -> list[Variant]:
    """Mean GID after 1, 2, 4, ..., N batches, by kind of module and of all."""
    found = []
    for profile in report.profiles:
        curve = profile.convergence
        if curve is None:
            continue
        lines = [
            line(curve.batches, values, label, series, hovertemplate=_CONVERGENCE_HOVER)
            for series, (label, values) in enumerate(
                zip(kind_labels(list(curve.by_kind)), curve.by_kind.values(), strict=True)
            )
        ]
        mean = go.Scatter(
            x=curve.batches,
            y=curve.mean,
            name="all modules",
            mode="lines",
            line={"width": 4, "dash": "dot"},
            meta={"ink": True},
            hovertemplate=_CONVERGENCE_HOVER,
        )
        figure = shape_layout(
            go.Figure([*lines, mean]),
            doubling_axis("batches averaged", curve.batches),
            axis("mean GID, dimensions", rangemode="tozero"),
        )
        reading = f"{_CONVERGENCE} {curve.verdict[:1].upper()}{curve.verdict[1:]}."
        found.append(variant(profile.label, reading, figure))
    return found


def fisher_variants(report: Report) -> list[Variant]:
    """GID against Fisher information, one point a module, with the three correlations."""
    found = []
    for profile in report.profiles:
        facts = profile.fisher
        if facts is None or not facts.modules:
            continue
        numbers = [
            ["Pearson, GID and log F", facts.pearson_log, "signed"],
            ["Pearson, GID and 1/F", facts.pearson_inverse, "signed"],
            ["Spearman, GID and F", facts.spearman, "signed"],
            ["modules", facts.modules, "whole"],
            ["left out, without gradient or F", facts.left_out, "whole"],
        ]
        found.append(variant(profile.label, _FISHER, _fisher_points(profile), numbers=numbers))
    return found


def _fisher_points(profile: ProfileView) -> go.Figure:
    kinds: dict[str, list[str]] = {}
    for name, module in profile.modules.items():
        if module.fisher and module.gid:
            kinds.setdefault(layer_position(name).kind, []).append(name)
    points = [
        line(
            [profile.modules[name].fisher or 0.0 for name in names],
            [profile.modules[name].gid for name in names],
            label,
            series,
            mode="markers",
            customdata=[plain(name) for name in names],
            hovertemplate="%{customdata}<br>GID %{y:.1f}, Fisher %{x:.2e}<extra></extra>",
        )
        for series, (label, names) in enumerate(
            zip(kind_labels(list(kinds)), kinds.values(), strict=True)
        )
    ]
    return shape_layout(
        go.Figure(points),
        axis("Fisher information, mean squared gradient", type="log", exponentformat="power"),
        axis("GID, dimensions", rangemode="tozero"),
    )


_LOSS = (
    "Lower is better. Thick lines with markers are the held-out loss, which is what counts; thin "
    "lines are the loss on the training batches, which jumps from batch to batch. Step 0 is the "
    "model before training."
)
_EVENTS = "Triangles mark events at which ranks moved."
_CURVE = (
    "How much of the measured gradient's energy a budget can hold: where the curve turns flat, "
    "more rank buys little. The ring marks the recommended budget."
)
_CONVERGENCE = (
    "A line that has turned flat has been measured with enough batches; one that still climbs "
    "measures the batches as much as the model."
)
_CONVERGENCE_HOVER = "%{fullData.name}, %{x} batches<br>GID %{y:.1f}<extra></extra>"
_FISHER = (
    "One point a module. A correlation near +1 or −1 says that GID and Fisher information F "
    "order the modules alike (or in reverse); near 0, that they measure different things."
)
