"""Heatmaps of layer x module kind, made with Plotly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from rankwise.report.grid import Grid, HeatSource, heat_sources, paint, scaled
from rankwise.report.labels import plain
from rankwise.report.measures import Measure
from rankwise.report.views import Report

COLORSCALE = "cividis"
_COLOUR_DIGITS = 5
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def heatmap_groups(report: Report) -> list[dict[str, Any]]:
    """One group per profile, plan and adapter: a grid, and what can be painted on it."""
    groups = [_group(source) for source in heat_sources(report)]
    return [group for group in groups if group is not None]


def share_cells(
    groups: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """The groups with their cells' names as a place in one list; equal ones are kept once."""
    kept: list[list[Any]] = []
    packed = []
    for group in groups:
        [trace] = group["figure"]["data"]
        cells = trace["customdata"]
        if cells not in kept:
            kept.append(cells)
        bare = {key: value for key, value in trace.items() if key != "customdata"}
        figure = {**group["figure"], "data": [bare]}
        packed.append({**group, "figure": figure, "cells": kept.index(cells)})
    return packed, kept


def _group(source: HeatSource) -> dict[str, Any] | None:
    grid = source.grid
    if grid is None:
        return None
    modules: Mapping[str, Any] = source.view.modules
    shown = []
    for measure in source.measures:
        values = {n: value for n, value in source.values(measure).items() if n in grid.at}
        if any(value is not None for value in values.values()):
            shown.append(_view(measure, values, grid))
    figure = _empty_figure(grid, modules)
    return {
        "label": source.label,
        "source": list(source.where),
        "figure": figure.to_plotly_json(),
        "views": shown,
    }


def _empty_figure(grid: Grid, modules: Mapping[str, Any]) -> go.Figure:
    """The heatmap without its colours: names, shapes and axes."""
    cells: list[list[list[str] | None]] = [[None] * len(grid.columns) for _ in grid.rows]
    for name, module in modules.items():
        if name not in grid.at:
            continue
        i, j = grid.at[name]
        shape = limit = ""
        if module.d_in is not None and module.d_out is not None:
            shape = f"<br>{module.d_out} × {module.d_in} (out × in)"
            limit = f" of at most {min(module.d_in, module.d_out)}"
        cells[i][j] = [plain(name), shape, limit]
    figure = go.Figure(
        go.Heatmap(
            x=[plain(label) for label in grid.columns],
            y=[plain(label) for label in grid.rows],
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
        height=min(max(22 * len(grid.rows) + 80, 260), 1600),
    )
    return figure


def _view(measure: Measure, values: Mapping[str, float | None], grid: Grid) -> dict[str, Any]:
    base, painted = paint(measure, values)
    z: list[list[float | None]] = [[None] * len(grid.columns) for _ in grid.rows]
    text: list[list[str]] = [[""] * len(grid.columns) for _ in grid.rows]
    for name, place in painted.items():
        i, j = grid.at[name]
        z[i][j] = float(f"{place:.{_COLOUR_DIGITS}g}")  # as many as a colour can show
        text[i][j] = measure.show(values[name] or 0.0)
    colorbar: dict[str, Any] = {"title": {"text": measure.unit}}
    trace: dict[str, Any] = {
        "z": z,
        "text": text,
        "colorbar": colorbar,
        "hovertemplate": "%{customdata[0]}%{customdata[1]}<br>"
        f"<b>{measure.label} %{{text}}</b>"
        + ("%{customdata[2]}" if measure.unit == "dimensions" else "")
        + "<extra></extra>",
    }
    notes = [measure.reading]
    if base is not None and painted:
        notes.append("The colour scale is logarithmic.")
    blank = sum(value == 0 for value in values.values()) if base is not None else 0
    if blank:
        notes.append(f"{blank} modules of value 0 are left blank.")
    if painted:
        shown = [value for name in painted if (value := values[name]) is not None]
        low, high = min(shown), max(shown)
        colorbar |= _colorbar_ticks(low, high, base, measure)
        if low == high:
            trace |= {"zmin": scaled(low, base) - 1, "zmax": scaled(low, base) + 1}
            notes.append(f"Every module has the same value, {measure.show(low)}.")
    return {
        "key": measure.key,
        "label": measure.label,
        "reading": " ".join(notes),
        "base": base,
        "trace": trace,
    }


def _colorbar_ticks(
    low: float, high: float, base: int | None, measure: Measure
) -> dict[str, list[Any]]:
    """Where they are and what they say; nothing where Plotly's own will do."""
    ticks = [low] if low == high else _ticks(low, high, base)
    if not ticks:
        return {}
    return {
        "tickvals": [scaled(tick, base) for tick in ticks],
        "ticktext": [_tick_text(tick, measure) for tick in ticks],
    }


def _ticks(low: float, high: float, base: int | None) -> list[float]:
    """Round values of a logarithmic scale between two bounds; none for a linear scale."""
    if base is None:
        return []
    first, last = math.floor(scaled(low, base)), math.ceil(scaled(high, base))
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
