"""Running out of memory becomes an error that says how to need less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rankwise.errors import RankwiseError


@contextmanager
def out_of_memory_as(kind: type[RankwiseError], message: str) -> Iterator[None]:
    """Raise `kind` with a message in place of the errors of an allocator, and only of those."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # on a GPU torch.OutOfMemoryError, on a CPU a plain RuntimeError of the allocator
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not (known or "can't allocate memory" in str(error)):
            raise
        raise kind(message) from error
