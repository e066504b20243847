"""The stacks of layers that hold a model's targets, found by structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from rankwise.profiling.batches import Job
from rankwise.targets import layer_position


class UnsuitableError(Exception):
    """The sweep cannot measure this model exactly; the message says why."""


@dataclass(frozen=True)
class Stack:
    """The layers of one ModuleList that are swept, from the first that matters to the last."""

    layers: tuple[nn.Module, ...]
    targets: tuple[tuple[str, ...], ...]  # of each layer
    last: str


@dataclass(frozen=True)
class Structure:
    """All stacks that hold targets, in the order they are called in, and the targets outside."""

    stacks: tuple[Stack, ...]
    outside: tuple[str, ...]

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The layers of all stacks."""
        return tuple(layer for stack in self.stacks for layer in stack.layers)

    def in_order(self, called: Sequence[nn.Module]) -> Structure:
        """The stacks by the first of these calls that each one's first layer appears in.

        Raises:
            UnsuitableError: A stack is not called.
        """
        first = {id(layer): at for at, layer in reversed(list(enumerate(called)))}
        for stack in self.stacks:
            if id(stack.layers[0]) not in first:
                raise UnsuitableError(f"the stack that ends in {stack.last} is not called")
        stacks = sorted(self.stacks, key=lambda stack: first[id(stack.layers[0])])
        return Structure(tuple(stacks), self.outside)


def find_structure(job: Job) -> Structure:
    """The ModuleLists whose layers hold targets.

    Raises:
        UnsuitableError: There is none, or a numbered module is no ModuleList.
    """
    inside: dict[str, dict[int, list[str]]] = {}
    outside = []
    for name in job.selected:
        position = layer_position(name)
        if position.index is None:
            outside.append(name)
        else:
            inside.setdefault(position.stack, {}).setdefault(position.index, []).append(name)
    if not inside:
        raise UnsuitableError("no target lies in a stack of layers")
    stacks = []
    for path, targets in inside.items():
        layers = job.model.get_submodule(path)
        if not isinstance(layers, nn.ModuleList):
            raise UnsuitableError(f"{path or 'the model'} is no list of layers")
        # below the first target of a single stack no gradient is needed
        swept = range(min(targets) if len(inside) == 1 else 0, len(layers))
        names = tuple(tuple(targets.get(i, ())) for i in swept)
        stacks.append(Stack(tuple(layers[i] for i in swept), names, f"{path}.{len(layers) - 1}"))
    return Structure(tuple(stacks), tuple(outside))
