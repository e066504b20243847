"""Plots of what happened while training: dimensions, ranks, learned functions, the landscape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from rankwise.report.labels import kind_labels, plain
from rankwise.report.plots import Variant, axis, line, shape_layout, variant
from rankwise.report.training_views import EventView, FunctionView, LandscapeView, RankHistory
from rankwise.report.views import Report, RunView
from rankwise.report.words import percent
from rankwise.targets import layer_position

_FEW = 16
"""Most modules that get a line each; more are shown by kind."""
_DASHES = ("solid", "dash", "dot", "dashdot")
_COLORSCALE = "cividis"

Curves = Mapping[str, Sequence[float | None]]


def tracking_variants(report: Report) -> list[Variant]:
    """GID and its relatives over training, one variant a run and measure."""
    runs = [run for run in report.runs if run.tracking is not None]
    found = []
    for run in runs:
        tracking = run.tracking
        assert tracking is not None
        for key, (label, unit, reading) in _TRACKED.items():
            curves = {name: values[key] for name, values in tracking.modules.items()}
            figure = go.Figure(
                list(_lines(tracking.steps, curves, tracking.mean_by_kind[key], label))
            )
            scale = {"type": "log"} if key == "gradient_norm" else {"rangemode": "tozero"}
            shape_layout(
                figure, axis("optimizer steps", tickformat=",d"), axis(f"{label}, {unit}", **scale)
            )
            _mark_events(figure, run.events)
            words = [reading, _which(curves)]
            if run.events:
                words.append(_EVENT_LINES)
            found.append(variant(_named(run, runs, label), " ".join(words), figure))
    return found


def history_variants(report: Report) -> list[Variant]:
    """Ranks over training of runs that moved them: means by kind, and every module."""
    runs = [run for run in report.runs if run.rank_history is not None]
    found = []
    for run in runs:
        history = run.rank_history
        assert history is not None
        lines = go.Figure(
            [
                line(
                    history.steps,
                    values,
                    label,
                    series,
                    line={"width": 2, "shape": "hv"},
                    hovertemplate="%{fullData.name}, from step %{x}<br>mean rank %{y:.2f}"
                    "<extra></extra>",
                )
                for series, (label, values) in enumerate(
                    zip(
                        kind_labels(list(history.mean_by_kind)),
                        history.mean_by_kind.values(),
                        strict=True,
                    )
                )
            ]
        )
        shape_layout(
            lines,
            axis("optimizer steps", tickformat=",d"),
            axis("mean rank, dimensions", rangemode="tozero"),
        )
        _mark_events(lines, run.events)
        found.append(
            variant(_named(run, runs, "mean by kind"), f"{_HISTORY} {_EVENT_LINES}", lines)
        )
        found.append(
            variant(_named(run, runs, "every module"), _HISTORY_MAP, _history_map(history))
        )
    return found


def _history_map(history: RankHistory) -> go.Figure:
    names = list(history.modules)
    figure = go.Figure(
        go.Heatmap(
            x=[f"{step:,}" for step in history.steps],
            y=[plain(name) for name in names],
            z=[history.modules[name] for name in names],
            colorscale=_COLORSCALE,
            colorbar={"title": {"text": "rank, dimensions"}},
            hovertemplate="%{y}<br>from step %{x}: rank %{z}<extra></extra>",
        )
    )
    shape_layout(
        figure,
        axis("after optimizer step", type="category"),
        axis("module, first layer on top", autorange="reversed", showticklabels=False),
    )
    figure.update_layout(height=min(max(4 * len(names) + 120, 260), 1200))
    return figure


def function_variants(report: Report) -> list[Variant]:
    """LR-LoRA's f at every recorded step over the histogram of U, one variant a module."""
    runs = [run for run in report.runs if run.learned is not None and run.learned.functions]
    found = []
    for run in runs:
        assert run.learned is not None
        modules: dict[str, list[FunctionView]] = {}
        for function in run.learned.functions:
            modules.setdefault(function.module, []).append(function)
        for name, functions in modules.items():
            words = _FUNCTION
            if run.learned.factorised is not None:
                words += (
                    f" {percent(run.learned.factorised)} of all recorded updates went through "
                    "factors, without forming U."
                )
            found.append(variant(_named(run, runs, name), words, _functions(functions)))
    return found


def _functions(functions: Sequence[FunctionView]) -> go.Figure:
    last = functions[-1]
    widths = [right - left for left, right in zip(last.edges, last.edges[1:], strict=False)]
    bars = go.Bar(
        x=last.edges[:-1],
        y=last.counts,
        width=widths,
        offset=0,
        name=f"entries of U, step {last.step:,}",
        opacity=0.35,
        meta={"soft": True},
        hovertemplate="U from %{x:.3g}: %{y:,} entries<extra></extra>",
    )
    lines = [
        line(
            function.u,
            function.f,
            f"f, step {function.step:,}",
            series,
            mode="lines",
            yaxis="y2",
            hovertemplate="%{fullData.name}<br>f(%{x:.3g}) = %{y:.3g}<extra></extra>",
        )
        for series, function in enumerate(functions)
    ]
    figure = shape_layout(
        go.Figure([bars, *lines]),
        axis("u, an entry of U = B·A"),
        axis("entries of U", side="right", showgrid=False, tickformat=",d"),
    )
    figure.update_layout(
        yaxis2=axis("f(u)", overlaying="y", side="left", zeroline=True, exponentformat="power"),
        bargap=0,
    )
    return figure


def learned_variants(report: Report) -> list[Variant]:
    """Stable rank of LR-LoRA's updates and range of U over training."""
    runs = [run for run in report.runs if run.learned is not None and run.learned.steps]
    found = []
    for run in runs:
        learned = run.learned
        assert learned is not None
        for key, (label, unit, reading) in _LEARNED.items():
            curves = {name: values[key] for name, values in learned.modules.items()}
            if all(value is None for curve in curves.values() for value in curve):
                continue
            figure = shape_layout(
                go.Figure(list(_lines(learned.steps, curves, learned.mean_by_kind[key], label))),
                axis("optimizer steps", tickformat=",d"),
                axis(f"{label}, {unit}"),
            )
            found.append(variant(_named(run, runs, label), f"{reading} {_which(curves)}", figure))
    return found


def landscape_variants(report: Report) -> list[Variant]:
    """Held-out loss on a plane through the solution, one variant a run."""
    found = []
    for run in report.runs:
        plane = run.landscape
        if plane is None:
            continue
        found.append(
            variant(
                run.label,
                _landscape_reading(plane),
                _contour(plane),
                numbers=[
                    ["loss at the solution", plane.solution, "loss"],
                    ["lowest loss on the plane", plane.lowest, "loss"],
                    ["parameters", plane.parameters, "whole"],
                    ["their norm", plane.parameter_norm, "short"],
                    ["cosine of the directions", plane.cosine, "short"],
                    ["held-out tokens", plane.tokens, "whole"],
                    ["seed", plane.seed, "whole"],
                ],
            )
        )
    return found


def _contour(plane: LandscapeView) -> go.Figure:
    title = "direction, lengths of the trained parameters"
    figure = go.Figure(
        [
            go.Contour(
                x=plane.at,
                y=plane.at,
                z=plane.loss,
                colorscale=_COLORSCALE,
                ncontours=16,
                contours={"coloring": "heatmap", "showlabels": True},
                line={"width": 0.7, "color": "#ffffff"},
                colorbar={"title": {"text": "loss, nats per token"}},
                hovertemplate="%{x:.2f}, %{y:.2f}<br>%{z:.4f} nats per token<extra></extra>",
            ),
            go.Scatter(
                x=[0.0],
                y=[0.0],
                mode="markers",
                name="the solution",
                marker={"symbol": "x", "size": 12, "color": "#ff6d00"},
                meta={"keep": True},
                hoverinfo="skip",
            ),
        ]
    )
    shape_layout(
        figure,
        axis(f"first {title}", constrain="domain"),
        axis(f"second {title}", scaleanchor="x", constrain="domain"),
    )
    figure.update_layout(height=520, showlegend=False)
    return figure


def _landscape_reading(plane: LandscapeView) -> str:
    how = (
        "each as long as all trained parameters together"
        if plane.normalisation == "norm"
        else "each of whose rows is as long as that of the trained parameters"
    )
    return (
        f"Held-out loss over {plane.batches} batches where the trained parameters are moved along "
        f"two random directions, {how}. The cross is the solution. A wide basin says that small "
        "changes cost little; two random directions of many cannot show more, and planes of "
        "different methods do not compare, because their parameters differ."
    )


def _lines(steps: Sequence[int], curves: Curves, means: Curves, label: str) -> Iterator[go.Scatter]:
    """A line for each module while they are few, else one for each kind."""
    few = len(curves) <= _FEW
    kinds = list(dict.fromkeys(layer_position(name).kind for name in curves))
    if not few:
        for series, (kind, values) in enumerate(
            zip(kind_labels(list(means)), means.values(), strict=True)
        ):
            yield line(
                steps,
                values,
                kind,
                series,
                hovertemplate=f"%{{fullData.name}}, step %{{x}}<br>mean {label} %{{y:.4g}}"
                "<extra></extra>",
            )
        return
    labels = dict(zip(kinds, kind_labels(kinds), strict=True))
    layers = list(dict.fromkeys(layer_position(name).index for name in curves))
    for name, curve in curves.items():
        place = layer_position(name)
        where = "" if place.index is None else f"layer {place.index} "
        style: dict[str, Any] = {
            "width": 2,
            "dash": _DASHES[layers.index(place.index) % len(_DASHES)],
        }
        yield line(
            steps,
            curve,
            where + labels[place.kind],
            kinds.index(place.kind),
            line=style,
            customdata=[plain(name)] * len(steps),
            hovertemplate=f"%{{customdata}}, step %{{x}}<br>{label} %{{y:.4g}}<extra></extra>",
        )


def _mark_events(figure: go.Figure, events: Sequence[EventView]) -> None:
    """A dotted vertical line at every event; the page's script adds its colour."""
    for event in events:
        figure.add_shape(
            type="line",
            x0=event.step,
            x1=event.step,
            y0=0,
            y1=1,
            yref="paper",
            line={"width": 1, "dash": "dot"},
        )


def _named(run: RunView, runs: Sequence[RunView], what: str) -> str:
    return what if len(runs) == 1 else f"{run.label}: {what}"


def _which(curves: Curves) -> str:
    if len(curves) <= _FEW:
        return "One line a module; dashes tell layers apart."
    return f"Lines are means over the {len(curves):,} modules, by kind."


_EVENT_LINES = "Dotted verticals are events at which ranks moved."
_HISTORY = (
    "How much rank each kind of module has, on average, as training goes on; a line moves where an "
    "event gave or took rank within the same budget."
)
_HISTORY_MAP = (
    "One row a module, from the first layer down; a change of colour along a row is a change of "
    "rank."
)
_TRACKED = {
    "gid": (
        "GID",
        "dimensions",
        "Gradient intrinsic dimensionality on the training batches of that step: how many "
        "directions the gradient of the module's weight uses. A rise that levels off says that the "
        "gradient has settled into its dimensions; compare it with the rank that the module has.",
    ),
    "stable_rank": (
        "stable rank",
        "dimensions",
        "Squared singular values of the gradient, summed, over the largest: near 1, one direction "
        "dominates.",
    ),
    "energy_rank": (
        "energy rank",
        "dimensions",
        "Fewest singular directions that hold 90 % of the gradient's energy.",
    ),
    "gradient_norm": (
        "gradient norm",
        "loss per unit of weight",
        "How steep the loss still is in the module's weight. The scale is logarithmic.",
    ),
}
_LEARNED = {
    "stable_rank": (
        "stable rank",
        "dimensions",
        "How many directions the update f(B·A) really uses; f can lift it above the rank of B·A.",
    ),
    "stable_rank_without_constant": (
        "stable rank without f(0)",
        "dimensions",
        "The same without the constant f(0), which is one direction in every entry and can hide "
        "the others.",
    ),
    "f0": (
        "f(0)",
        "units of weight",
        "What the function adds to every entry alike; near 0, the update is what U makes of it.",
    ),
    "u_min": ("smallest entry of U", "units of u", "Where the entries of U = B·A begin."),
    "u_max": (
        "largest entry of U",
        "units of u",
        "Where the entries of U = B·A end; beyond the grid's ends the function has nothing to "
        "learn with.",
    ),
}
_FUNCTION = (
    "Lines (left axis) are the learned function at several steps; bars (right axis) are how many "
    "entries of U lie there at the last of them. Only where there are bars does the shape matter: "
    "a straight line through 0 would be plain LoRA, bends are what it adds."
)
