"""What a run folder holds beside its record, as the report shows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from rankwise.artifacts import EVENTS_FILE
from rankwise.dynamic import RankEvent
from rankwise.errors import FileError
from rankwise.files import parse_json, read_text
from rankwise.report.training_views import (
    EACH,
    EventView,
    FunctionView,
    LandscapeView,
    LearnedView,
    RankHistory,
    TrackingView,
)
from rankwise.run_files import (
    ANALYSIS_FILE,
    LANDSCAPE_FILE,
    TRACKING_FILE,
    Analysis,
    Landscape,
    TrackedModule,
    Tracking,
    load_run_file,
)
from rankwise.targets import layer_position

MEASURES = tuple(field.name for field in fields(TrackedModule))
LEARNED = ("stable_rank", "stable_rank_without_constant", "f0", "u_min", "u_max")
"""What of an analysis is shown over training."""


@dataclass(frozen=True)
class RunExtras:
    """The files of a run folder that only some runs have."""

    events: list[RankEvent] | None = None
    tracking: Tracking | None = None
    analysis: Analysis | None = None
    landscape: Landscape | None = None


def read_extras(folder: Path) -> RunExtras:
    """Read those that are there.

    Raises:
        FileError: One is malformed.
    """
    events, tracking, analysis, landscape = (
        path if (path := folder / name).is_file() else None
        for name in (EVENTS_FILE, TRACKING_FILE, ANALYSIS_FILE, LANDSCAPE_FILE)
    )
    return RunExtras(
        None if events is None else _read_events(events),
        None if tracking is None else load_run_file(tracking, Tracking),
        None if analysis is None else load_run_file(analysis, Analysis),
        None if landscape is None else load_run_file(landscape, Landscape),
    )


def _read_events(path: Path) -> list[RankEvent]:
    what = "rank events"
    return parse_json(read_text(path, what), list[RankEvent], path=path, what=what)


def event_views(events: Sequence[RankEvent]) -> list[EventView]:
    """Each event in numbers."""
    return [
        EventView(
            step=event.step,
            grew=sum(move.after > move.before for move in event.moves),
            shrank=sum(move.after < move.before for move in event.moves),
            used=event.used,
            budget=event.budget,
            discarded=event.discarded,
            batches=event.batches,
            dropped=event.dropped,
        )
        for event in events
    ]


def rank_history(
    events: Sequence[RankEvent], final: Mapping[str, int], last_step: int
) -> RankHistory | None:
    """Ranks after each event, found by undoing the moves from the last one back.

    Raises:
        FileError: The events do not lead to the final ranks.
    """
    if not events:
        return None
    ranks = dict(final)
    after = [dict(ranks)]
    for event in reversed(events):
        for move in event.moves:
            if ranks.get(move.module, 0) != move.after:
                raise FileError(
                    f"rank events: the one of step {event.step} leaves {move.module} at rank "
                    f"{move.after}, but the run has {ranks.get(move.module, 0)} there; the files "
                    "belong to different runs."
                )
            ranks[move.module] = move.before
        after.append(dict(ranks))
    after.reverse()
    steps = [0, *(event.step for event in events)]
    if last_step > steps[-1]:
        steps.append(last_step)
        after.append(after[-1])
    names = list(dict.fromkeys([*final, *ranks]))
    modules = {name: [known.get(name, 0) for known in after] for name in names}
    return RankHistory(steps, modules, _means(modules))


def tracking_view(tracking: Tracking) -> TrackingView | None:
    """Curves instead of steps; None if no step was measured.

    Raises:
        FileError: A step misses a module of the first.
    """
    if not tracking.steps:
        return None
    names = list(tracking.steps[0].modules)
    for step in tracking.steps:
        if list(step.modules) != names:
            raise FileError(
                f"tracking: step {step.step} has other modules than step {tracking.steps[0].step}."
            )
    modules = {
        name: {key: [getattr(s.modules[name], key) for s in tracking.steps] for key in MEASURES}
        for name in names
    }
    return TrackingView(
        every=tracking.every,
        steps=[step.step for step in tracking.steps],
        count=len(modules),
        modules=modules if len(modules) <= EACH else {},
        mean_by_kind={
            key: _means({name: curves[key] for name, curves in modules.items()}) for key in MEASURES
        },
    )


def learned_view(analysis: Analysis) -> LearnedView | None:
    """Curves instead of steps; None if nothing was recorded."""
    if not analysis.steps and not analysis.functions:
        return None
    names = list(dict.fromkeys(name for step in analysis.steps for name in step.modules))
    modules = {
        name: {
            key: [getattr(step.modules.get(name), key, None) for step in analysis.steps]
            for key in LEARNED
        }
        for name in names
    }
    known = [
        m.factorised
        for step in analysis.steps
        for m in step.modules.values()
        if m.factorised is not None and step.step  # earlier versions said False of the start
    ]
    return LearnedView(
        steps=[step.step for step in analysis.steps],
        count=len(modules),
        modules=modules if len(modules) <= EACH else {},
        mean_by_kind={
            key: _means({name: curves[key] for name, curves in modules.items()}) for key in LEARNED
        },
        functions=_functions(analysis),
        factorised=sum(known) / len(known) if known else None,
    )


def _functions(analysis: Analysis) -> list[FunctionView]:
    """In the order of the steps, each with what it is without its constant."""
    constants = {
        (step.step, name): module.f0
        for step in analysis.steps
        for name, module in step.modules.items()
    }
    found = []
    for f in sorted(analysis.functions, key=lambda f: f.step):
        f0 = constants.get((f.step, f.module))
        bends = [] if f0 is None else [None if value is None else value - f0 for value in f.f]
        edges, counts = f.histogram.edges, f.histogram.counts
        found.append(FunctionView(f.module, f.step, f.u, f.f, f0, bends, edges, counts))
    return found


def landscape_view(landscape: Landscape) -> LandscapeView | None:
    """The plane; None if no loss on it is finite."""
    known = [loss for row in landscape.loss for loss in row if loss is not None]
    if not known:
        return None
    middle = landscape.at.index(0.0) if 0.0 in landscape.at else None
    return LandscapeView(
        at=landscape.at,
        loss=landscape.loss,
        solution=None if middle is None else landscape.loss[middle][middle],
        lowest=min(known),
        normalisation=landscape.normalisation,
        seed=landscape.seed,
        parameters=landscape.parameters,
        parameter_norm=landscape.parameter_norm,
        cosine=landscape.cosine,
        batches=landscape.batches,
        batch_size=landscape.batch_size,
        tokens=landscape.tokens,
        data_fingerprint=landscape.data_fingerprint,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _means(curves: Mapping[str, Sequence[float | None]]) -> dict[str, list[float | None]]:
    """By kind of module, the mean at each place over the modules that have a value there."""
    kinds: dict[str, list[Sequence[float | None]]] = {}
    for name, curve in curves.items():
        kinds.setdefault(layer_position(name).kind, []).append(curve)
    return {
        kind: [_mean(values) for values in zip(*members, strict=True)]
        for kind, members in kinds.items()
    }
