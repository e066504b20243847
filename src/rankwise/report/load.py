"""From saved files to the numbers a report shows: the content of `report.json`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rankwise.artifacts import SavedRun, load_run, recognise
from rankwise.errors import FileError
from rankwise.plan import RankPlan
from rankwise.profiling.profile import GradientProfile
from rankwise.records import RunRecord
from rankwise.spectra import stable_rank
from rankwise.targets import layer_position

SCHEMA_VERSION = 1

# what of a run's configuration a reader needs to judge its numbers
_SETTINGS = {
    "training": (
        "batch_size",
        "gradient_accumulation",
        "learning_rate",
        "scheduler",
        "warmup",
        "weight_decay",
        "dropout",
    ),
    "data": ("max_length", "packing"),
}


@dataclass(frozen=True)
class Spread:
    """Mean and extremes of one number over the modules."""

    mean: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one value."""
        listed = list(values)
        return cls(sum(listed) / len(listed), min(listed), max(listed))


@dataclass(frozen=True)
class ModuleGradient:
    """What a profile says of one module; `sensitivity` in loss, the ranks are dimensions."""

    d_in: int
    d_out: int
    gid: float
    stable_rank: float
    sensitivity: float


@dataclass(frozen=True)
class ProfileView:
    """A gradient profile as the report shows it."""

    label: str
    provenance: dict[str, Any]
    gid: Spread
    gid_by_kind: dict[str, Spread]
    modules: dict[str, ModuleGradient]


@dataclass(frozen=True)
class ModuleAdapter:
    """The adapter of one module; a lone run record knows no shapes, hence no parameters."""

    rank: int
    blocks: int
    d_in: int | None = None
    d_out: int | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class PlanView:
    """A rank plan as the report shows it, or what a lone run record says of one."""

    label: str
    method: str
    model: str
    model_fingerprint: str | None
    parameters: int
    ranks: Spread
    blocks: Spread
    modules: dict[str, ModuleAdapter]
    r_ref: int | None = None
    alpha: float | None = None
    budget: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LossPoint:
    """One point of a loss curve in nats per token; perplexity is None where it overflows."""

    step: int
    loss: float
    perplexity: float | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class RunView:
    """A run record as the report shows it."""

    label: str
    folder: str
    method: str
    model: str
    model_fingerprint: str
    seed: int
    trainable_parameters: int
    ranks: Spread
    blocks: Spread
    held_out: list[LossPoint]
    train_loss: list[LossPoint]
    seconds: dict[str, float]
    peak_memory_mib: float | None
    train_tokens: int
    dtype: str | None
    settings: dict[str, Any]
    data: dict[str, str]
    versions: dict[str, str]
    hardware: dict[str, str | int]
    commit: str | None
    finished: str

    @property
    def steps(self) -> int:
        """Optimizer steps taken, as far as the curves tell."""
        return max([point.step for point in (*self.held_out, *self.train_loss)], default=0)


@dataclass(frozen=True)
class Report:
    """Everything a page shows, in the order of the paths it was made from."""

    runs: list[RunView]
    profiles: list[ProfileView]
    plans: list[PlanView]

    @property
    def models(self) -> list[str]:
        """Names of the models, each once."""
        names = [
            *(str(profile.provenance["model"]) for profile in self.profiles),
            *(run.model for run in self.runs),
            *(plan.model for plan in self.plans),
        ]
        return list(dict.fromkeys(name for name in names if name))

    def to_json(self) -> dict[str, Any]:
        """The content of `report.json`, without the words."""
        return {"kind": "rankwise report", "schema_version": SCHEMA_VERSION, **asdict(self)}


def load_report(paths: Sequence[Path]) -> Report:
    """Read what the paths hold; equal profiles and equal plans appear once.

    Raises:
        FileError: No path is given, or one is missing, malformed or of no kind a report shows.
    """
    if not paths:
        raise FileError("paths=[]: name at least one profile, plan or run.")
    runs: list[RunView] = []
    profiles: list[ProfileView] = []
    plans: list[PlanView] = []
    for path in paths:
        kind = recognise(path)
        if kind == "adapter":
            raise FileError(f"{path}: is an adapter; name the run folder that it is in, or a plan.")
        if kind == "profile":
            profiles.append(_profile_view(GradientProfile.load(path)))
        elif kind == "plan":
            plans.append(_plan_view(RankPlan.load(path)))
        else:
            saved = load_run(path) if kind == "run" else SavedRun(RunRecord.load(path))
            named = path.resolve()
            runs.append(_run_view(saved.record, named.name if kind == "run" else named.parent.name))
            plans.append(_run_plan(saved))
            if saved.profile is not None:
                profiles.append(_profile_view(saved.profile))
    return Report(_label_runs(runs), _once(profiles), _once(plans))


def _profile_view(profile: GradientProfile) -> ProfileView:
    modules = {
        name: ModuleGradient(
            d_in=statistics.d_in,
            d_out=statistics.d_out,
            gid=profile.gid[name],
            stable_rank=stable_rank(profile.singular_values[name]),
            sensitivity=statistics.sensitivity,
        )
        for name, statistics in profile.modules.items()
    }
    if not modules:
        raise FileError(
            f"the profile of {profile.provenance.model} holds no module; profile again."
        )
    kinds: dict[str, list[float]] = {}
    for name, value in profile.gid.items():
        kinds.setdefault(layer_position(name).kind, []).append(value)
    return ProfileView(
        label="gradients",
        provenance=asdict(profile.provenance),
        gid=Spread.of(profile.gid.values()),
        gid_by_kind={kind: Spread.of(values) for kind, values in kinds.items()},
        modules=modules,
    )


def _plan_view(plan: RankPlan) -> PlanView:
    options = plan.provenance.get("options")
    return PlanView(
        label=plan.method,
        method=plan.method,
        model=plan.model,
        model_fingerprint=plan.model_fingerprint,
        parameters=plan.parameters,
        ranks=Spread.of(m.rank for m in plan.modules.values()),
        blocks=Spread.of(m.blocks for m in plan.modules.values()),
        modules={
            name: ModuleAdapter(m.rank, m.blocks, m.d_in, m.d_out, m.parameters)
            for name, m in plan.modules.items()
        },
        r_ref=plan.r_ref,
        alpha=plan.alpha,
        budget=plan.budget,
        options=_scalars(options, options) if isinstance(options, dict) else {},
    )


def _run_plan(saved: SavedRun) -> PlanView:
    """The plan of a run; plans made without a profile do not know their model, the run does."""
    record = saved.record
    if saved.plan is None:
        return _recorded_plan(record)
    return replace(
        _plan_view(saved.plan), model=record.model, model_fingerprint=record.model_fingerprint
    )


def _recorded_plan(record: RunRecord) -> PlanView:
    if not record.ranks:
        raise FileError(f"the record of {record.method} names no adapted module; run it again.")
    blocks = {name: record.blocks.get(name, 1) for name in record.ranks}
    return PlanView(
        label=record.method,
        method=record.method,
        model=record.model,
        model_fingerprint=record.model_fingerprint,
        parameters=record.trainable_parameters,
        ranks=Spread.of(record.ranks.values()),
        blocks=Spread.of(blocks.values()),
        modules={name: ModuleAdapter(rank, blocks[name]) for name, rank in record.ranks.items()},
    )


def _run_view(record: RunRecord, folder: str) -> RunView:
    recorded = _recorded_plan(record)
    dtype = record.config.get("dtype")
    settings: dict[str, Any] = {}
    for section, keys in _SETTINGS.items():
        values = record.config.get(section)
        settings |= _scalars(values, keys) if isinstance(values, dict) else {}
    prints = {
        part: str(facts["fingerprint"])
        for part, facts in record.data.items()
        if isinstance(facts, dict) and "fingerprint" in facts
    }
    return RunView(
        label=record.method,
        folder=folder,
        method=record.method,
        model=record.model,
        model_fingerprint=record.model_fingerprint,
        seed=record.seed,
        trainable_parameters=record.trainable_parameters,
        ranks=recorded.ranks,
        blocks=recorded.blocks,
        held_out=[
            LossPoint(
                point.step,
                point.loss,
                point.perplexity if math.isfinite(point.perplexity) else None,
                point.tokens,
            )
            for point in record.held_out
        ],
        train_loss=[LossPoint(point.step, point.loss) for point in record.train_loss],
        seconds=dict(record.seconds),
        peak_memory_mib=record.peak_memory_mib,
        train_tokens=record.train_tokens,
        dtype=dtype if isinstance(dtype, str) else None,
        settings=settings,
        data=prints,
        versions=dict(record.versions),
        hardware=dict(record.hardware),
        commit=record.commit,
        finished=record.finished,
    )


def _scalars(values: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    found = {key: values[key] for key in keys if key in values}
    return {
        key: value
        for key, value in found.items()
        if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    }


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


def _once(views: list[Any]) -> list[Any]:
    """Each distinct view once, numbered where labels repeat."""
    distinct: list[Any] = []
    for view in views:
        if view not in distinct:
            distinct.append(view)
    count = Counter(view.label for view in distinct)
    number: Counter[str] = Counter()
    labelled = []
    for view in distinct:
        number[view.label] += 1
        label = f"{view.label} {number[view.label]}" if count[view.label] > 1 else view.label
        labelled.append(replace(view, label=label))
    return labelled
