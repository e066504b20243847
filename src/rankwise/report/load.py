"""From saved files to the numbers a report shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from rankwise.artifacts import (
    ADAPTER_CONFIG_FILE,
    RESULTS_FILE,
    SavedRun,
    load_run,
    recognise,
)
from rankwise.errors import FileError
from rankwise.plan import RankPlan
from rankwise.profiling.profile import GradientProfile
from rankwise.records import RunRecord
from rankwise.report.comparison_view import ComparisonView, load_comparison
from rankwise.report.limits import check_numbers
from rankwise.report.plan_view import plan_of_run, view_of_plan
from rankwise.report.profile_view import view_of_profile
from rankwise.report.run_view import view_of_run
from rankwise.report.training_view import RunExtras, read_extras
from rankwise.report.update_view import view_of_adapter
from rankwise.report.views import PlanView, ProfileView, Report, RunView, UpdateView
from rankwise.run_files import Analysis

ADAPTER_FOLDER = "adapter"
"""Where a run folder keeps its adapter."""

V = TypeVar("V", ProfileView, PlanView, UpdateView)


@dataclass(frozen=True)
class SourceRun:
    """A run record, the name of its folder, and what else lies there."""

    record: RunRecord
    folder: str
    extras: RunExtras = field(default_factory=RunExtras)


@dataclass(frozen=True)
class SourceAdapter:
    """An adapter's folder, the name to be told apart by, and what its run recorded of it.

    `run` is the place of that run among the runs, whose label the adapter then has.
    """

    folder: Path
    name: str
    analysis: Analysis | None = None
    run: int | None = None


@dataclass
class _Sources:
    """What the paths hold, read but not yet looked at."""

    profiles: list[GradientProfile] = field(default_factory=list)
    plans: list[RankPlan | SavedRun] = field(default_factory=list)
    runs: list[SourceRun] = field(default_factory=list)
    adapters: list[SourceAdapter] = field(default_factory=list)
    comparisons: list[ComparisonView] = field(default_factory=list)


def load_report(paths: Sequence[Path]) -> Report:
    """Read what the paths hold; equal profiles, plans and adapters appear once.

    Raises:
        FileError: No path is given, or one is missing, malformed or of no kind a report shows.
    """
    if not paths:
        raise FileError("paths=[]: name at least one profile, plan, run or adapter.")
    sources = _Sources()
    for path in paths:
        _read(path, sources)
    return report_of(
        profiles=sources.profiles,
        plans=sources.plans,
        runs=sources.runs,
        adapters=sources.adapters,
        comparisons=sources.comparisons,
    )


def report_of(
    *,
    profiles: Sequence[GradientProfile] = (),
    plans: Sequence[RankPlan | SavedRun] = (),
    runs: Sequence[SourceRun] = (),
    adapters: Sequence[SourceAdapter] = (),
    comparisons: Sequence[ComparisonView] = (),
) -> Report:
    """The report of what was read.

    Args:
        profiles: Gradient profiles.
        plans: Plans, or runs with or without one.
        runs: Run records with what lies beside them.
        adapters: Adapter folders.
        comparisons: Comparisons of methods.

    Raises:
        FileError: One of them holds nothing to show.
    """
    run_views = _label_runs([view_of_run(run.record, run.folder, run.extras) for run in runs])
    profile_views = _once([view_of_profile(profile) for profile in profiles])
    plan_views = _plan_views(plans, profiles)
    order = [name for view in profile_views for name in view.modules]
    order += [name for view in plan_views for name in view.modules]
    updates = [
        replace(
            view_of_adapter(each.folder, list(dict.fromkeys(order)), each.analysis),
            label=each.name if each.run is None else run_views[each.run].label,
        )
        for each in adapters
    ]
    return Report(run_views, profile_views, plan_views, _once(updates), list(comparisons))


def _plan_views(
    plans: Sequence[RankPlan | SavedRun], profiles: Sequence[GradientProfile]
) -> list[PlanView]:
    """Of the plans, and of the runs that have one or say their ranks."""
    return _once(
        [
            plan_of_run(plan, profiles)
            if isinstance(plan, SavedRun)
            else view_of_plan(plan, profiles)
            for plan in plans
            if isinstance(plan, RankPlan) or plan.plan is not None or plan.record.ranks
        ]
    )


def _read(path: Path, sources: _Sources) -> None:
    kind = recognise(path)
    named = path.resolve()
    if kind == "profile":
        sources.profiles.append(_checked(GradientProfile.load(path), path))
    elif kind == "plan":
        sources.plans.append(RankPlan.load(path))
        check_numbers(sources.plans[-1], path)
    elif kind == "comparison":
        file = path / RESULTS_FILE if path.is_dir() else path
        sources.comparisons.append(load_comparison(file))
    elif kind == "adapter":
        sources.adapters.append(SourceAdapter(path, _adapter_name(named)))
    else:
        saved = load_run(path) if kind == "run" else SavedRun(RunRecord.load(path))
        check_numbers({"record": saved.record, "plan": saved.plan}, path)
        extras = read_extras(path) if kind == "run" else RunExtras()
        folder = named.name if kind == "run" else named.parent.name
        sources.runs.append(SourceRun(saved.record, folder, extras))
        sources.plans.append(saved)
        if saved.profile is not None:
            sources.profiles.append(_checked(saved.profile, path))
        adapter = path / ADAPTER_FOLDER
        if kind == "run" and (adapter / ADAPTER_CONFIG_FILE).is_file():
            method = saved.record.method
            number = len(sources.runs) - 1
            sources.adapters.append(SourceAdapter(adapter, method, extras.analysis, number))


def _checked(profile: GradientProfile, path: Path) -> GradientProfile:
    """The profile, without a look into its lazily read arrays."""
    check_numbers({"modules": profile.modules, "provenance": profile.provenance}, path)
    return profile


def _adapter_name(folder: Path) -> str:
    """The folder's name, or its parent's where it has the name that every run gives it."""
    return folder.parent.name if folder.name == ADAPTER_FOLDER else folder.name


def _label_runs(runs: list[RunView]) -> list[RunView]:
    """Labels that tell the runs apart: method, then seed, then folder, then a number."""
    labels = [run.method for run in runs]
    for more in (
        [f", seed {run.seed}" for run in runs],
        [f", {run.folder}" for run in runs],
        [f" #{i}" for i in range(1, len(runs) + 1)],
    ):
        shared = {label for label, count in Counter(labels).items() if count > 1}
        labels = [
            label + extra if label in shared else label
            for label, extra in zip(labels, more, strict=True)
        ]
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def _once(views: list[V]) -> list[V]:
    """Each distinct view once, numbered where labels repeat."""
    distinct: list[V] = []
    for view in views:
        if view not in distinct:
            distinct.append(view)
    count = Counter(view.label for view in distinct)
    number: Counter[str] = Counter()
    labelled: list[V] = []
    for view in distinct:
        number[view.label] += 1
        label = f"{view.label} {number[view.label]}" if count[view.label] > 1 else view.label
        labelled.append(replace(view, label=label))
    return labelled
