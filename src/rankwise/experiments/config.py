"""One YAML file describes an experiment: methods, budgets, seeds, tasks, and how to train."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import (
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from rankwise.errors import ConfigError, nearest
from rankwise.experiments.methods import Entry, make_entry
from rankwise.experiments.settings import (
    LearningRates,
    ProfileSettings,
    Ranks,
    ReferenceSettings,
    Section,
    Seeds,
    SelectionSettings,
    TrainingSettings,
)
from rankwise.experiments.tasks import TASKS, Task
from rankwise.experiments.tasks.base import LOWER_IS_BETTER
from rankwise.files import describe, read_text
from rankwise.training.config import refuse_unknown
from rankwise.training.yaml_text import parse_assignment, parse_yaml

Settings = TypeVar("Settings", bound=Section)

SMALL = "small"
"""The section of a file whose values replace the others under `--scale small`."""


class ExperimentConfig(Section):
    """Everything `rankwise compare` needs."""

    output: str = Field(description="folder for records, profiles and results")
    workspace: str | None = Field(
        default=None,
        description="folder for records and profiles instead, which experiments may share",
    )
    title: str = Field(default="", description="heading of the results")
    model: str | None = Field(default=None, description="of tasks that name none")
    tasks: list[dict[str, Any]] = Field(min_length=1)
    methods: list[str | dict[str, Any]] = Field(min_length=1)
    budgets: Ranks = Field(
        description="LoRA ranks: what LoRA of that rank costs on the same targets"
    )
    seeds: Seeds
    targets: str | list[str] = "all-linear"
    learning_rates: LearningRates = Field(description="the same grid for every method")
    selection: SelectionSettings = SelectionSettings()
    training: TrainingSettings = TrainingSettings()
    profile: ProfileSettings = ProfileSettings()
    reference: ReferenceSettings = ReferenceSettings()
    workers: int = Field(default=1, ge=1, description="processes")
    threads: int | None = Field(
        default=None, ge=1, description="of each; default: 1 if there are several"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _parts_are_known(self) -> ExperimentConfig:
        labels = [entry.label for entry in self.make_methods()]
        if self.reference.method not in (None, *labels):
            hint = nearest(str(self.reference.method), labels)
            raise ConfigError(f"reference.method={self.reference.method!r}: {hint}")
        budgets = {rank for task in self.make_tasks() for rank in task.budgets}
        if self.reference.rank not in (None, *budgets):
            known = ", ".join(map(str, sorted(budgets)))
            raise ConfigError(f"reference.rank={self.reference.rank} is no budget; known: {known}.")
        self._methods_are_known(labels)
        self._searches_are_known()
        searched = {seed for task in self.make_tasks() for seed in task.selection.seeds}
        shared = sorted(searched.intersection(self.seeds))
        if shared and self.searches:
            raise ConfigError(
                f"selection.seeds: {shared} are among seeds; learning rates must be chosen on "
                "other seeds than those that are compared."
            )
        return self

    def _methods_are_known(self, labels: list[str]) -> None:
        """Whether tasks that compare some of the methods name those, the reference among them."""
        for task in self.make_tasks():
            for label in task.methods or ():
                if label not in labels:
                    raise ConfigError(f"{task.name}.methods: {label!r}: {nearest(label, labels)}")
            if task.methods is not None and self.reference_label not in task.methods:
                raise ConfigError(
                    f"{task.name}.methods leaves out {self.reference_label!r}, "
                    "which the others are compared with."
                )

    def _searches_are_known(self) -> None:
        """Whether every task's learning rates are chosen somewhere."""
        tasks = {task.name: task for task in self.make_tasks()}
        for task in tasks.values():
            if task.rates_from is None:
                continue
            source = tasks.get(task.rates_from)
            if source is None or source.rates_from is not None:
                choosing = [name for name, t in tasks.items() if t.rates_from is None]
                hint = nearest(task.rates_from, choosing)
                raise ConfigError(f"{task.name}.rates_from={task.rates_from!r}: {hint}")
            missing = sorted(set(task.budgets) - set(source.budgets))
            if missing and source.selection.budget is None:
                raise ConfigError(
                    f"{task.name}.rates_from={source.name!r}: it has no budget "
                    f"{', '.join(map(str, missing))}; set selection.budget."
                )
        for task in tasks.values():
            metric, known = task.selection.metric, task.task.validation_metrics
            if metric is not None and metric not in known:
                hint = nearest(metric, known)
                raise ConfigError(f"{task.name}: selection.metric={metric!r}: {hint}")
            budget = task.selection.budget
            if task.rates_from is None and budget not in (None, *task.budgets):
                raise ConfigError(f"selection.budget={budget} is no budget of {task.name}.")

    @property
    def runs_folder(self) -> Path:
        """Where records, profiles and locks are."""
        return Path(self.workspace or self.output)

    @property
    def folders(self) -> tuple[Path, ...]:
        """All that the experiment writes to."""
        return (Path(self.output), self.runs_folder)

    @property
    def reference_label(self) -> str:
        """The label that the others are compared with."""
        labels = [entry.label for entry in self.make_methods()]
        if self.reference.method is not None:
            return self.reference.method
        return "lora" if "lora" in labels else labels[0]

    def reference_rank(self, budgets: Sequence[int]) -> int:
        """The budget whose result of the reference is to be reached, of a task's budgets."""
        named = self.reference.rank
        if named is not None and named in budgets:
            return named
        return 8 if 8 in budgets else max(budgets)

    @property
    def searches(self) -> bool:
        """Whether some method's learning rate is chosen."""
        grids = [self.learning_rates, *(t.get("learning_rates") or [] for t in self.tasks)]
        return any(len(grid) > 1 for grid in grids)

    def make_methods(self) -> list[Entry]:
        """The methods with their options, in order.

        Raises:
            ConfigError: A name or an option is unknown, or two have one label.
        """
        entries = [make_entry(method) for method in self.methods]
        _refuse_repeated([entry.label for entry in entries], "methods", "give each a label")
        _refuse_repeated([entry.slug for entry in entries], "methods", "make labels more different")
        return entries

    def methods_of(self, task: TaskSpec) -> list[Entry]:
        """The methods that a task compares, in the experiment's order."""
        return [m for m in self.make_methods() if task.methods is None or m.label in task.methods]

    def make_tasks(self) -> list[TaskSpec]:
        """The tasks with the settings that apply to them.

        Raises:
            ConfigError: A kind, key or value is unknown, or two have one name.
        """
        specs = [self._make_task(dict(task), i) for i, task in enumerate(self.tasks)]
        _refuse_repeated([spec.name for spec in specs], "tasks", "give each a name of its own")
        return specs

    def _make_task(self, options: dict[str, Any], index: int) -> TaskSpec:
        where = f"tasks.{index}"
        kind = options.pop("kind", None)
        if kind not in TASKS:
            raise ConfigError(f"{where}.kind={kind!r} is no task; {nearest(str(kind), TASKS)}")
        own = {key: options.pop(key) for key in _OWN_KEYS if key in options}
        name = own.get("name", kind)
        if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"{where}.name={name!r} must be letters, digits, '-' and '_'.")
        if "rates_from" in own and "learning_rates" in own:
            raise ConfigError(f"{where}: rates_from leaves nothing for learning_rates to choose.")
        if self.model is not None:
            options.setdefault("model", self.model)
        lists = {key: getattr(self, key) for key in ("targets", "learning_rates", "budgets")}
        lists |= {key: own[key] for key in _OwnLists.model_fields if key in own}
        try:
            return TaskSpec(
                name=name,
                kind=kind,
                task=_make_dataclass(TASKS[kind], options, where),
                options=options,
                training=_replaced(self.training, own.get("training"), f"{where}.training"),
                profile=_replaced(self.profile, own.get("profile"), f"{where}.profile"),
                selection=_replaced(self.selection, own.get("selection"), f"{where}.selection"),
                **dict(_OwnLists.model_validate(lists)),
            )
        except ValidationError as error:
            raise ConfigError(f"{where}: {describe(error)}") from error


class _OwnLists(Section):
    """What a task may have in place of the experiment's, beside its sections."""

    targets: str | list[str]
    learning_rates: LearningRates
    budgets: Ranks
    rates_from: str | None = None
    methods: list[str] | None = None


_OWN_KEYS = ("name", "training", "profile", "selection", *_OwnLists.model_fields)


@dataclass(frozen=True)
class TaskSpec:
    """One task of an experiment.

    Attributes:
        name: As records and tables call it.
        kind: Key of `TASKS`.
        task: The task itself.
        options: What it was made of.
        training: The experiment's settings with the task's own in place of some.
        profile: Likewise.
        selection: Likewise.
        targets: Likewise.
        learning_rates: Likewise.
        budgets: Likewise.
        rates_from: The task whose choice of learning rates holds here as well.
        methods: Labels of the methods that are compared here; default: all.
    """

    name: str
    kind: str
    task: Task
    options: dict[str, Any]
    training: TrainingSettings
    profile: ProfileSettings
    selection: SelectionSettings
    targets: str | list[str]
    learning_rates: list[float]
    budgets: list[int]
    rates_from: str | None = None
    methods: list[str] | None = None

    @property
    def search_metric(self) -> str:
        """What learning rates are chosen by, on the validation part."""
        return self.selection.metric or self.task.search_metric

    @property
    def search_lower_is_better(self) -> bool:
        """Direction of the metric that learning rates are chosen by."""
        if self.search_metric == self.task.metric:
            return self.task.lower_is_better
        return self.search_metric in LOWER_IS_BETTER


def load_experiment(
    path: Path, overrides: Sequence[str] = (), *, scale: str = "full"
) -> ExperimentConfig:
    """Read an experiment file and apply overrides.

    Args:
        path: A YAML file.
        overrides: `section.key=value`, the value in YAML; `tasks.0.max_test=100` for a list.
        scale: `"full"`, or `"small"` for the values of the file's section `small`.

    Raises:
        FileError: The file is missing or unreadable.
        ConfigError: It is not YAML, a key is unknown, or a value is not allowed.
    """
    document = parse_yaml(read_text(path, "experiment"), str(path))
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must hold keys and values, such as 'output: runs/cola'.")
    return make_experiment(document, overrides, scale=scale, where=str(path))


def make_experiment(
    document: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    scale: str = "full",
    where: str = "experiment",
) -> ExperimentConfig:
    """An experiment from plain values; see `load_experiment`.

    Raises:
        ConfigError: A key is unknown or a value is not allowed.
    """
    merged: dict[str, Any] = copy.deepcopy(dict(document))
    small = merged.pop(SMALL, None)
    if scale not in ("full", SMALL):
        raise ConfigError(f"scale={scale!r} must be 'full' or 'small'.")
    if scale == SMALL:
        if not isinstance(small, dict):
            raise ConfigError(f"{where}: has no section 'small', which --scale small needs.")
        _merge(merged, small)
    for override in overrides:
        _override(merged, override)
    refuse_unknown(merged, ExperimentConfig, where)
    try:
        return ExperimentConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe(error)}") from error


def _merge(document: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Sections are merged key by key; anything else, lists among it, is replaced."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(document.get(key), dict):
            _merge(document[key], value)
        else:
            document[key] = value


def _override(document: dict[str, Any], assignment: str) -> None:
    key, value = parse_assignment(assignment)
    *sections, last = key.split(".")
    place: Any = document
    for section in sections:
        if isinstance(place, list) and section.isdecimal() and int(section) < len(place):
            place = place[int(section)]
        elif isinstance(place, dict):
            place = place.setdefault(section, {})
        else:
            raise ConfigError(f"{assignment!r}: {section} is not a section of the experiment.")
    if isinstance(place, list) and last.isdecimal() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise ConfigError(f"{assignment!r}: {last} has no place in the experiment.")


def _replaced(settings: Settings, changes: object, where: str) -> Settings:
    """Settings with some values replaced, and checked again."""
    if changes is None:
        return settings
    if not isinstance(changes, dict):
        raise ConfigError(f"{where}={changes!r} must hold keys and values.")
    refuse_unknown(changes, type(settings), where)
    return type(settings).model_validate(settings.model_dump() | changes)


def _make_dataclass(cls: type[Task], options: Mapping[str, Any], where: str) -> Task:
    known = {field.name: field for field in fields(cls)}
    for key in options:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; {nearest(key, [*known, *_OWN_KEYS])}")
    for name, field in known.items():
        required = field.default is MISSING and field.default_factory is MISSING
        if required and name not in options:
            raise ConfigError(f"{where}: needs {name!r}.")
    # through JSON, where strictness is about numbers and text and lists may become tuples
    return TypeAdapter(cls).validate_json(json.dumps(options), strict=True)


def _refuse_repeated(names: Sequence[str], what: str, remedy: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{what}: {', '.join(twice)} stands there twice; {remedy}.")
