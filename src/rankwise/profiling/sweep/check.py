"""Whether the sweep measures what hooks measure, on one batch, before it is trusted."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.errors import ProfileError
from rankwise.profiling.batches import Batch, Job, is_finite, run_forward
from rankwise.profiling.capture import capture_gradients
from rankwise.profiling.loss import IGNORED_LABEL, model_loss
from rankwise.profiling.precision import autocast_off, loss_scale
from rankwise.profiling.staging import wide_dtype
from rankwise.profiling.sweep.head import ChunkedLoss
from rankwise.profiling.sweep.passes import begin_stack, end_stack, run_layer, run_top
from rankwise.profiling.sweep.recording import RandomState
from rankwise.profiling.sweep.structure import Structure, UnsuitableError

logger = logging.getLogger(__name__)
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5}
"""Agreement with the hook engine asked for, relative to the factors of a sketch."""
_HALF_TOLERANCE = 2e-2
_CHECKPOINTING = "gradient_checkpointing"


@dataclass(frozen=True)
class Way:
    """A way to sweep a model that agrees with hooks."""

    structure: Structure
    loss: ChunkedLoss | None


def checked_way(job: Job, structure: Structure, batches: Sequence[Batch]) -> Way:
    """Compare with hooks on the first batch that has labels and a finite gradient.

    Of a batch with the model's own loss one sample is enough: hooks keep the activations of all
    layers, which would be the most memory that the sweep ever takes. The loss in chunks is tried
    first, where the model's loss may be done so.

    Raises:
        UnsuitableError: The engines disagree, or the sweep cannot run.
    """
    start = RandomState()
    for index, batch in enumerate(batches):
        start.restore()
        try:
            way = _compare(job, structure, _one_sample(job, batch), index)
        except (ProfileError, UnsuitableError):
            raise
        except Exception as error:
            raise UnsuitableError(f"{type(error).__name__}: {error}") from error
        if way is not None:
            start.restore()
            return way
    start.restore()
    return Way(structure, None)


def _one_sample(job: Job, batch: Batch) -> Batch:
    """The sample with the most labels, where the loss is known to allow one alone."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if job.loss_fn is not model_loss or not isinstance(labels, Tensor) or not labels.ndim:
        return batch
    if any(not isinstance(v, Tensor) or v.shape[:1] != labels.shape[:1] for v in batch.values()):
        return batch
    labelled = (labels != IGNORED_LABEL).reshape(len(labels), -1).sum(1)
    best = int(labelled.argmax()) if len(labels) else 0
    return {key: value[best : best + 1] for key, value in batch.items()}


def _compare(job: Job, structure: Structure, batch: Batch, index: int) -> Way | None:
    """The way to go, or None if the batch cannot be compared."""
    start = RandomState()
    by_hooks = Sketch()
    with (
        _calls_noted(structure) as called,
        capture_gradients(job.model, job.selected, by_hooks.consume, flat=False),
    ):
        loss, items = run_forward(job, batch, index)
        if not items:
            return None
        by_hooks.scale = loss_scale(job.model, items)
        (loss * by_hooks.scale).backward()
    if not (is_finite(loss) and all(map(math.isfinite, by_hooks.size.values()))):
        return None
    del loss
    structure = structure.in_order(called)
    chunked = ChunkedLoss.find(job)
    if chunked is not None:
        start.restore()
        try:
            _agree(job, Way(structure, chunked), batch, index, by_hooks)
        except Exception as reason:
            logger.debug("the loss is not differentiated in chunks: %s", reason)
        else:
            return Way(structure, chunked)
    start.restore()
    _agree(job, Way(structure, None), batch, index, by_hooks)
    return Way(structure, None)


def _agree(job: Job, way: Way, batch: Batch, index: int, by_hooks: Sketch) -> None:
    by_sweep = Sketch()
    tolerance = _TOLERANCE.get(next(job.model.parameters()).dtype, _HALF_TOLERANCE)
    with checkpointing_off(job.model):
        run, _ = run_top(job, way.structure, by_sweep, batch, index, way.loss)
        runs = [run] if run else []
        if run and run.autocast:
            tolerance = _HALF_TOLERANCE
        for at in reversed(range(len(way.structure.stacks))):
            stack = way.structure.stacks[at]
            begin_stack(runs, at)
            for layer, targets in zip(reversed(stack.layers), reversed(stack.targets), strict=True):
                run_layer(job, layer, targets, runs, at, by_sweep)
            end_stack(runs, at)
    name = by_hooks.disagreement(by_sweep, tolerance)
    if name is not None:
        raise UnsuitableError(f"its gradient of {name} is not the one that hooks see")


@contextmanager
def _calls_noted(structure: Structure) -> Iterator[list[nn.Module]]:
    called: list[nn.Module] = []
    with ExitStack() as hooks:
        for layer in structure.layers:
            note = layer.register_forward_pre_hook(lambda module, _: called.append(module))
            hooks.callback(note.remove)
        yield called


@contextmanager
def checkpointing_off(model: nn.Module) -> Iterator[None]:
    """The sweep recomputes layers itself; a checkpoint inside it would do so once more."""
    switched = [m for m in model.modules() if getattr(m, _CHECKPOINTING, None) is True]
    try:
        for module in switched:
            setattr(module, _CHECKPOINTING, False)
        yield
    finally:
        for module in switched:
            setattr(module, _CHECKPOINTING, True)


class Sketch:
    """`u' G v` of each module for random vectors, and the size its factors give it.

    Two engines that agree on it agree on G but for an accident of probability zero; it needs no
    matrix of the weight's size.
    """

    def __init__(self) -> None:
        self.value: dict[str, float] = {}
        self.size: dict[str, float] = {}
        self.scale = 1.0

    def begin_batch(self, items: int, rows: int, scale: float) -> None:
        """Note what the loss was multiplied by; there is one batch."""
        self.scale = scale

    def spoil(self, name: str) -> None:
        """Nothing: a NaN shows in the comparison."""

    def end_batch(self) -> str | None:
        """Nothing, as `begin_batch`."""
        return None

    @autocast_off()
    def consume(self, name: str, x: Tensor, g: Tensor) -> None:
        """Add one use of a module."""
        wide = wide_dtype(x.dtype)
        generator = torch.Generator().manual_seed(0)
        sides, g = [], g.to(wide) / self.scale
        for side in (x, g):
            vector = torch.randn(side.shape[-1], generator=generator)
            sides.append((side.to(wide) @ vector.to(side.device, wide)).flatten())
        self.value[name] = self.value.get(name, 0.0) + float(sides[0] @ sides[1])
        size = float(sides[0].norm() * sides[1].norm())
        self.size[name] = self.size.get(name, 0.0) + size

    def disagreement(self, other: Sketch, tolerance: float) -> str | None:
        """A module on which the two differ."""
        for name in {**self.value, **other.value}:
            here, there = self.value.get(name, 0.0), other.value.get(name, 0.0)
            slack = tolerance * max(self.size.get(name, 0.0), other.size.get(name, 0.0))
            if not abs(here - there) <= slack:
                return name
        return None
