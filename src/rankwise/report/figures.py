"""The plots, made with Plotly: loss curves, and heatmaps of layer x module kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from rankwise.report.load import PlanView, ProfileView, Report
from rankwise.report.words import short, whole
from rankwise.targets import layer_position

# Okabe and Ito's colours, told apart by colour-blind readers; the page's script swaps in lighter
# ones on a dark ground, in this order
SERIES_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B38600", "#56B4E9", "#5A5A5A")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
COLORSCALE = "cividis"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def plain(text: str) -> str:
    """Text that Plotly shows as it is; it reads a subset of HTML in labels and hover texts.

    Hover templates take names from the data (`%{customdata[0]}`), never from the template itself,
    so `%{...}` in a name is not expanded.
    """
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("\n", " ")


@dataclass(frozen=True)
class Measure:
    """One number per module that a heatmap can show.

    Attributes:
        key: Its name in `report.json`.
        label: What the switch and the colour bar say.
        unit: Its unit, for the colour bar.
        reading: One sentence on how to read it.
        show: The number as text.
        base: The base of a logarithmic colour scale, or None for a linear one.
    """

    key: str
    label: str
    unit: str
    reading: str
    show: Callable[[float], str]
    base: int | None = None


PROFILE_MEASURES = (
    Measure(
        "gid",
        "GID",
        "dimensions",
        "Gradient intrinsic dimensionality: how many directions the mean gradient of the module's "
        "weight really uses. High (yellow) asks for more blocks or rank, low (blue) for less.",
        short,
    ),
    Measure(
        "stable_rank",
        "Stable rank",
        "dimensions",
        "Squared singular values summed and divided by the largest: like GID, but deaf to the many "
        "small directions. Near 1, one direction dominates the gradient.",
        short,
    ),
    Measure(
        "sensitivity",
        "Sensitivity",
        "mean |W·G|, loss",
        "How much the loss would move if weights changed in proportion to themselves. The colour "
        "scale is logarithmic.",
        lambda value: f"{value:.1e}",
        10,
    ),
)
PLAN_MEASURES = (
    Measure(
        "rank",
        "Rank",
        "rank per module or block",
        "The rank that the method gave to the module (to each of its blocks).",
        whole,
    ),
    Measure(
        "blocks",
        "Blocks",
        "diagonal blocks",
        "The number n of diagonal blocks: the update can reach rank n times r at the parameters "
        "of rank r. Each colour step doubles n.",
        whole,
        2,
    ),
    Measure(
        "parameters",
        "Parameters",
        "trainable parameters",
        "Trainable parameters of the module's adapter, r × (inputs + outputs).",
        whole,
    ),
)


def loss_figure(report: Report) -> dict[str, Any] | None:
    """Held-out loss as lines with markers, training loss as thin lines, of all runs."""
    methods = list(dict.fromkeys(run.method for run in report.runs))
    figure = go.Figure()
    behind, front = [], []
    nth = dict.fromkeys(methods, 0)
    for run in report.runs:
        series = methods.index(run.method)
        color = SERIES_COLORS[series % len(SERIES_COLORS)]
        symbol = _SYMBOLS[(nth[run.method] if len(methods) == 1 else series) % len(_SYMBOLS)]
        nth[run.method] += 1
        if run.train_loss:
            behind.append(
                go.Scatter(
                    x=[point.step for point in run.train_loss],
                    y=[point.loss for point in run.train_loss],
                    name=f"{plain(run.label)}: training",
                    mode="lines" if len(run.train_loss) > 1 else "markers",
                    line={"color": color, "width": 1.25},
                    opacity=0.5,
                    meta={"series": series, "part": "training"},
                    hovertemplate="%{fullData.name}, step %{x}<br>%{y:.4f} nats per token"
                    "<extra></extra>",
                )
            )
        if run.held_out:
            front.append(
                go.Scatter(
                    x=[point.step for point in run.held_out],
                    y=[point.loss for point in run.held_out],
                    customdata=[
                        "too large" if point.perplexity is None else short(point.perplexity)
                        for point in run.held_out
                    ],
                    name=f"{plain(run.label)}: held-out",
                    mode="lines+markers",
                    line={"color": color, "width": 2.5},
                    marker={"symbol": symbol, "size": 9},
                    meta={"series": series, "part": "held-out"},
                    hovertemplate="%{fullData.name}, step %{x}<br>%{y:.4f} nats per token"
                    "<br>perplexity %{customdata}<extra></extra>",
                )
            )
    if not behind and not front:
        return None
    figure.add_traces(behind + front)
    figure.update_layout(
        template=go.layout.Template(),
        margin={"l": 56, "r": 12, "t": 12, "b": 48},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        xaxis={
            "title": {"text": "optimizer steps"},
            "dtick": 1 if max(run.steps for run in report.runs) < 8 else None,
            "tickformat": ",d",
        },
        yaxis={"title": {"text": "loss, nats per token"}},
        dragmode=False,
        hovermode="closest",
    )
    return dict(figure.to_plotly_json())


def heatmap_groups(report: Report) -> list[dict[str, Any]]:
    """One group per profile and per plan: a grid, and the measures that can be painted on it."""
    several = len(report.models) > 1
    groups = [
        _group(
            profile.label.capitalize() + (f" of {profile.provenance['model']}" if several else ""),
            profile,
            PROFILE_MEASURES,
        )
        for profile in report.profiles
    ] + [
        _group(
            f"Adapter: {plan.label}" + (f" for {plan.model}" if several and plan.model else ""),
            plan,
            PLAN_MEASURES,
        )
        for plan in report.plans
    ]
    return [group for group in groups if group["figure"] is not None]


def kind_labels(kinds: Sequence[str]) -> list[str]:
    """The shortest endings that tell the kinds apart: `self_attn.q_proj` becomes `q_proj`."""
    labels = []
    for kind in kinds:
        parts = kind.split(".")
        endings = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        labels.append(
            next(
                ending
                for ending in endings
                if ending == kind
                or not any(k == ending or k.endswith("." + ending) for k in kinds if k != kind)
            )
        )
    return labels


def _stack_labels(stacks: Sequence[str]) -> dict[str, str]:
    """Stack names without what they share at either end; nothing where there is one stack."""
    if len(stacks) == 1:
        return {stacks[0]: ""}
    parts = [stack.split(".") for stack in stacks]
    shortest = min(len(part) for part in parts)
    head = 0
    while head < shortest and len({part[head] for part in parts}) == 1:
        head += 1
    tail = 0
    while tail < shortest - head and len({part[-1 - tail] for part in parts}) == 1:
        tail += 1
    return {
        stack: ".".join(part[head : len(part) - tail]) + " "
        for stack, part in zip(stacks, parts, strict=True)
    }


def _group(label: str, view: ProfileView | PlanView, measures: Sequence[Measure]) -> dict[str, Any]:
    places = {name: layer_position(name) for name in view.modules}
    placed = {name: place for name, place in places.items() if place.index is not None}
    kinds = list(dict.fromkeys(place.kind for place in placed.values()))
    rows = list(dict.fromkeys((place.stack, place.index) for place in placed.values()))
    if not placed:
        return {"label": label, "figure": None, "views": []}
    column = {kind: i for i, kind in enumerate(kinds)}
    row = {key: i for i, key in enumerate(rows)}
    at = {
        name: (row[place.stack, place.index], column[place.kind]) for name, place in placed.items()
    }
    stacks = _stack_labels(list(dict.fromkeys(stack for stack, _ in rows)))

    cells: list[list[list[str] | None]] = [[None] * len(kinds) for _ in rows]
    for name, (i, j) in at.items():
        module = view.modules[name]
        shape = limit = ""
        if module.d_in is not None and module.d_out is not None:
            shape = f"<br>{module.d_out} × {module.d_in} (out × in)"
            limit = f" of at most {min(module.d_in, module.d_out)}"
        cells[i][j] = [plain(name), shape, limit]
    figure = go.Figure(
        go.Heatmap(
            x=[plain(kind) for kind in kind_labels(kinds)],
            y=[plain(f"{stacks[stack]}{index}") for stack, index in rows],
            customdata=cells,
            colorscale=COLORSCALE,
            xgap=1,
            ygap=1,
            hoverongaps=False,
        )
    )
    figure.update_layout(
        template=go.layout.Template(),
        margin={"l": 48, "r": 12, "t": 56, "b": 12},
        xaxis={"type": "category", "side": "top", "fixedrange": True, "showgrid": False},
        yaxis={
            "type": "category",
            "fixedrange": True,
            "showgrid": False,
            "automargin": True,
            "title": {"text": "layer"},
        },
        dragmode=False,
        height=min(max(22 * len(rows) + 80, 260), 1600),
    )
    shown = []
    for measure in measures:
        values = {name: getattr(view.modules[name], measure.key) for name in at}
        if all(value is not None for value in values.values()):
            shown.append(_view(measure, values, at, (len(rows), len(kinds))))
    return {"label": label, "figure": figure.to_plotly_json(), "views": shown}


def _view(
    measure: Measure,
    values: Mapping[str, float],
    at: Mapping[str, tuple[int, int]],
    size: tuple[int, int],
) -> dict[str, Any]:
    z: list[list[float | None]] = [[None] * size[1] for _ in range(size[0])]
    text: list[list[str]] = [[""] * size[1] for _ in range(size[0])]
    blank = []
    painted = []
    for name, (i, j) in at.items():
        value = values[name]
        if measure.base is not None and value <= 0:
            blank.append(name)  # has no logarithm
            continue
        z[i][j] = value if measure.base is None else _scaled(value, measure.base)
        text[i][j] = measure.show(value)
        painted.append(value)
    colorbar: dict[str, Any] = {"title": {"text": measure.unit}}
    limits: tuple[float, float] | None = None
    if painted:
        low, high = min(painted), max(painted)
        ticks = [low] if low == high else _ticks(low, high, measure.base)
        if ticks:
            colorbar["tickvals"] = [_scaled(tick, measure.base) for tick in ticks]
            colorbar["ticktext"] = [_tick_text(tick, measure) for tick in ticks]
        middle = _scaled(low, measure.base)
        limits = (middle - 1, middle + 1) if low == high else None
    note = ""
    if blank:
        note = f"{len(blank)} modules of value 0 are left blank."
    elif limits is not None:
        note = f"Every module has the same value, {measure.show(painted[0])}."
    trace: dict[str, Any] = {
        "z": z,
        "text": text,
        "colorbar": colorbar,
        "hovertemplate": "%{customdata[0]}%{customdata[1]}<br>"
        f"<b>{measure.label} %{{text}}</b>"
        + ("%{customdata[2]}" if measure.unit == "dimensions" else "")
        + "<extra></extra>",
    }
    if limits is not None:
        trace |= {"zmin": limits[0], "zmax": limits[1]}
    return {
        "key": measure.key,
        "label": measure.label,
        "reading": f"{measure.reading} {note}".strip(),
        "trace": trace,
    }


def _scaled(value: float, base: int | None) -> float:
    if base is None:
        return value
    return math.log2(value) if base == 2 else math.log10(value)


def _ticks(low: float, high: float, base: int | None) -> list[float]:
    """Round values of a logarithmic scale between two bounds; none for a linear scale."""
    if base is None:
        return []
    first, last = math.floor(_scaled(low, base)), math.ceil(_scaled(high, base))
    steps = (1.0, 2.0, 5.0) if base == 10 and last - first <= 3 else (1.0,)
    every = max(1, (last - first) // 8)
    return [
        step * float(base) ** power
        for power in range(first, last + 1, every)
        for step in steps
        if low * 0.999 <= step * float(base) ** power <= high * 1.001
    ] or [low, high]


def _tick_text(value: float, measure: Measure) -> str:
    if measure.base != 10:
        return measure.show(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
    digit = float(mantissa)
    return power if digit == 1 else f"{digit:g}·{power}"
