"""The sweep over all batches."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing

from rankwise.profiling.batches import Batch, Job, Ledger, with_progress
from rankwise.profiling.statistics import ModuleResult, StreamingStatistics
from rankwise.profiling.sweep.check import Way, checked_way, checkpointing_off
from rankwise.profiling.sweep.passes import (
    Run,
    SpoiledError,
    begin_stack,
    end_stack,
    run_layer,
    run_top,
)
from rankwise.profiling.sweep.structure import find_structure

Results = Generator[tuple[str, ModuleResult], None, None]


def sweep_engine(
    job: Job, batches: Sequence[Batch], ledger: Ledger
) -> Iterator[tuple[str, ModuleResult]]:
    """Measure by the sweep; a module is given out again if a later one spoils a batch.

    First, one batch is measured by hooks as well, and sketches of every gradient are compared.

    Raises:
        UnsuitableError: The model is no plain stack, or the hook engine disagrees.
        ProfileError: See `profile_gradients`.
    """
    way = checked_way(job, find_structure(job), batches)
    runs: list[Run] = []
    with checkpointing_off(job.model):
        left_out: set[int] = set()
        while True:
            try:
                runs = yield from _run_tops(job, way, batches, ledger, left_out)
                yield from _sweep(job, way, runs)
            except SpoiledError as spoiled:
                # the layers above have counted the batch already: all of it again without
                if spoiled.index is not None:
                    ledger.drop(spoiled.index, spoiled.module)
                    left_out.add(spoiled.index)
            else:
                break
    for run in runs:
        ledger.count(run.batch, run.items)
    ledger.close(len(batches))


def _run_tops(
    job: Job, way: Way, batches: Sequence[Batch], ledger: Ledger, left_out: set[int]
) -> Generator[tuple[str, ModuleResult], None, list[Run]]:
    """The forward passes of the batches not left out, and the targets outside the stacks."""
    statistics = StreamingStatistics(way.structure.outside, job.wanted, job.make_stream)
    runs: list[Run] = []
    todo = [(i, batch) for i, batch in enumerate(batches) if i not in left_out]
    shown = with_progress(todo, len(todo), "running forward", job.progress)
    with closing(shown):
        for index, batch in shown:
            run, spoiled = run_top(job, way.structure, statistics, batch, index, way.loss)
            if run is not None and spoiled is None:
                runs.append(run)
                continue
            left_out.add(index)
            if spoiled is None:
                ledger.skip(index)
            else:
                ledger.drop(index, spoiled)
    if not job.workers.any(bool(runs), "batches to sweep"):
        ledger.close(len(batches))
    for name in way.structure.outside:
        yield name, statistics.pop(name)
    return runs


def _sweep(job: Job, way: Way, runs: Sequence[Run]) -> Results:
    """All stacks, from the last to the first and each from its last layer to its first."""
    places = [
        (at, layer)
        for at, stack in enumerate(way.structure.stacks)
        for layer in range(len(stack.layers))
    ]
    below = with_progress(reversed(places), len(places), "sweeping layers", job.progress)
    with closing(below):
        for at, position in below:
            stack = way.structure.stacks[at]
            if position == len(stack.layers) - 1:
                begin_stack(runs, at)
            targets = stack.targets[position]
            statistics = StreamingStatistics(targets, job.wanted, job.make_stream)
            layer = stack.layers[position]
            spoiled = run_layer(job, layer, targets, runs, at, statistics)
            if job.workers.any(spoiled is not None, f"layer {position} is spoiled"):
                raise spoiled or SpoiledError(None, "")
            for name in targets:
                yield name, statistics.pop(name)
            if position == 0:
                end_stack(runs, at)
