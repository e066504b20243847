"""One cell: adapt, train, evaluate, record; the same path for every method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankwise.experiments.bench import Bench, Loaded, on_device, training_batches
from rankwise.experiments.cell_records import CellRecord, SizeRecord
from rankwise.experiments.cells import Cell
from rankwise.experiments.loop import Curves, Loop, is_head
from rankwise.experiments.peak import PeakMemory
from rankwise.experiments.sizing import Adapted, Batch, Job, Size
from rankwise.profiling import GradientProfile
from rankwise.provenance import git_commit, hardware, versions

DATA_BATCHES = 8
"""Batches for initialisations that look at data (EVA, LoRA-GA), where no profile setting says."""


def run_cell(cell: Cell, bench: Bench, written: tuple[Path, ...] = ()) -> CellRecord:
    """Carry out one cell.

    The seed draws the head, the adapters, dropout and the order of the data, each from a state of
    its own, so that what one method draws does not move what another sees.

    Args:
        cell: What to run.
        bench: Its model and data.
        written: Folders of the experiment, whose changes are none of the code's.

    Raises:
        RankwiseError: The method, the model or the data do not fit.
    """
    loaded, base = bench.data(cell.task), bench.base(cell.task, cell.seed)
    bench.profile(cell)  # whose memory the first cell that needs it would be charged with
    memory = PeakMemory(bench.device)
    trained = train_cell(cell, bench)
    curves, profile, size = trained.curves, trained.profile, trained.size
    return CellRecord(
        **_identity(cell),
        size=None if size is None else _size_record(size),
        trainable_parameters=trained.parameters,
        head_parameters=trained.head_parameters,
        ranks={} if size is None else dict(size.values),
        blocks={} if size is None else dict(size.blocks),
        validation=curves.validation,
        test=trained.test,
        train_loss=curves.train_loss,
        diverged_at=curves.diverged_at,
        tokens=curves.tokens,
        seconds={
            "load": round(base.seconds + loaded.seconds, 3),
            "profile": round(profile.provenance.seconds, 3) if profile else 0.0,
            "prepare": round(trained.prepare_seconds, 3),
            "train": round(curves.train_seconds, 3),
            "evaluate": round(curves.evaluate_seconds, 3),
        },
        peak_memory_mib=memory.peak(),
        memory_before_mib=memory.before,
        model=base.name,
        model_fingerprint=base.fingerprint,
        data_fingerprint=loaded.fingerprint,
        rows=loaded.rows,
        notes=trained.adapted.driver.notes(),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        **_place(written),
    )


@dataclass(frozen=True)
class Trained:
    """A cell after its training.

    Attributes:
        adapted: The model, with its adapters.
        profile: That the method needed.
        curves: What was measured on the way.
        test: Metrics on the test part; None in a search, and where training diverged.
        size: Of the adapters at the end.
        parameters: That the optimizer updated, heads not counted.
        head_parameters: Of heads.
        prepare_seconds: Of the plan and the adapters.
    """

    adapted: Adapted
    profile: GradientProfile | None
    curves: Curves
    test: dict[str, float] | None
    size: Size | None
    parameters: int
    head_parameters: int
    prepare_seconds: float


def train_cell(cell: Cell, bench: Bench) -> Trained:
    """What `run_cell` does before it writes a record: adapt, train, evaluate.

    Raises:
        RankwiseError: The method, the model or the data do not fit.
    """
    profile = bench.profile(cell)
    started = time.perf_counter()
    adapted, job = _adapt(cell, bench, profile)
    prepare = time.perf_counter() - started
    trainable, head = _count(adapted.model, job.keep)
    torch.manual_seed(cell.seed)
    loop, test = _learn(cell, adapted, bench.data(cell.task), bench.device)
    size = _final_size(adapted, job)
    return Trained(adapted, profile, loop.curves, test, size, trainable, head, prepare)


def _identity(cell: Cell) -> dict[str, Any]:
    """What the record says of the cell before it is run."""
    spec = cell.task
    searching = cell.phase == "search"
    return {
        "name": cell.name,
        "phase": cell.phase,
        "task": cell.task.name,
        "method": cell.method.name,
        "label": cell.method.label,
        "budget_rank": cell.rank,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "steps": cell.steps,
        "config_hash": cell.config_hash,
        "settings": cell.settings,
        "metric": spec.search_metric if searching else spec.task.metric,
        "lower_is_better": (
            spec.search_lower_is_better if searching else spec.task.lower_is_better
        ),
    }


@cache
def _place(written: tuple[Path, ...]) -> dict[str, Any]:
    """Where this process runs; asked once."""
    return {"commit": git_commit(written), "versions": versions(), "hardware": hardware()}


def _adapt(cell: Cell, bench: Bench, profile: GradientProfile | None) -> tuple[Adapted, Job]:
    task, base = cell.task.task, bench.base(cell.task, cell.seed)
    cost = sum(shape.rank_cost for shape in base.targets.values())
    batches = cell.task.profile.batches or DATA_BATCHES
    job = Job(
        base.fresh(),
        base.targets,
        (1 if cell.rank is None else cell.rank) * cost,
        _Lazy(lambda: bench.first_batches(cell.task, cell.seed, batches)),
        cell.steps,
        keep=task.kept_in(base.model),
        task_type=task.task_type,
        seed=cell.seed,
    )
    torch.manual_seed(cell.seed)
    adapted = cell.method.contestant.adapt(job, profile)
    adapted.model.to(bench.device)
    return adapted, job


class _Lazy:
    """Batches that are made only if somebody asks for them."""

    def __init__(self, make: Callable[[], list[Batch]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._make())


def _learn(
    cell: Cell, adapted: Adapted, loaded: Loaded, device: torch.device
) -> tuple[Loop, dict[str, float] | None]:
    """Train and evaluate; the metrics on the test part are those of a final cell."""
    spec, data = cell.task, loaded.data
    loop = Loop(
        adapted,
        spec.training,
        cell.steps,
        cell.learning_rate or 0.0,
        spec.task.keep,
        lambda model: spec.task.evaluate(model, data, data.validation),
    )
    if cell.method.contestant.trains:
        grouped = spec.training.group_by_length
        batches = training_batches(data, spec.training.batch_size, cell.seed, grouped=grouped)
        loop.run(on_device(batch, device) for batch in batches)
    else:
        loop.evaluate_at(0)
    if cell.phase == "search" or loop.curves.diverged_at is not None:
        return loop, None
    test = loop.timed(lambda model: spec.task.evaluate_test(model, data))
    if test is None:
        loop.curves.diverged_at = cell.steps
    return loop, test


def _count(model: nn.Module, keep: tuple[str, ...]) -> tuple[int, int]:
    """Trainable parameters of adapters and of heads."""
    counts = [0, 0]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[is_head(name, keep)] += parameter.numel()
    return counts[0], counts[1]


def _final_size(adapted: Adapted, job: Job) -> Size | None:
    """The size after training, which dynamic methods change."""
    ranks, size = adapted.driver.ranks(), adapted.size
    if ranks is None or size is None:
        return size
    parameters = sum(adapted.cost(job.targets[name], rank) for name, rank in ranks.items())
    return Size(ranks, parameters, size.budget)


def _size_record(size: Size) -> SizeRecord:
    values = size.values.values()
    return SizeRecord(size.budget, size.parameters, size.matched, min(values), max(values))
