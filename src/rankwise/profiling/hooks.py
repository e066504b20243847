"""The hook engine: any model, any loss, one ordinary backward pass a batch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import closing

from rankwise.profiling.batches import (
    Batch,
    Job,
    Ledger,
    batch_rows,
    is_finite,
    run_forward,
    with_progress,
)
from rankwise.profiling.capture import capture_gradients
from rankwise.profiling.precision import loss_scale
from rankwise.profiling.statistics import ModuleResult, StreamingStatistics

logger = logging.getLogger(__name__)
_NOTED_BYTES = 2**30


def hook_engine(
    job: Job, batches: Iterable[Batch], ledger: Ledger
) -> Iterator[tuple[str, ModuleResult]]:
    """Run the batches through the model, then give out the modules' statistics one by one.

    Raises:
        ProfileError: See `profile_gradients`.
    """
    statistics = StreamingStatistics(job.selected, job.wanted, job.make_stream)
    seen = 0
    shown = with_progress(batches, job.batches, "measuring gradients", job.progress)
    with (
        capture_gradients(job.model, job.selected, statistics.consume, flat=False),
        closing(shown),
    ):
        for index, batch in enumerate(shown):
            if not index:
                _announce_memory(job, batch)
            seen += 1
            _run(job, statistics, ledger, batch, index)
    ledger.close(seen)
    names = with_progress(job.selected, len(job.selected), "computing spectra", job.progress)
    with closing(names):
        for name in names:
            yield name, statistics.pop(name)


def _run(
    job: Job, statistics: StreamingStatistics, ledger: Ledger, batch: Batch, index: int
) -> None:
    loss, items = run_forward(job, batch, index)
    if not items:
        ledger.skip(index)
        return
    scale = loss_scale(job.model, items)
    statistics.begin_batch(items, batch_rows(batch), scale)
    (loss * scale).backward()
    if not is_finite(loss):  # its gradient may be finite all the same
        statistics.spoil("the loss")
    spoiled = statistics.end_batch()
    if spoiled is None:
        ledger.count(batch, items)
    else:
        ledger.drop(index, spoiled)


def gram_bytes(job: Job, tokens: int) -> int:
    """Memory of all batches' gradients at once, which this engine needs for Gram matrices.

    Each batch and module is held as a fp32 gradient, or as its input and output gradient of
    `tokens` rows where that is smaller.
    """
    per_batch = sum(
        min(shape.d_in * shape.d_out, tokens * (shape.d_in + shape.d_out))
        for shape in job.selected.values()
    )
    return 4 * job.batches * per_batch


def _announce_memory(job: Job, batch: Batch) -> None:
    if "gram" not in job.wanted:
        return
    sizes = [v.numel() for v in batch.values() if hasattr(v, "numel") and v.ndim == 2]
    tokens = max(sizes, default=2**62)  # inputs that are no tokens: count whole gradients
    needed = gram_bytes(job, tokens)
    level = logging.WARNING if needed > _NOTED_BYTES else logging.INFO
    logger.log(
        level,
        "Gram matrices by hooks keep every layer's gradients of all %d batches, about %.1f GB",
        job.batches,
        needed / 1e9,
    )
