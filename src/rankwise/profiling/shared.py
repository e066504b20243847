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
from rankwise.profiling.statistics import ModuleResult
from rankwise.profiling.workers import Workers
from rankwise.provenance import batch_digest

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
