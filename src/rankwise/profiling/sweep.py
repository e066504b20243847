"""The reverse layer sweep: exact statistics with the gradients of only one layer alive.

A transformers model is a stack of layers, each a function of the layer before it. One forward pass
a batch, without a graph, keeps the input of every layer; the loss is differentiated down to the
output of the last one. Then, from the last layer to the first and batch by batch, a layer is run
again with a graph and its backward pass gives the gradient at its input, which is the next one's
start. All batches of a layer are done before the layer below begins, so that what needs every
batch's gradient, as Gram matrices do, needs it for one layer at a time.

Extra memory: the inputs of all layers for all batches, `M T d` numbers a layer, and the statistics
of one layer. Extra time: the second forward pass of each layer.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rankwise.errors import ProfileError
from rankwise.profiling.batches import (
    Batch,
    Job,
    Ledger,
    batch_rows,
    is_finite,
    run_forward,
    with_progress,
)
from rankwise.profiling.capture import CaptureConsumer, capture_gradients
from rankwise.profiling.staging import wide_dtype
from rankwise.profiling.statistics import ModuleResult, StreamingStatistics
from rankwise.targets import layer_position

_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5}
"""Agreement with the hook engine asked for, relative to the factors of a sketch."""
_HALF_TOLERANCE = 2e-2
_HIDDEN = "hidden_states"
_CHECKPOINTING = "gradient_checkpointing"


class UnsuitableError(Exception):
    """The sweep cannot measure this model exactly; the message says why."""


@dataclass(frozen=True)
class _Stack:
    """The layers that hold targets, from the first such layer to the last layer of the stack."""

    layers: tuple[nn.Module, ...]
    targets: tuple[tuple[str, ...], ...]  # of each layer
    outside: tuple[str, ...]
    last: str


@dataclass
class _Call:
    """How a layer was called: enough to call it again."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    random: _RandomState | None


@dataclass
class _Run:
    """A batch on its way down the stack."""

    index: int
    batch: Batch
    items: int
    rows: int
    calls: list[_Call]
    gradient: Tensor  # at the output of the layer that is next


class _Consumer(Protocol):
    """What the passes need of `StreamingStatistics`."""

    def begin_batch(self, items: int, rows: int) -> None: ...
    def consume(self, name: str, x: Tensor, g: Tensor) -> None: ...
    def spoil(self, name: str) -> None: ...
    def end_batch(self) -> str | None: ...


class _SpoiledError(Exception):
    def __init__(self, index: int, module: str) -> None:
        super().__init__(index, module)
        self.index = index
        self.module = module


def sweep_engine(
    job: Job, batches: Sequence[Batch], ledger: Ledger
) -> Iterator[tuple[str, ModuleResult]]:
    """Measure by the sweep; a module is given out again if a later one spoils a batch.

    First, one batch is measured by hooks as well, and sketches of every gradient are compared.

    Raises:
        UnsuitableError: The model is no plain stack, or the hook engine disagrees.
        ProfileError: See `profile_gradients`.
    """
    stack = _find_stack(job)
    _check_against_hooks(job, stack, batches)
    with _checkpointing_off(job.model):
        left_out: set[int] = set()
        while True:
            try:
                runs = yield from _sweep(job, stack, batches, ledger, left_out)
            except _SpoiledError as spoiled:
                # the layers above have counted the batch already: all of it again without
                ledger.drop(spoiled.index, spoiled.module)
                left_out.add(spoiled.index)
            else:
                break
    for run in runs:
        ledger.count(run.batch, run.items)
    ledger.close(len(batches))


def _sweep(
    job: Job, stack: _Stack, batches: Sequence[Batch], ledger: Ledger, left_out: set[int]
) -> Generator[tuple[str, ModuleResult], None, list[_Run]]:
    """One pass over the batches that are not left out; returns their runs."""
    statistics = StreamingStatistics(stack.outside, job.wanted)
    runs: list[_Run] = []
    todo = [(i, batch) for i, batch in enumerate(batches) if i not in left_out]
    shown = with_progress(todo, len(todo), "running forward", job.progress)
    with closing(shown):
        for index, batch in shown:
            run, spoiled = _run_top(job, stack, statistics, batch, index)
            if run is not None and spoiled is None:
                runs.append(run)
                continue
            left_out.add(index)
            if spoiled is None:
                ledger.skip(index)
            else:
                ledger.drop(index, spoiled)
    if not runs:
        ledger.close(len(batches))
    for name in stack.outside:
        yield name, statistics.pop(name)
    below = with_progress(
        reversed(range(len(stack.layers))), len(stack.layers), "sweeping layers", job.progress
    )
    with closing(below):
        for at in below:
            statistics = StreamingStatistics(stack.targets[at], job.wanted)
            _run_layer(job, stack, at, runs, statistics)
            for name in stack.targets[at]:
                yield name, statistics.pop(name)
    return runs


def _run_top(
    job: Job, stack: _Stack, statistics: _Consumer, batch: Batch, index: int
) -> tuple[_Run | None, str | None]:
    """The forward pass, and the loss gradient at the last layer's output.

    Returns:
        The run, None if the batch has no label; and the module that spoiled it, if one did.
    """
    with _recorded(job, stack, statistics.consume) as (calls, leaves):
        loss, items = run_forward(job, batch, index)
        if not items:
            return None, None
        _check_calls(calls, stack)
        rows = batch_rows(batch)
        statistics.begin_batch(items, rows)
        loss.backward()
    gradient = leaves[0].grad
    if gradient is None:
        raise UnsuitableError("the loss does not depend on the last layer's output")
    if not (is_finite(loss) and bool(torch.isfinite(gradient).all())):
        statistics.spoil(stack.last)
    spoiled = statistics.end_batch()
    return _Run(index, batch, items, rows, [call for _, call in calls], gradient), spoiled


def _run_layer(
    job: Job, stack: _Stack, at: int, runs: Sequence[_Run], statistics: _Consumer
) -> None:
    """A layer forward and backward on each batch; the runs are left with the input's gradient."""
    capture = capture_gradients(
        job.model, stack.targets[at], statistics.consume, flat=False, from_embeddings=False
    )
    with capture:
        for run in runs:
            call = run.calls.pop()
            hidden = call.hidden.requires_grad_(True)
            statistics.begin_batch(run.items, run.rows)
            if call.random is not None:
                call.random.restore()
            output = stack.layers[at](*_with_hidden(call.args, hidden), **_kwargs(call))
            torch.autograd.backward(_hidden_of(output), run.gradient)
            if hidden.grad is None:
                raise UnsuitableError("a layer's output does not depend on its input")
            run.gradient = hidden.grad
            spoiled = statistics.end_batch()
            if spoiled is not None:
                raise _SpoiledError(run.index, spoiled)


def _find_stack(job: Job) -> _Stack:
    """The one ModuleList whose layers hold the targets."""
    positions = {name: layer_position(name) for name in job.selected}
    stacks = {p.stack for p in positions.values() if p.index is not None}
    if len(stacks) != 1:
        raise UnsuitableError(f"the targets lie in {len(stacks)} stacks of layers, not in one")
    (path,) = stacks
    layers = job.model.get_submodule(path)
    if not isinstance(layers, nn.ModuleList):
        raise UnsuitableError(f"{path or 'the model'} is no list of layers")
    inside: list[list[str]] = [[] for _ in layers]
    for name, position in positions.items():
        if position.index is not None:
            inside[position.index].append(name)
    first = next(i for i, names in enumerate(inside) if names)
    outside = tuple(name for name, position in positions.items() if position.index is None)
    last = f"{path}.{len(layers) - 1}"
    return _Stack(tuple(layers)[first:], tuple(map(tuple, inside[first:])), outside, last)


@contextmanager
def _recorded(
    job: Job, stack: _Stack, consume: CaptureConsumer
) -> Iterator[tuple[list[tuple[nn.Module, _Call]], list[Tensor]]]:
    """Record how each layer is called, and start the graph at the last one's output."""
    calls: list[tuple[nn.Module, _Call]] = []
    leaves: list[Tensor] = []

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get(_HIDDEN)
        if not isinstance(hidden, Tensor):
            raise UnsuitableError(f"{type(layer).__name__} does not take hidden states first")
        state = _RandomState() if job.train_mode else None
        calls.append((layer, _Call(hidden.detach(), args, kwargs, state)))

    def after(_layer: nn.Module, _args: object, output: Any) -> Any:
        leaves.append(_hidden_of(output).detach().requires_grad_(True))
        hidden = leaves[-1].clone()  # what follows may change it in place, a leaf it may not
        return hidden if isinstance(output, Tensor) else type(output)((hidden, *output[1:]))

    with ExitStack() as hooks:
        hooks.enter_context(
            capture_gradients(job.model, stack.outside, consume, flat=False, from_embeddings=False)
        )
        for layer in stack.layers:
            hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        hooks.callback(stack.layers[-1].register_forward_hook(after).remove)
        yield calls, leaves


def _check_calls(calls: Sequence[tuple[nn.Module, _Call]], stack: _Stack) -> None:
    if [layer for layer, _ in calls] != list(stack.layers):
        raise UnsuitableError("the layers are not called once each, in order")


def _hidden_of(output: Any) -> Tensor:
    hidden = output if isinstance(output, Tensor) else None
    if type(output) in (tuple, list) and output:
        hidden = output[0]
    if not isinstance(hidden, Tensor):
        raise UnsuitableError(f"a layer returns a {type(output).__name__}, not hidden states first")
    return hidden


def _with_hidden(args: tuple[Any, ...], hidden: Tensor) -> tuple[Any, ...]:
    return (hidden, *args[1:]) if args else (hidden,)


def _kwargs(call: _Call) -> dict[str, Any]:
    return {k: v for k, v in call.kwargs.items() if call.args or k != _HIDDEN}


class _RandomState:
    """The state of torch's generators, so that a layer drops out the same units again."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore(self) -> None:
        """Set the generators back."""
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


@contextmanager
def _checkpointing_off(model: nn.Module) -> Iterator[None]:
    """The sweep recomputes layers itself; a checkpoint inside it would do so once more."""
    switched = [m for m in model.modules() if getattr(m, _CHECKPOINTING, None) is True]
    try:
        for module in switched:
            setattr(module, _CHECKPOINTING, False)
        yield
    finally:
        for module in switched:
            setattr(module, _CHECKPOINTING, True)


class _Sketch:
    """`u' G v` of each module for random vectors, and the size its factors give it.

    Two engines that agree on it agree on G but for an accident of probability zero; it needs no
    matrix of the weight's size.
    """

    def __init__(self) -> None:
        self.value: dict[str, float] = {}
        self.size: dict[str, float] = {}

    def begin_batch(self, items: int, rows: int) -> None:
        """Nothing: there is one batch."""

    def spoil(self, name: str) -> None:
        """Nothing: a NaN shows in the comparison."""

    def end_batch(self) -> str | None:
        """Nothing, as `begin_batch`."""
        return None

    def consume(self, name: str, x: Tensor, g: Tensor) -> None:
        """Add one use of a module."""
        wide = wide_dtype(x.dtype)
        generator = torch.Generator().manual_seed(0)
        sides = []
        for side in (x, g):
            vector = torch.randn(side.shape[-1], generator=generator)
            sides.append((side.to(wide) @ vector.to(side.device, wide)).flatten())
        self.value[name] = self.value.get(name, 0.0) + float(sides[0] @ sides[1])
        size = float(sides[0].norm() * sides[1].norm())
        self.size[name] = self.size.get(name, 0.0) + size

    def disagreement(self, other: _Sketch, tolerance: float) -> str | None:
        """A module on which the two differ."""
        for name in {**self.value, **other.value}:
            here, there = self.value.get(name, 0.0), other.value.get(name, 0.0)
            slack = tolerance * max(self.size.get(name, 0.0), other.size.get(name, 0.0))
            if not abs(here - there) <= slack:
                return name
        return None


def _check_against_hooks(job: Job, stack: _Stack, batches: Sequence[Batch]) -> None:
    """Sketch the first batch that has labels and a finite gradient by both engines."""
    start = _RandomState()
    for index, batch in enumerate(batches):
        start.restore()
        try:
            agreed = _compare(job, stack, batch, index)
        except (ProfileError, UnsuitableError):
            raise
        except Exception as error:
            raise UnsuitableError(f"{type(error).__name__}: {error}") from error
        if agreed:
            break
    start.restore()


def _compare(job: Job, stack: _Stack, batch: Batch, index: int) -> bool:
    """Whether the batch could be compared.

    Raises:
        UnsuitableError: It could, and the engines disagree.
    """
    start = _RandomState()
    by_hooks, by_sweep = _Sketch(), _Sketch()
    with capture_gradients(job.model, job.selected, by_hooks.consume, flat=False):
        loss, items = run_forward(job, batch, index)
        if not items:
            return False
        loss.backward()
    if not (is_finite(loss) and all(map(math.isfinite, by_hooks.size.values()))):
        return False
    start.restore()
    with _checkpointing_off(job.model):
        run, _ = _run_top(job, stack, by_sweep, batch, index)
        for at in reversed(range(len(stack.layers))):
            _run_layer(job, stack, at, [run] if run else [], by_sweep)
    tolerance = _TOLERANCE.get(next(job.model.parameters()).dtype, _HALF_TOLERANCE)
    name = by_hooks.disagreement(by_sweep, tolerance)
    if name is not None:
        raise UnsuitableError(f"its gradient of {name} is not the one that hooks see")
    return True
