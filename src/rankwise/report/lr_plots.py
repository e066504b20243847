"""Plots of LR-LoRA: the learned functions over the entries of U, and the updates over training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import plotly.graph_objects as go

from rankwise.report.plots import Variant, axis, line, shape_layout, variant
from rankwise.report.training_plots import lines, named, which
from rankwise.report.training_views import FunctionView
from rankwise.report.views import Report
from rankwise.report.words import percent, short


def function_variants(report: Report) -> list[Variant]:
    """LR-LoRA's f at every recorded step over the histogram of U, two variants a module.

    The second is without f(0), which soon is so much larger than the rest that it hides it.
    """
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
            figure = _functions(functions, "f", [(f.step, f.u, f.f) for f in functions])
            found.append(variant(named(run, runs, name), words, figure))
            known = [f for f in functions if f.bends]
            if known:
                bends = [(f.step, f.u, f.bends) for f in known]
                words = _BENDS.format(f0=short(known[-1].f0 or 0.0), step=f"{known[-1].step:,}")
                figure = _functions(functions, "f − f(0)", bends)
                found.append(variant(named(run, runs, f"{name}, without f(0)"), words, figure))
    return found


def _functions(
    functions: Sequence[FunctionView],
    what: str,
    curves: Sequence[tuple[int, list[float], list[float | None]]],
) -> go.Figure:
    """Curves of `what` as (step, u, values) over the histogram of the last step."""
    figure = shape_layout(
        go.Figure(
            [
                _histogram(functions[-1]),
                *(
                    line(
                        u,
                        values,
                        f"{what}, step {step:,}",
                        series,
                        mode="lines",
                        yaxis="y2",
                        hovertemplate="%{fullData.name}<br>u = %{x:.3g}<br>%{y:.3g}<extra></extra>",
                    )
                    for series, (step, u, values) in enumerate(curves)
                ),
            ]
        ),
        axis("u, an entry of U = B·A"),
        axis("entries of U", side="right", showgrid=False, tickformat=",d"),
    )
    figure.update_layout(
        yaxis2=axis(
            what.replace("f", "f(u)", 1),
            overlaying="y",
            side="left",
            tickmode="auto",
            zeroline=True,
            exponentformat="power",
        ),
        bargap=0,
    )
    return figure


def _histogram(function: FunctionView) -> go.Bar:
    edges = function.edges
    return go.Bar(
        x=edges[:-1],
        y=function.counts,
        width=[right - left for left, right in pairwise(edges)],
        offset=0,
        name=f"entries of U, step {function.step:,}",
        opacity=0.35,
        meta={"soft": True},
        hovertemplate="U from %{x:.3g}: %{y:,} entries<extra></extra>",
    )


def learned_variants(report: Report) -> list[Variant]:
    """Stable rank of LR-LoRA's updates and range of U over training."""
    runs = [run for run in report.runs if run.learned is not None and run.learned.steps]
    found = []
    for run in runs:
        learned = run.learned
        assert learned is not None
        for key, (label, unit, reading) in _LEARNED.items():
            curves = {name: values[key] for name, values in learned.modules.items()}
            means = learned.mean_by_kind[key]
            if all(value is None for curve in means.values() for value in curve):
                continue
            figure = shape_layout(
                go.Figure(list(lines(learned.steps, curves, means, label))),
                axis("optimizer steps", tickformat=",d"),
                axis(f"{label}, {unit}"),
            )
            found.append(
                variant(named(run, runs, label), f"{reading} {which(learned.count)}", figure)
            )
    return found


_LEARNED = {
    "stable_rank": (
        "stable rank",
        "dimensions",
        "How many directions the update really uses; LR-LoRA's f can lift it above the rank of "
        "B·A.",
    ),
    "stable_rank_without_constant": (
        "stable rank without f(0)",
        "dimensions",
        "The same without the constant f(0), which is one direction in every entry and can hide "
        "the others.",
    ),
    "f0": (
        "f(0)",
        "before scaling",
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
    "a straight line through 0 would be plain LoRA, bends are what it adds, and a flat line adds "
    "one constant to every weight."
)
_BENDS = (
    "The same without the constant f(0), which is {f0} at step {step} and moves every weight "
    "alike. A straight line through 0 would be plain LoRA, bends are what LR-LoRA adds; hold the "
    "left axis against the constant to see how much either is."
)
