"""Profiling by several workers: each takes every n-th batch, and all end with one profile.

Batch k of the data belongs to worker `k mod n`. A worker runs its own batches through its own copy
of the model; then, module by module, the gradients are put together a few rows at a time: sums are
added in the workers' order, and batch gradients that are kept for Gram matrices or convergence
stand in the order of the data, so that what is computed from them is what one process computes.
Spectra cost the most after that and are divided: each worker has its modules, all at once, and the
others take over its numbers bit for bit.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import (
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
)
from contextlib import closing
from dataclasses import asdict, replace
from hashlib import sha256
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from rankwise.errors import ProfileError
from rankwise.profiling.batches import Batch, Ledger
from rankwise.profiling.profile import ModuleStatistics
from rankwise.profiling.reduce import Found
from rankwise.profiling.staging import BatchGradient, GradientSum, KeptGradients, MeanGradient, TokenGradient
from rankwise.profiling.statistics import ModuleResult, Statistic, Stream
from rankwise.profiling.workers import Workers
from rankwise.provenance import batch_digest

_BLOCK = 2**22
"""Entries of a sum that travel at a time."""
_ARRAYS = ("spectra", "gram", "convergence")

logger = logging.getLogger(__name__)
Results = Generator[tuple[str, ModuleResult], None, str]
"""An engine's results; a module may come twice, and then the later one counts."""
Counts = dict[str, tuple[int, int, int, float | None]]
"""Rows, batches, zero batches and Fisher information of each module, of one worker's batches."""


class Share:
    """A worker's part of the batches, and the account of what all workers read."""

    def __init__(self, workers: Workers, asked: int, *, sharded: bool) -> None:
        self._workers = workers
        self._asked = asked
        self._sharded = sharded
        self._read = sha256()
        self.batches = len(range(workers.rank, asked, workers.size))

    def of(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """The batches that this worker measures."""
        if self._sharded or self._workers.size == 1:
            yield from islice(iter(loader), self.batches)
            return
        for index, batch in enumerate(islice(iter(loader), self._asked)):
            if isinstance(batch, Mapping):
                self._read.update(batch_digest(batch))
            if index % self._workers.size == self._workers.rank:
                yield batch

    def check(self, digests: Iterable[str]) -> None:
        """Hold what the workers read against each other, when all is read.

        Raises:
            ProfileError: Loaders that should give the same batches do not.
        """
        if self._sharded:
            counted = list(digests)
            if len(set(counted)) < len(counted):
                logger.warning(
                    "%d of %d batches were measured more than once: the workers' loaders overlap, "
                    "or were padded to equal lengths",
                    len(counted) - len(set(counted)),
                    len(counted),
                )
            return
        everyones = self._workers.gather_values(self._read.hexdigest(), "batches read")
        for rank, theirs in enumerate(everyones):
            if theirs != everyones[0]:
                raise ProfileError(
                    f"the loaders of worker 0 and worker {rank} give different batches; give "
                    "every worker the same ones in the same order (seed the shuffling), or, if "
                    "each worker's loader gives its own share, pass distributed='sharded'."
                )


class SharedLedger(Ledger):
    """The account of one worker's batches, and after `close` that of all, on every worker."""

    def __init__(self, asked: int, workers: Workers, share: Share) -> None:
        super().__init__(asked)
        self.workers = workers
        self.share = share
        self.own_samples = 0  # of the batches that counted on this worker

    def place(self, index: int) -> int:
        """Where one of this worker's batches stands among all."""
        return index * self.workers.size + self.workers.rank

    def counted_places(self, count: int) -> list[int]:
        """Places of the first `count` batches of this worker that are not left out."""
        left_out = {*self.dropped, *self.unlabelled}
        places = (self.place(i) for i in range(count + len(left_out)))
        return [place for place in places if place not in left_out][:count]

    def reset(self) -> None:
        """Forget everything, for another engine to begin."""
        self.__init__(self.asked, self.workers, self.share)  # type: ignore[misc]

    def close(self, seen: int) -> None:
        """Join the workers' accounts, and check the whole.

        Raises:
            ProfileError: As `Ledger.close`, of all workers' batches together; or the workers have
                read other batches than they should.
        """
        self.own_samples = sum(self.rows)
        places = self.counted_places(len(self.rows))
        counted = zip(places, self.rows, self.items, self.digests, strict=True)
        own = [list(counted), sorted(self.unlabelled), list(self.dropped.items()), seen]
        everyones = self.workers.gather_values(own, "what became of the batches")
        batches = sorted(batch for theirs in everyones for batch in theirs[0])
        self.rows = [batch[1] for batch in batches]
        self.items = [batch[2] for batch in batches]
        self.digests = [batch[3] for batch in batches]
        self.unlabelled = sorted(index for theirs in everyones for index in theirs[1])
        self.dropped = dict(sorted(pair for theirs in everyones for pair in theirs[2]))
        self.share.check(self.digests)
        super().close(sum(theirs[3] for theirs in everyones))


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


def is_sharded(loader: object) -> bool:
    """Whether a loader is known to give one worker's share of the data.

    Raises:
        ProfileError: It hands out parts of each batch, which needs all workers at each one.
    """
    parts = [getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset")]
    parts.append(getattr(parts[1], "sampler", None))
    if any(isinstance(part, DistributedSampler) for part in parts):
        return True
    accelerate = sys.modules.get("accelerate.data_loader")
    if accelerate is None:
        return False
    if isinstance(loader, accelerate.DataLoaderDispatcher):
        raise ProfileError(
            "the loader is accelerate's DataLoaderDispatcher, which needs every worker at every "
            "batch; prepare it with dispatch_batches=False, or pass the loader as it was before."
        )
    shards = (accelerate.BatchSamplerShard, accelerate.IterableDatasetShard)
    return any(isinstance(part, shards) for part in parts)


def divided(results: Results, names: Iterable[str], workers: Workers, counts: Counts) -> Results:
    """This worker's part of the results, given out when all workers have one to work on."""
    owner = {name: i % workers.size for i, name in enumerate(names)}
    waiting: list[tuple[str, ModuleResult]] = []
    since = 0
    with closing(results):
        while True:
            try:
                name, result = next(results)
            except StopIteration as end:
                yield from waiting
                return str(end.value)
            counts[name] = (result.rows, result.batches, result.zero_batches, result.fisher)
            if owner[name] == workers.rank:
                waiting.append((name, result))
            since += 1
            if since == workers.size:
                yield from waiting
                waiting, since = [], 0


def complete_(found: Found, counts: Counts, ledger: SharedLedger) -> None:
    """Take over the other workers' modules, and add up the counts."""
    workers = ledger.workers
    for kind in _ARRAYS:
        arrays: dict[str, Tensor] = getattr(found, kind)
        _gather_arrays_(arrays, workers, kind)
    own = {
        "modules": {name: asdict(module) for name, module in found.modules.items()},
        "counts": counts,
        "samples": ledger.own_samples,
    }
    everyones = workers.gather_values(own, "statistics of the modules")
    for theirs in everyones:
        for name, module in theirs["modules"].items():
            found.modules[name] = ModuleStatistics(**module)
    samples = [theirs["samples"] for theirs in everyones]
    for name, module in found.modules.items():
        rows, batches, zeros, fishers = zip(
            *(theirs["counts"][name] for theirs in everyones), strict=True
        )
        found.modules[name] = replace(
            module,
            rows=sum(rows),
            batches=sum(batches),
            zero_batches=sum(zeros),
            fisher=_mean(fishers, samples),
        )


def _mean(values: tuple[float | None, ...], weights: list[int]) -> float | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return math.fsum(map(math.prod, zip(known, weights, strict=True))) / max(sum(weights), 1)


def _gather_arrays_(arrays: MutableMapping[str, Tensor], workers: Workers, kind: str) -> None:
    """Add the other workers' arrays (fp64)."""
    shapes: list[dict[str, Any]] = workers.gather_values(
        {name: list(array.shape) for name, array in arrays.items()}, f"shapes of {kind}"
    )
    flat = [array.reshape(-1) for array in arrays.values()]
    own = torch.cat(flat) if flat else torch.empty(0, dtype=torch.float64)
    for theirs, values in zip(shapes, workers.gather(own, kind), strict=True):
        parts = values.split([math.prod(shape) for shape in theirs.values()])
        for (name, shape), part in zip(theirs.items(), parts, strict=True):
            arrays[name] = part.reshape(shape).clone()


def _about(tensor: Tensor | None) -> list[Any] | None:
    if tensor is None:
        return None
    return [*tensor.shape, str(tensor.dtype).removeprefix("torch.")]
