"""Several processes that train one model: one signal, one decision, and a check that all agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from rankwise.errors import DynamicError, reason_of

T = TypeVar("T")


def count() -> int:
    """Processes in the default group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean(own: Tensor) -> Tensor:
    """The mean over all workers, in the tensor's own dtype; without others, the tensor itself."""
    if count() == 1:
        return own
    total = own.clone(memory_format=torch.contiguous_format)
    with _connected():
        dist.all_reduce(total)
    return total.div_(count())


def of_the_first(value: T) -> T:
    """The first worker's value, on every worker."""
    if count() == 1:
        return value
    box: list[Any] = [value]
    with _connected():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def first_of_any(value: T | None) -> T | None:
    """What the first worker that has something has, on every worker."""
    return next((theirs for theirs in _everyones(value) if theirs is not None), None)


def check_agreement(facts: Mapping[str, str]) -> None:
    """Compare hashes of what must be the same everywhere.

    Raises:
        DynamicError: On every worker alike; it names the workers that differ from worker 0, and in
            what.
    """
    found = _everyones(dict(facts))
    differences = [
        f"worker {worker} has another {fact}"
        for worker, theirs in enumerate(found)
        for fact in facts
        if theirs[fact] != found[0][fact]
    ]
    if differences:
        raise DynamicError(
            f"the workers no longer train one model: {'; '.join(differences)} than worker 0. Start "
            "every worker with the same plan, options, seed and checkpoint."
        )


def _everyones(value: T) -> list[T]:
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    with _connected():
        dist.all_gather_object(found, value)
    return found


@contextmanager
def _connected() -> Iterator[None]:
    """Say what a broken connection means: another worker has ended."""
    try:
        yield
    except RuntimeError as error:
        raise DynamicError(
            "the connection to another worker broke while ranks were decided; it has probably "
            f"ended, and its own output says why ({reason_of(error, 1)}). Resume every "
            "worker from rankwise.last_checkpoint(output_dir)."
        ) from error
