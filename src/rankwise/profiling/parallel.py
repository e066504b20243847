"""Independent work over threads, with results that do not depend on how many there are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def map_in_order(
    function: Callable[[T], R], items: Iterable[T], workers: int
) -> Generator[R, None, None]:
    """`map(function, items)` over threads with one BLAS thread each.

    Many small decompositions scale better so than each over all cores, and come out the same
    whatever the number of workers. At most `workers` items are taken before their turn. One worker
    is the calling thread itself, with its own setting. An exception comes out in its item's place.
    """
    if workers < 2:
        yield from map(function, items)
        return
    before = torch.get_num_threads()
    waiting: deque[Future[R]] = deque()
    try:
        with ThreadPoolExecutor(workers, "rankwise", torch.set_num_threads, (1,)) as pool:
            for item in items:
                waiting.append(pool.submit(function, item))
                del item
                if len(waiting) == workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(before)  # threads started later take over the last one set
