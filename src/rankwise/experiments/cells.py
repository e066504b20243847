"""What an experiment consists of: cells, each one training run with a name and a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from rankwise.experiments.config import ExperimentConfig, TaskSpec
from rankwise.experiments.methods import Entry

Phase = Literal["search", "final"]

SETTINGS_VERSION = 2
"""Counts up when the same settings begin to mean something else, so that old records do not fit."""


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        task: What is learned.
        method: Who learns.
        rank: LoRA rank whose parameters are the budget; None where no budget applies.
        seed: Of the head, the adapters and the order of the data.
        learning_rate: None where nothing is trained.
        phase: `"search"` to choose a learning rate, judged on the validation part; `"final"` to be
            compared, judged on the test part.
        steps: Optimizer steps.
    """

    task: TaskSpec
    method: Entry
    rank: int | None
    seed: int
    learning_rate: float | None
    phase: Phase
    steps: int

    @cached_property
    def name(self) -> str:
        """Readable and unique within an experiment."""
        rank = "" if self.rank is None else f"--r{self.rank}"
        rate = "" if self.learning_rate is None else f"--lr{self.learning_rate:g}"
        phase = "--search" if self.phase == "search" else ""
        return f"{self.task.name}--{self.method.slug}{rank}{rate}--seed{self.seed}{phase}"

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON can hold it."""
        task = self.task
        training = task.training.hashed()
        if self.phase == "search":
            training |= {"steps": self.steps}
        revision = self.method.contestant.revision
        return {
            "version": SETTINGS_VERSION,
            "task": {"kind": task.kind, **task.options},
            "targets": task.targets,
            "method": {"name": self.method.name, **self.method.options},
            "budget_rank": self.rank,
            "seed": self.seed,
            "learning_rate": self.learning_rate,
            "phase": self.phase,
            "training": training,
            "profile": task.profile.model_dump(mode="json"),
            **({"revision": revision} if revision > 1 else {}),
        }

    @cached_property
    def config_hash(self) -> str:
        """Twelve hexadecimal digits of the settings."""
        text = json.dumps(self.settings, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def file_name(self) -> str:
        """Of its record."""
        return f"{self.name}.{self.config_hash}.json"


@dataclass(frozen=True)
class Group:
    """The cells of one method at one task and budget: the search for its rate, then the seeds.

    Groups whose rates are chosen together, at `search_task` and `search_rank`, have their search
    cells in common.
    """

    task: TaskSpec
    method: Entry
    rank: int | None
    search_task: TaskSpec
    search_rank: int | None
    seeds: tuple[int, ...]
    search_seeds: tuple[int, ...]
    search_steps: int | None
    search_extend: int
    search_refine: int

    @property
    def grid(self) -> list[float]:
        """Learning rates to choose from; a fixed one is a grid of one."""
        if not self.method.contestant.trains:
            return []
        fixed = self.method.learning_rate
        return sorted(self.search_task.learning_rates) if fixed is None else [fixed]

    @cached_property
    def search(self) -> list[Cell]:
        """The cells that choose from the grid; none where there is no choice."""
        return self.search_at(self.grid)

    def search_at(self, rates: Sequence[float]) -> list[Cell]:
        """The cells that choose from these learning rates; none where there is no choice."""
        if len(rates) < 2:
            return []
        task, rank = self.search_task, self.search_rank
        steps = self.search_steps or task.training.steps
        return [
            Cell(task, self.method, rank, seed, rate, "search", steps)
            for seed in self.search_seeds
            for rate in rates
        ]

    def final(self, rate: float | None) -> list[Cell]:
        """The cells that are compared, at the chosen learning rate."""
        steps = self.task.training.steps if self.method.contestant.trains else 0
        return [
            Cell(self.task, self.method, self.rank, seed, rate, "final", steps)
            for seed in self.seeds
        ]


def make_groups(config: ExperimentConfig) -> list[Group]:
    """All groups that can be run, task by task and budget by budget.

    A method that no budget changes stands there once per task.
    """
    groups: list[Group] = []
    tasks = {task.name: task for task in config.make_tasks()}
    for task in tasks.values():
        source = tasks[task.rates_from or task.name]
        chosen = source.selection
        methods = [method for method in config.methods_of(task) if method.reason is None]
        for place, rank in enumerate(task.budgets):
            for method in methods:
                budgeted = method.contestant.budgeted
                if not budgeted and place:
                    continue
                groups.append(
                    Group(
                        task,
                        method,
                        rank if budgeted else None,
                        source,
                        (chosen.budget or rank) if budgeted else None,
                        tuple(config.seeds),
                        tuple(chosen.seeds),
                        chosen.steps,
                        chosen.extend,
                        chosen.refine,
                    )
                )
    return groups


def search_cells(groups: Sequence[Group]) -> list[Cell]:
    """The search cells of all groups on their grids, each once."""
    return list({cell.file_name: cell for group in groups for cell in group.search}.values())
