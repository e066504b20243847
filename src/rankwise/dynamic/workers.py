"""Several processes that train one model: one signal, one decision, and a check that all agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from rankwise.errors import DynamicError

T = TypeVar("T")


def count() -> int:
    """Processes in the default group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(number: int, device: torch.device) -> int:
    """The sum of a number over all workers."""
    if count() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.int64, device=device)
    dist.all_reduce(tensor)
    return int(tensor)


def mean(own: Tensor, batches: int, all_batches: int) -> Tensor:
    """The mean over all workers' batches of what has a mean over `batches` here.

    In the tensor's own dtype, which is fp32 or wider; without other workers, the tensor itself.
    """
    if count() == 1:
        return own
    weighted = own.contiguous() * (batches / all_batches)
    dist.all_reduce(weighted)
    return weighted


def of_the_first(value: T) -> T:
    """The first worker's value, on every worker."""
    if count() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def check_agreement(facts: Mapping[str, str]) -> None:
    """Compare hashes of what must be the same everywhere.

    Raises:
        DynamicError: On every worker alike; it names the workers that differ from worker 0, and in
            what.
    """
    if count() == 1:
        return
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, dict(facts))
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
