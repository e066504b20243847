"""The batches of a profile: taking them, running them, and the account of what became of each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from rankwise.errors import ProfileError, nearest
from rankwise.profiling.loss import LossFunction
from rankwise.profiling.statistics import Statistic, Stream
from rankwise.profiling.workers import Workers
from rankwise.provenance import DataFingerprint, batch_digest
from rankwise.targets import Targets

MAX_DROPPED = 0.1
"""The largest part of the batches that may be dropped for a NaN or an infinity."""

logger = logging.getLogger(__name__)
T = TypeVar("T")
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """What is to be measured, for either engine."""

    model: nn.Module
    selected: Targets
    loss_fn: LossFunction
    wanted: frozenset[Statistic]
    batches: int
    train_mode: bool
    progress: bool
    workers: Workers = field(default_factory=Workers)
    make_stream: Callable[[str], Stream] | None = None


@dataclass
class Ledger:
    """What became of each batch: counted, without labels, or dropped."""

    asked: int
    rows: list[int] = field(default_factory=list)
    """Samples of each batch that counted."""
    items: list[int] = field(default_factory=list)
    """Labelled items of each batch that counted."""
    unlabelled: list[int] = field(default_factory=list)
    """Indices in the loader of batches without a labelled item."""
    dropped: dict[int, str] = field(default_factory=dict)
    """Index -> the module where a NaN or an infinity was met first in the backward pass."""
    digests: list[str] = field(default_factory=list)
    """A hash of each batch that counted, hexadecimal."""

    @property
    def data_fingerprint(self) -> str:
        """Of the batches that counted."""
        return DataFingerprint(map(bytes.fromhex, self.digests)).hexdigest()

    def place(self, index: int) -> int:
        """The number of a batch among all that were asked for."""
        return index

    def count(self, batch: Batch, items: int) -> None:
        """A batch that counts."""
        self.rows.append(batch_rows(batch))
        self.items.append(items)
        self.digests.append(batch_digest(batch).hex())

    def skip(self, index: int) -> None:
        """A batch without a labelled item."""
        index = self.place(index)
        logger.warning("batch %d has no labelled item and is skipped", index)
        self.unlabelled.append(index)

    def drop(self, index: int, module: str) -> None:
        """A batch with a non-finite gradient.

        Raises:
            ProfileError: More than a tenth of the batches asked for are dropped.
        """
        index = self.place(index)
        self.dropped[index] = module
        if len(self.dropped) > MAX_DROPPED * self.asked:
            raise self._too_many(index)
        logger.warning(
            "batch %d is dropped: non-finite gradient in module %s (or after it)", index, module
        )

    def reset(self) -> None:
        """Forget everything, for another engine to begin."""
        self.__init__(self.asked)  # type: ignore[misc]

    def close(self, seen: int) -> None:
        """Check the account when the loader is done.

        Raises:
            ProfileError: No batch counts, or more than a tenth of them are dropped.
        """
        if not seen:
            raise ProfileError("the loader gave no batch; check that the data set is not empty.")
        if seen < self.asked:
            logger.warning("the loader gave %d batches of the %d asked for", seen, self.asked)
        if len(self.dropped) > MAX_DROPPED * (len(self.dropped) + len(self.items)):
            raise self._too_many(next(reversed(self.dropped)))
        if not self.items:
            raise ProfileError(
                f"none of the {seen} batches has a labelled item (all labels are -100)."
            )

    def _too_many(self, index: int) -> ProfileError:
        bad = ", ".join(map(str, self.dropped))
        return ProfileError(
            f"non-finite gradient in module {self.dropped[index]}, batch {index}: more than "
            f"{MAX_DROPPED:.0%} of the batches are affected (batch {bad}). Check them, or profile "
            "in float32 or bfloat16 instead of float16."
        )


def check_statistics(wanted: Iterable[str]) -> frozenset[Statistic]:
    """The statistics by name, if all of them exist.

    Raises:
        ProfileError: Names the unknown one and the nearest known.
    """
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in names:
        if name not in get_args(Statistic):
            raise ProfileError(f"statistics: {name!r}; {nearest(name, get_args(Statistic))}")
    return frozenset(names)  # type: ignore[arg-type]


def run_forward(job: Job, batch: Batch, index: int) -> tuple[Tensor, int]:
    """The loss of a batch and its labelled items; 0 items means that it is not to be used.

    Raises:
        ProfileError: The batch is no mapping, its loss has no gradient, or its items are no count.
    """
    if not isinstance(batch, Mapping):
        raise ProfileError(
            f"batch {index} is a {type(batch).__name__}; each batch must be a mapping from "
            "argument name to tensor, as a collator of transformers gives."
        )
    loss, count = job.loss_fn(job.model, on_device(job.model, batch))
    items = _whole(count, index)
    if items and not loss.requires_grad:
        raise ProfileError(
            f"the loss of batch {index} depends on none of the targets, so it has no gradient; "
            "check that loss_fn does not detach it and that targets are used."
        )
    return loss, items


def _whole(items: object, index: int) -> int:
    """The items of a batch as an int, though users count in tensors, numpy numbers and floats."""
    try:
        number = float(items)  # type: ignore[arg-type]
        if number >= 0 and number.is_integer():
            return int(items)  # type: ignore[call-overload]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass  # None, a tensor of several numbers
    raise ProfileError(
        f"batch {index}: loss_fn gave BatchLoss(loss, items) with items={items!r}; it must be the "
        "whole number of labelled items that the loss is a mean over, 0 or more."
    )


def on_device(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The batch with its tensors on the model's device."""
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def batch_rows(batch: Batch) -> int:
    """Samples in a batch: the first axis of its first tensor."""
    return next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)


def is_finite(loss: Tensor) -> bool:
    """Whether a loss is neither NaN nor infinite."""
    return bool(torch.isfinite(loss.detach()).all())


def with_progress(
    items: Iterable[T], total: int, label: str, shown: bool
) -> Generator[T, None, None]:
    """The items under a progress bar, which lives until the generator is exhausted or closed."""
    console = Console(stderr=True)
    yield from track(
        items,
        description=label,
        total=total,
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    )
