"""What runs share within a process: data, base models and profiles, each made once."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from transformers.utils import logging

from rankwise.experiments.cell_records import CellRecord
from rankwise.experiments.cells import Cell
from rankwise.experiments.config import TaskSpec
from rankwise.experiments.sizing import Batch
from rankwise.experiments.tasks import Row, TaskData
from rankwise.profiling import GradientProfile, profile_gradients
from rankwise.profiling.measure import model_name
from rankwise.provenance import model_fingerprint
from rankwise.targets import Targets, find_targets

PROFILES = "profiles"
"""Folder of the profiles among an experiment's runs."""

GROUPED = 16
"""Batches that are sorted by length together, where that is asked for."""


@dataclass(frozen=True)
class Base:
    """The model that the runs of one task and seed start from."""

    model: nn.Module
    targets: Targets
    name: str
    fingerprint: str
    seconds: float

    def fresh(self) -> nn.Module:
        """A copy that may be changed."""
        return copy.deepcopy(self.model)


@dataclass(frozen=True)
class Loaded:
    """A task's data, encoded."""

    data: TaskData
    fingerprint: str
    seconds: float

    @property
    def rows(self) -> dict[str, int]:
        """Rows of each part."""
        parts = {"train": self.data.train, "validation": self.data.validation}
        return {part: len(rows) for part, rows in (parts | {"test": self.data.test}).items()}


class Bench:
    """Keeps the data of every task, and the base model of the last task and seed.

    Args:
        folder: Of the experiment's runs, where profiles are kept for all processes.
        device: Where models are run.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        self._folder = folder
        self._data: dict[str, Loaded] = {}
        self._base: tuple[tuple[str, int], Base] | None = None

    def data(self, task: TaskSpec) -> Loaded:
        """The task's data; parts that are only evaluated are sorted by length, to pad little."""
        if task.name not in self._data:
            started = time.perf_counter()
            data = task.task.load()
            fingerprint = _fingerprint(data, task.task.definitions())
            data = replace(data, validation=_by_length(data.validation), test=_by_length(data.test))
            self._data[task.name] = Loaded(data, fingerprint, time.perf_counter() - started)
        return self._data[task.name]

    def base(self, task: TaskSpec, seed: int) -> Base:
        """The task's model with the seed's head; whoever trains it takes a copy."""
        key = (task.name, seed)
        if self._base is None or self._base[0] != key:
            self._base = None  # two at a time would not fit where one does
            started = time.perf_counter()
            model = _load(task, seed).to(self.device)
            model.eval()
            targets = find_targets(model, task.targets)
            name, fingerprint = model_name(model), model_fingerprint(model)
            seconds = time.perf_counter() - started
            self._base = key, Base(model, targets, name, fingerprint, seconds)
        return self._base[1]

    def changed_since(self, records: Sequence[CellRecord], task: TaskSpec) -> Iterator[str]:
        """`"data"` and `"base model"`, where they are not those of the task's records.

        The model is loaded to the CPU: workers will want all of a GPU. A checkpoint may lack
        weights, which the seed then draws, so that only records of one seed must have its model.
        """
        if {r.data_fingerprint for r in records} - {self.data(task).fingerprint}:
            yield "data"
        if not records:
            return
        seed = records[0].seed
        found = model_fingerprint(_load(task, seed))
        if {r.model_fingerprint for r in records if r.seed == seed} != {found}:
            yield "base model"

    def first_batches(self, task: TaskSpec, seed: int, count: int) -> list[Batch]:
        """The first training batches of a seed, of the size that profiles are made of."""
        size = task.profile.batch_size or task.training.batch_size
        data = self.data(task).data
        batches = training_batches(data, size, seed, grouped=task.training.group_by_length)
        return [on_device(next(batches), self.device) for _ in range(count)]

    def profile(self, cell: Cell) -> GradientProfile | None:
        """The profile that the cell's method needs, measured once for all processes."""
        contestant, task = cell.method.contestant, cell.task
        own = contestant.profile_batches()
        if own is None:
            return None
        count = task.profile.batches or own
        sources = self.data(task).fingerprint, self.base(task, cell.seed).fingerprint
        name = _profile_name(cell, contestant.statistics(), count, sources)
        folder = self._folder / PROFILES / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                base = self.base(task, cell.seed)
                measured = profile_gradients(
                    base.model,
                    self.first_batches(task, cell.seed, count),
                    list(base.targets),
                    batches=count,
                    statistics=contestant.statistics(),
                    progress=False,
                    distributed="off",
                )
                measured.save(folder)
        return GradientProfile.load(folder)


def _load(task: TaskSpec, seed: int) -> nn.Module:
    """The task's model with what the seed draws."""
    torch.manual_seed(seed)
    with _quiet_loading():
        return task.task.load_model()


def training_batches(
    data: TaskData, size: int, seed: int, *, grouped: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Batches without end: one shuffled pass over the rows after the other, by the seed alone.

    Args:
        data: The task's data.
        size: Rows in a batch.
        seed: Of the order.
        grouped: Sort the rows of every `GROUPED` batches by length before they are divided, and
            shuffle these batches: less padding, for batches that are a little less random.
    """
    generator = torch.Generator().manual_seed(seed)
    window = size * GROUPED if grouped else size
    waiting: list[int] = []
    while True:
        while len(waiting) < window:
            waiting += torch.randperm(len(data.train), generator=generator).tolist()
        taken, waiting = waiting[:window], waiting[window:]
        order = [0]
        if grouped:
            taken.sort(key=lambda i: _length(data.train[i]))
            order = torch.randperm(GROUPED, generator=generator).tolist()
        for place in order:
            yield data.collate([data.train[i] for i in taken[place * size : (place + 1) * size]])


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch's tensors on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No bar and no report of new heads for every seed; the progress of cells is what counts."""
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _profile_name(
    cell: Cell, statistics: Sequence[str], batches: int, sources: tuple[str, str]
) -> str:
    """Another one for other settings, data (`sources[0]`) or weights (`sources[1]`)."""
    task = cell.task
    settings: dict[str, Any] = {
        "task": {"kind": task.kind, **task.options},
        "targets": task.targets,
        "sources": sources,
        "seed": cell.seed,
        "batch_size": task.profile.batch_size or task.training.batch_size,
    }
    if task.training.group_by_length:
        settings["group_by_length"] = True
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    measured = "+".join(statistics)
    return f"{task.name}--seed{cell.seed}--{measured}-{batches}.{digest.hexdigest()[:12]}"


def _by_length(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=_length)


def _length(row: Row) -> int:
    """Tokens of a row; 0 for what has none, such as images."""
    return len(row.get("input_ids", ()))


def _fingerprint(data: TaskData, definitions: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in definitions:
        digest.update(path.name.encode() + path.read_bytes())
    for part in (data.train, data.validation, data.test):
        digest.update(f"{len(part)} rows".encode())
        for row in part:
            for key in sorted(row):
                value = row[key]
                if isinstance(value, Tensor):
                    value = value.numpy()
                plain = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
                digest.update(key.encode() + plain)
    return digest.hexdigest()[:16]
