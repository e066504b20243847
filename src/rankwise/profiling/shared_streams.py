"""Batch gradients of one module over several workers: their sum, or all of them in order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from rankwise.profiling.batches import Ledger
from rankwise.profiling.shared import SharedLedger
from rankwise.profiling.staging import (
    BatchGradient,
    GradientSum,
    KeptGradients,
    MeanGradient,
    TokenGradient,
)
from rankwise.profiling.statistics import Statistic, Stream
from rankwise.profiling.workers import Workers

_BLOCK = 2**22
"""Entries of a sum that travel at a time."""


class SharedSum(GradientSum):
    """A running sum of which every worker holds a part."""

    def __init__(self, name: str, workers: Workers) -> None:
        super().__init__(convergence=False)
        self._name = name
        self._workers = workers

    def finish(self) -> tuple[MeanGradient | None, Tensor | None, list[float]]:
        """The mean gradient over all workers' batches; no Gram matrix, no GIDs."""
        if self._kept:  # few tokens, which do not travel as such
            self._total, self._kept = TokenGradient(tuple(self._kept)).dense(), []
        total = self._total
        shapes = self._workers.gather_values(
            [sum(self._items), _about(total)], f"size of the sum of {self._name}"
        )
        self._items = [items for items, _ in shapes]
        about = next((about for _, about in shapes if about is not None), None)
        if about is None:
            return super().finish()
        if total is None:
            total = torch.zeros(about[:2], dtype=getattr(torch, about[2]))
        step = max(_BLOCK // total.shape[1], 1)
        for start in range(0, total.shape[0], step):
            rows = total[start : start + step]
            first, *rest = self._workers.gather(rows, f"rows from {start} of {self._name}")
            for part in rest:
                first += part
            rows.copy_(first)
        self._total = total
        return super().finish()


class SharedGradients(KeptGradients):
    """Batch gradients of which every worker keeps its own."""

    def __init__(
        self, name: str, ledger: SharedLedger, wanted: Iterable[Statistic], *, alike: bool
    ) -> None:
        self._wanted = frozenset(wanted)
        super().__init__(convergence="convergence" in self._wanted)
        self._name = name
        self._ledger = ledger
        self._alike = alike  # whether the mean must be so bit for bit

    def finish(self) -> tuple[Tensor | None, Tensor | None, list[float]]:
        """Mean, Gram matrix and GIDs of the prefixes, over all workers' batches in their order."""
        workers = self._ledger.workers
        places = self._ledger.counted_places(len(self._kept))
        full = [not kept.is_empty for kept in self._kept]
        dtype = str(self._like.dtype).removeprefix("torch.")
        own = [
            list(zip(places, self._items, full, strict=True)),
            None if self._shape is None else [*self._shape, dtype],
        ]
        everyones = workers.gather_values(own, f"batches of {self._name}")
        about = next((about for _, about in everyones if about is not None), None)
        if about is not None and self._shape is None:
            self._shape = (about[0], about[1])
            self._like = torch.zeros((), dtype=getattr(torch, about[2]))
        kept = [gradient for gradient in self._kept if not gradient.is_empty]
        rows = _RowExchange(workers, kept, self._like, self._shape or (0, 0), self._name)
        batches: list[tuple[int, int, BatchGradient]] = []
        for rank, (theirs, _) in enumerate(everyones):
            at = 0
            for place, items, is_full in theirs:
                batches.append((place, items, _Elsewhere(rows, rank, at if is_full else None)))
                at += is_full
        batches.sort(key=lambda batch: batch[0])
        self._items = [items for _, items, _ in batches]
        self._kept = [gradient for _, _, gradient in batches]
        mean, gram, gids = super().finish()
        if self._alike and mean is not None:
            _copy_from_first_(mean, workers, self._name)
        return mean, gram if "gram" in self._wanted else None, gids


def _copy_from_first_(tensor: Tensor, workers: Workers, name: str) -> None:
    step = max(_BLOCK // tensor.shape[1], 1)
    for start in range(0, tensor.shape[0], step):
        rows = tensor[start : start + step]
        own = rows if workers.rank == 0 else rows[:0]
        rows.copy_(workers.gather(own, f"mean of {name} from {start}")[0])


class _RowExchange:
    """Rows of all workers' batch gradients; the ones asked for last are at hand."""

    def __init__(
        self,
        workers: Workers,
        kept: list[BatchGradient],
        like: Tensor,
        shape: tuple[int, int],
        name: str,
    ) -> None:
        self._workers = workers
        self._kept = kept
        self._like = like
        self._shape = shape
        self._name = name
        self._asked: tuple[int, int] | None = None
        self._rows: list[Tensor] = []

    def rows(self, start: int, end: int) -> list[Tensor]:
        """Of each worker `(batches, rows, d_in)`; all workers must ask for the same."""
        if self._asked != (start, end):
            block = self._like.new_empty(len(self._kept), end - start, self._shape[1])
            for i, gradient in enumerate(self._kept):
                block[i] = gradient.rows(start, end)
            self._rows = self._workers.gather(block, f"rows from {start} of {self._name}")
            self._asked = (start, end)
        return self._rows


class _Elsewhere(BatchGradient):
    """A batch gradient on some worker."""

    def __init__(self, exchange: _RowExchange, rank: int, at: int | None) -> None:
        super().__init__()
        self._exchange = exchange
        self._rank = rank
        self._at = at

    @property
    def is_empty(self) -> bool:
        return self._at is None

    def rows(self, start: int, end: int) -> Tensor:
        assert self._at is not None
        return self._exchange.rows(start, end)[self._rank][self._at]


def keeps_batches(wanted: Collection[str], workers: int) -> bool:
    """Whether every batch's gradient must be kept: what pairs or orders batches of workers."""
    return "gram" in wanted or (workers > 1 and "convergence" in wanted)


def stream_maker(
    wanted: frozenset[Statistic], ledger: Ledger, *, keep_gradients: bool
) -> Callable[[str], Stream] | None:
    """What makes a module's stream when several workers share the batches; None if they do not."""
    if not isinstance(ledger, SharedLedger):
        return None
    shared = ledger

    def make(name: str) -> Stream:
        if keeps_batches(wanted, shared.workers.size):
            return SharedGradients(name, shared, wanted, alike=keep_gradients)
        return SharedSum(name, shared.workers)

    return make


def _about(tensor: Tensor | None) -> list[Any] | None:
    if tensor is None:
        return None
    return [*tensor.shape, str(tensor.dtype).removeprefix("torch.")]
