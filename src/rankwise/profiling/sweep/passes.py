"""The passes over one batch: down to the last layer's output, then layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from rankwise.errors import ProfileError
from rankwise.profiling.batches import Batch, Job, batch_rows, is_finite, run_forward
from rankwise.profiling.capture import capture_gradients
from rankwise.profiling.precision import loss_scale
from rankwise.profiling.sweep.head import ChunkedLoss
from rankwise.profiling.sweep.recording import Recorder, StackRecord
from rankwise.profiling.sweep.structure import Structure, UnsuitableError


class Consumer(Protocol):
    """What the passes need of `StreamingStatistics`."""

    def begin_batch(self, items: int, rows: int, scale: float) -> None:
        """Start a batch."""

    def consume(self, name: str, x: Tensor, g: Tensor) -> None:
        """Add one use of a module."""

    def spoil(self, name: str) -> None:
        """Let the batch be dropped."""

    def end_batch(self) -> str | None:
        """End the batch; returns the module that spoiled it, if one did."""


@dataclass
class Run:
    """A batch on its way down the stacks."""

    index: int
    batch: Batch
    items: int
    rows: int
    scale: float  # of the loss, and so of all gradients
    stacks: list[StackRecord]
    gradient: Tensor | None = None  # at the output of the layer that is next

    @property
    def autocast(self) -> bool:
        """Whether a layer ran under autocasting."""
        return any(call.autocast.enabled for stack in self.stacks for call in stack.calls)


class SpoiledError(Exception):
    """A batch turned out to hold a NaN or an infinity below the top."""

    def __init__(self, index: int | None, module: str) -> None:
        super().__init__(index, module)
        self.index = index  # None: another worker's batch
        self.module = module


def run_top(
    job: Job,
    structure: Structure,
    statistics: Consumer,
    batch: Batch,
    index: int,
    loss: ChunkedLoss | None,
) -> tuple[Run | None, str | None]:
    """The forward pass, and the loss gradient at the ends of the stacks.

    `loss` says how to differentiate the loss in chunks; None is the plain way.

    Returns:
        The run, None if the batch has no label; and the module that spoiled it, if one did.

    Raises:
        UnsuitableError: The forward pass does not go through the layers as it should.
    """
    recorder = Recorder(job, structure)
    with recorder.running(structure.outside, statistics.consume):
        chunks = loss.forward(job, batch) if loss is not None else None
        try:
            total, items = (chunks.loss, chunks.items) if chunks else run_forward(job, batch, index)
        except ProfileError:
            recorder.check()  # a last layer that is not called explains a loss without gradient
            raise
        if not items:
            return None, None
        recorder.check()
        rows = batch_rows(batch)
        scale = loss_scale(job.model, items)
        statistics.begin_batch(items, rows, scale)
        chunks.backward() if chunks else (total * scale).backward()
    run = Run(index, batch, items, rows, scale, recorder.stacks)
    end = run.stacks[-1].end
    if end is None or end.grad is None:
        raise UnsuitableError("the loss does not depend on the last layer's output")
    if not (is_finite(total) and bool(torch.isfinite(end.grad).all())):
        statistics.spoil(structure.stacks[-1].last)
    return run, statistics.end_batch()


def begin_stack(runs: Sequence[Run], at: int) -> None:
    """Start each run at the gradient that the loss and the later stacks left at the end of one.

    Raises:
        UnsuitableError: There is none.
    """
    for run in runs:
        end = run.stacks[at].end
        run.gradient = None if end is None else end.grad
        if run.gradient is None:
            raise UnsuitableError(f"the loss does not depend on stack {at} of the model")
        run.stacks[at].end = None


def run_layer(
    job: Job,
    layer: nn.Module,
    targets: Sequence[str],
    runs: Sequence[Run],
    at: int,
    statistics: Consumer,
) -> SpoiledError | None:
    """A layer of stack `at` forward and backward on each batch.

    The runs are left with the gradient of the layer's input. Returns the first batch that holds a
    NaN or an infinity, if one does; those after it were not run.
    """
    with capture_gradients(
        job.model, targets, statistics.consume, flat=False, from_embeddings=False
    ):
        for run in runs:
            statistics.begin_batch(run.items, run.rows, run.scale)
            hidden, output = run.stacks[at].calls.pop().again(layer)
            torch.autograd.backward(output, run.gradient)
            if hidden.grad is None:
                raise UnsuitableError("a layer's output does not depend on its input")
            run.gradient = hidden.grad
            spoiled = statistics.end_batch()
            if spoiled is not None:
                return SpoiledError(run.index, spoiled)
    return None


def end_stack(runs: Sequence[Run], at: int) -> None:
    """Take the gradient of what a stack was given on to the ends of the stacks before it."""
    for run in runs:
        cuts = [cut for cut in run.stacks[at].cuts if cut.copy.grad is not None]
        if cuts:
            # another stack's cuts may lie on the same graph
            torch.autograd.backward(
                [cut.original for cut in cuts], [cut.copy.grad for cut in cuts], retain_graph=True
            )
        run.stacks[at].cuts.clear()
