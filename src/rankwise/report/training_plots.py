"""Plots of what happened while training: dimensions of gradients, and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from rankwise.report.heatmaps import COLORSCALE
from rankwise.report.labels import kind_labels, plain
from rankwise.report.plots import Variant, axis, line, shape_layout, variant
from rankwise.report.training_views import EACH, EventView, RankHistory
from rankwise.report.views import Report, RunView
from rankwise.targets import layer_position

_DASHES = ("solid", "dash", "dot", "dashdot")

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
                list(lines(tracking.steps, curves, tracking.mean_by_kind[key], label))
            )
            scale = {"type": "log"} if key == "gradient_norm" else {"rangemode": "tozero"}
            shape_layout(
                figure, axis("optimizer steps", tickformat=",d"), axis(f"{label}, {unit}", **scale)
            )
            _mark_events(figure, run.events)
            words = [reading, which(tracking.count)]
            if run.events:
                words.append(_EVENT_LINES)
            found.append(variant(named(run, runs, label), " ".join(words), figure))
    return found


def history_variants(report: Report) -> list[Variant]:
    """Ranks over training of runs that moved them: means by kind, and every module."""
    runs = [run for run in report.runs if run.rank_history is not None]
    found = []
    for run in runs:
        history = run.rank_history
        assert history is not None
        means = go.Figure(
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
            means,
            axis("optimizer steps", tickformat=",d"),
            axis("mean rank, dimensions"),
        )
        _mark_events(means, run.events)
        found.append(variant(named(run, runs, "mean by kind"), f"{_HISTORY} {_EVENT_LINES}", means))
        found.append(variant(named(run, runs, "every module"), _HISTORY_MAP, _history_map(history)))
    return found


def _history_map(history: RankHistory) -> go.Figure:
    names = list(history.modules)
    figure = go.Figure(
        go.Heatmap(
            x=[f"{step:,}" for step in history.steps],
            y=[plain(name) for name in names],
            z=[history.modules[name] for name in names],
            colorscale=COLORSCALE,
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


def lines(steps: Sequence[int], curves: Curves, means: Curves, label: str) -> Iterator[go.Scatter]:
    """A line for each module; for each kind where there are no curves of modules."""
    kinds = list(dict.fromkeys(layer_position(name).kind for name in curves))
    if not curves:
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


def named(run: RunView, runs: Sequence[RunView], what: str) -> str:
    """What a switch says: with the run's name where there are several."""
    return what if len(runs) == 1 else f"{run.label}: {what}"


def which(count: int) -> str:
    """What a line stands for."""
    if count <= EACH:
        return "One line a module; dashes tell layers apart."
    return f"Lines are means over the {count:,} modules, by kind."


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
