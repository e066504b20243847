"""How the layers of a model are called in a forward pass, and calling one of them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.profiling.batches import Job
from rankwise.profiling.capture import CaptureConsumer, capture_gradients
from rankwise.profiling.sweep.structure import Structure, UnsuitableError

_HIDDEN = "hidden_states"


class RandomState:
    """The state of torch's generators, so that a layer drops out the same units again."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore(self) -> None:
        """Set the generators back."""
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


class Autocast:
    """Whether autocasting is on, and to which dtype, so that a layer runs in the same again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device.type
        self.enabled = torch.is_autocast_enabled(self._device)
        self._dtype = torch.get_autocast_dtype(self._device)

    def again(self) -> torch.autocast:
        """The same setting as a context."""
        return torch.autocast(self._device, dtype=self._dtype, enabled=self.enabled)


@dataclass
class Call:
    """How a layer was called: enough to call it again."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    cuts: list[Tensor]  # what it takes from earlier stacks
    autocast: Autocast
    random: RandomState | None

    def again(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Call the layer with a graph; returns the hidden states that go in and come out."""
        hidden = self.hidden.requires_grad_(True)
        for cut in self.cuts:
            cut.requires_grad_(True)  # its gradient adds up over the layers
        if self.random is not None:
            self.random.restore()
        args = (hidden, *self.args[1:]) if self.args else ()
        kwargs = self.kwargs if self.args else {**self.kwargs, _HIDDEN: hidden}
        with self.autocast.again():
            return hidden, hidden_of(layer(*args, **kwargs))


@dataclass
class Cut:
    """A tensor that an earlier stack's graph ends in, and the copy that a layer was given."""

    original: Tensor
    copy: Tensor


@dataclass
class StackRecord:
    """One stack in one forward pass."""

    calls: list[Call] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    end: Tensor | None = None
    """The last layer's output, from which the graph goes on."""


def hidden_of(output: Any) -> Tensor:
    """The hidden states that a layer returns, alone or first in a tuple.

    Raises:
        UnsuitableError: It returns something else.
    """
    hidden = output if isinstance(output, Tensor) else None
    if type(output) in (tuple, list) and output:
        hidden = output[0]
    if not isinstance(hidden, Tensor):
        raise UnsuitableError(f"a layer returns a {type(output).__name__}, not hidden states first")
    return hidden


class Recorder:
    """Records a forward pass; the graph starts anew at the end of every stack."""

    def __init__(self, job: Job, structure: Structure) -> None:
        self._job = job
        self._layers = [layer for stack in structure.stacks for layer in stack.layers]
        self._places = [(i, layer) for i, s in enumerate(structure.stacks) for layer in s.layers]
        self._ends = {id(stack.layers[-1]): i for i, stack in enumerate(structure.stacks)}
        self._called: list[nn.Module] = []
        self._cuts: dict[int, Cut] = {}
        self.stacks = [StackRecord() for _ in structure.stacks]

    @contextmanager
    def running(self, outside: tuple[str, ...], consume: CaptureConsumer) -> Iterator[None]:
        """Record what runs in the block, and capture the targets outside the stacks."""
        is_open = True

        def guarded(name: str, x: Tensor, g: Tensor) -> None:
            if not is_open:
                raise UnsuitableError(f"{name} lies before a stack of layers, not after the last")
            consume(name, x, g)

        with ExitStack() as hooks:
            hooks.enter_context(
                capture_gradients(
                    self._job.model, outside, guarded, flat=False, from_embeddings=False
                )
            )
            for layer in self._layers:
                hooks.callback(
                    layer.register_forward_pre_hook(self._enter, with_kwargs=True).remove
                )
            for layer in (layer for layer in self._layers if id(layer) in self._ends):
                hooks.callback(layer.register_forward_hook(self._leave).remove)
            yield
        is_open = False

    def check(self) -> None:
        """Check that the pass went through the layers as the structure says.

        Raises:
            UnsuitableError: It did not.
        """
        if [id(layer) for layer in self._called] != [id(layer) for layer in self._layers]:
            raise UnsuitableError("the layers are not called once each, in order")

    def _enter(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs.get(_HIDDEN)
        if not isinstance(hidden, Tensor):
            raise UnsuitableError(f"{type(layer).__name__} does not take hidden states first")
        at = len(self._called)
        if at >= len(self._places) or self._places[at][1] is not layer:
            raise UnsuitableError("the layers are not called once each, in order")
        self._called.append(layer)
        record = self.stacks[self._places[at][0]]
        if hidden.requires_grad and record.calls:
            raise UnsuitableError(f"something comes between two calls of {type(layer).__name__}")
        cuts: list[Tensor] = []
        args, kwargs = _mapped((args, kwargs), lambda tensor: self._cut(tensor, record, cuts))
        hidden = args[0] if args else kwargs[_HIDDEN]
        if not any(cut is hidden for cut in cuts):
            hidden = hidden.detach()  # a leaf of its own
        state = RandomState() if self._job.train_mode else None
        record.calls.append(Call(hidden, args, kwargs, cuts, Autocast(hidden.device), state))
        return args, kwargs

    def _cut(self, tensor: Tensor, record: StackRecord, cuts: list[Tensor]) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        if id(tensor) not in self._cuts:
            self._cuts[id(tensor)] = Cut(tensor, tensor.detach())
            record.cuts.append(self._cuts[id(tensor)])
        cuts.append(self._cuts[id(tensor)].copy)
        return cuts[-1]

    def _leave(self, layer: nn.Module, _args: object, output: Any) -> Any:
        end = hidden_of(output).detach().requires_grad_(True)
        self.stacks[self._ends[id(layer)]].end = end
        hidden = end.clone()  # what follows may change it in place, a leaf it may not
        return hidden if isinstance(output, Tensor) else type(output)((hidden, *output[1:]))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of tuples, lists and dicts with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, change) for item in value)
    if type(value) is dict:
        return {key: _mapped(item, change) for key, item in value.items()}
    return value
