"""An experiment on the meta device: shapes, budgets and sizes, without weights and data."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from rankwise.errors import ConfigError
from rankwise.experiments.architectures import known_config, read_config
from rankwise.experiments.cells import make_groups, search_cells
from rankwise.experiments.config import ExperimentConfig, TaskSpec
from rankwise.experiments.contestants import Contestant, Sized
from rankwise.experiments.methods import Entry
from rankwise.experiments.sizing import Job, Size
from rankwise.experiments.tasks import Task
from rankwise.tables import make_table, render
from rankwise.targets import Targets, count_parameters, find_targets

NEEDS_WEIGHTS = frozenset({"pissa", "olora", "eva", "lora-ga", "dora", "vera", "randlora"})
"""Baselines whose adapters are made of weights or data, which the meta device has none of."""


@dataclass(frozen=True)
class Plan:
    """One method at one task and budget, before anything runs.

    Attributes:
        task: Name of the task.
        label: Of the method.
        rank: LoRA rank whose parameters are the budget.
        budget: Those parameters.
        size: The solved size; None where a profile decides, or no budget applies.
        built: Whether PEFT built the adapters on the meta device and they counted as many.
        remark: What else is to be said.
    """

    task: str
    label: str
    rank: int
    budget: int
    size: Size | None
    built: bool
    remark: str


@dataclass(frozen=True)
class DryRun:
    """Everything that would be run.

    Attributes:
        plans: Methods at tasks and budgets.
        models: Task -> parameters of its model and number of its targets.
        cells: Training runs, searches included.
        steps: Optimizer steps of all of them.
    """

    plans: list[Plan]
    models: dict[str, tuple[int, int]]
    cells: int
    steps: int

    def __str__(self) -> str:
        rows = [
            (
                f"{plan.task} r = {plan.rank}",
                plan.label,
                f"{plan.budget:,}",
                "" if plan.size is None else _range(plan.size),
                "" if plan.size is None else f"{plan.size.parameters:,}",
                "" if plan.size is None else f"{plan.size.parameters / plan.budget - 1:+.1%}",
                plan.remark,
            )
            for plan in self.plans
        ]
        columns = ("task, budget", "method", "budget", "size", "parameters", "off", "remark")
        models = [
            f"{task}: a model of {parameters:,} parameters, {targets} targets"
            for task, (parameters, targets) in self.models.items()
        ]
        total = f"{self.cells} cells, {self.steps:,} optimizer steps"
        return "\n".join([*models, render(make_table(columns, rows)), total])


def dry_run(
    config: ExperimentConfig, *, configs: Mapping[str, PretrainedConfig] | None = None
) -> DryRun:
    """Build every model without weights, and size every method.

    Args:
        config: The experiment.
        configs: Configurations of models by the name that tasks use, in place of those in a local
            folder or on the hub.

    Raises:
        ConfigError: A model's configuration cannot be read, or PEFT's adapters have another number
            of parameters than the formula says.
        TargetError: The targets match nothing.
    """
    plans: list[Plan] = []
    models: dict[str, tuple[int, int]] = {}
    for task in config.make_tasks():
        model = empty_model(task.task, (configs or {}).get(task.task.model))
        targets = find_targets(model, task.targets)
        models[task.name] = count_parameters(model), len(targets)
        for rank in task.budgets:
            for entry in config.methods_of(task):
                plans.append(_plan(task, entry, rank, model, targets))
    groups = make_groups(config)
    searches = search_cells(groups)
    cells = len(searches) + sum(len(group.seeds) for group in groups)
    searched = sum(cell.steps for cell in searches)
    compared = sum(
        group.task.training.steps * len(group.seeds)
        for group in groups
        if group.method.contestant.trains
    )
    return DryRun(plans, models, cells, searched + compared)


def empty_model(task: Task, config: PretrainedConfig | None = None) -> nn.Module:
    """The task's model on the meta device.

    Args:
        task: Names the model and says what kind it is.
        config: Its configuration; default: that of the local folder, or the dimensions that are
            known here, or the hub's.

    Raises:
        ConfigError: There is no configuration.
    """
    chosen = _known_or_read(task.model) if config is None else copy.deepcopy(config)
    with torch.device("meta"):
        return task.blank_model(chosen)


def _known_or_read(model: str) -> PretrainedConfig:
    if not Path(model).expanduser().is_dir():
        with suppress(ConfigError):
            return known_config(model)
    return read_config(model)


def _plan(task: TaskSpec, entry: Entry, rank: int, model: nn.Module, targets: Targets) -> Plan:
    budget = rank * sum(shape.rank_cost for shape in targets.values())
    contestant = entry.contestant
    size, built, remark = None, False, ""
    if entry.reason is not None:
        remark = f"not available: {entry.reason}"
    elif not contestant.budgeted:
        remark = "no budget applies"
    else:
        size = contestant.solve(targets, budget)
        remark = "ranks by profile, at most the budget" if size is None else ""
        if size is not None and not size.matched:
            remark = "cannot be matched"
        built = _builds(contestant, task, budget, model, targets)
    return Plan(task.name, entry.label, rank, budget, size, built, remark)


def _builds(
    contestant: Contestant, task: TaskSpec, budget: int, model: nn.Module, targets: Targets
) -> bool:
    """Let PEFT build the adapters, which are counted, where they need no weights."""
    if not isinstance(contestant, Sized) or contestant.baseline.name in NEEDS_WEIGHTS:
        return False
    job = Job(
        copy.deepcopy(model),
        targets,
        budget,
        [],
        task.training.steps,
        keep=task.task.kept_in(model),
        task_type=task.task.task_type,
    )
    with torch.device("meta"):
        contestant.adapt(job, None)
    return True


def _range(size: Size) -> str:
    values = sorted(set(size.values.values()))
    return f"{values[0]}" if len(values) == 1 else f"{values[0]}-{values[-1]}"
