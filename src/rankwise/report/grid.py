"""What a heatmap shows: where the modules stand, and how their numbers become colours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rankwise.report.labels import kind_labels, stack_labels
from rankwise.report.measures import PLAN_MEASURES, PROFILE_MEASURES, UPDATE_MEASURES, Measure
from rankwise.report.views import PlanView, ProfileView, Report, UpdateView
from rankwise.targets import layer_position

_WIDE = 16  # a measure that may be wide is shown on a logarithmic scale from this factor on


@dataclass(frozen=True)
class Grid:
    """Where each module of a numbered layer stands: rows are layers, columns are kinds."""

    rows: list[str]
    columns: list[str]
    at: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, names: Iterable[str]) -> Grid | None:
        """The grid of these modules; None if none is in a numbered layer."""
        places = {name: layer_position(name) for name in names}
        placed = {name: place for name, place in places.items() if place.index is not None}
        if not placed:
            return None
        kinds = list(dict.fromkeys(place.kind for place in placed.values()))
        rows = list(dict.fromkeys((place.stack, place.index) for place in placed.values()))
        row = {key: i for i, key in enumerate(rows)}
        column = {kind: i for i, kind in enumerate(kinds)}
        stacks = stack_labels(list(dict.fromkeys(stack for stack, _ in rows)))
        return cls(
            rows=[f"{stacks[stack]}{index}" for stack, index in rows],
            columns=kind_labels(kinds),
            at={name: (row[p.stack, p.index], column[p.kind]) for name, p in placed.items()},
        )


@dataclass(frozen=True)
class HeatSource:
    """A view whose modules a heatmap shows, and where `report.json` keeps it.

    `names` are the modules of the model, as far as known, so that the heatmaps of one model have
    the same cells, blank where a module has no adapter.
    """

    label: str
    where: tuple[str, int]
    view: ProfileView | PlanView | UpdateView
    measures: Sequence[Measure]
    names: Sequence[str]

    @property
    def grid(self) -> Grid | None:
        """Where the modules stand; None if none is in a numbered layer."""
        return Grid.of(self.names)

    def values(self, measure: Measure) -> dict[str, float | None]:
        """The measure of every module that the view has."""
        return {name: getattr(m, measure.key) for name, m in self.view.modules.items()}


def heat_sources(report: Report) -> list[HeatSource]:
    """Every profile, plan and adapter of the report, named for the reader."""
    several = len(report.models) > 1
    profiles = [
        HeatSource(
            profile.label.capitalize() + (f" of {profile.provenance['model']}" if several else ""),
            ("profiles", i),
            profile,
            PROFILE_MEASURES,
            list(profile.modules),
        )
        for i, profile in enumerate(report.profiles)
    ]
    plans = [
        HeatSource(
            f"Plan: {plan.label}" + (f" for {plan.model}" if several and plan.model else ""),
            ("plans", i),
            plan,
            PLAN_MEASURES,
            _names(plan, report),
        )
        for i, plan in enumerate(report.plans)
    ]
    updates = [
        HeatSource(
            f"Learned: {update.label}",
            ("updates", i),
            update,
            UPDATE_MEASURES,
            _names(update, report),
        )
        for i, update in enumerate(report.updates)
    ]
    return profiles + plans + updates


def _names(view: PlanView | UpdateView, report: Report) -> list[str]:
    """The modules of a profile that has all those of the view, else the view's own."""
    known = (p.modules for p in report.profiles if _holds(p, view))
    return list(next(known, view.modules))


def _holds(profile: ProfileView, view: PlanView | UpdateView) -> bool:
    """Whether the profile has the view's modules, in their shapes as far as these are known."""
    modules = profile.modules
    return all(
        name in modules
        and (m.d_in is None or (m.d_in, m.d_out) == (modules[name].d_in, modules[name].d_out))
        for name, m in view.modules.items()
    )


def paint(
    measure: Measure, values: Mapping[str, float | None]
) -> tuple[int | None, dict[str, float]]:
    """The base of the colour scale, None for a linear one, and each module's place on it."""
    known = {name: value for name, value in values.items() if value is not None}
    base = measure.base
    positive = [value for value in known.values() if value > 0]
    if measure.wide and positive and max(positive) >= _WIDE * min(positive):
        base = 2
    if base is None:
        return None, known
    return base, {name: scaled(value, base) for name, value in known.items() if value > 0}


def scaled(value: float, base: int | None) -> float:
    """The value's place on a scale of this base; on a linear one itself."""
    if base is None:
        return value
    return math.log2(value) if base == 2 else math.log10(value)
