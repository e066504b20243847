"""What every task is: data in three parts, a model to adapt, and a metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rankwise.errors import DataError, nearest
from rankwise.experiments.tasks.reading import Row, read_rows
from rankwise.profiling.loss import IGNORED_LABEL

Collate = Callable[[Sequence[Row]], dict[str, Tensor]]
LOWER_IS_BETTER = ("loss", "perplexity", "median_loss", "worst_loss", "choice_loss")


@dataclass(frozen=True)
class TaskData:
    """Encoded rows in three parts, and how to make a batch of them.

    Attributes:
        train: Rows to learn.
        validation: Rows held out of the training part.
        test: Rows for final figures.
        collate: Rows to a batch.
        processor: The tokenizer or image processor that encoded them.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    collate: Collate
    processor: Any = None

    def batches(self, rows: Sequence[Row], size: int) -> Iterator[dict[str, Tensor]]:
        """Batches in order."""
        for start in range(0, len(rows), size):
            yield self.collate(rows[start : start + size])


@dataclass(frozen=True)
class Task(ABC):
    """One task.

    Attributes:
        model: A local transformers folder or a hub id.
        train: A .jsonl, .json, .csv, .tsv or .parquet file, or a hub data set id.
        test: Likewise.
        subset: Configuration of a hub data set.
        test_subset: Likewise, of the test part; default: `subset`.
        train_split: Split of a hub data set.
        test_split: Likewise; of GLUE the test labels are hidden, so `validation` serves.
        max_length: Tokens of a sequence.
        validation_rows: Rows held out of the training part to choose learning rates on.
        max_test: Use only so many test rows, evenly spread.
        max_train: Use only the first rows to train.
        metric: The one of `metrics` that counts; default: the first.
    """

    metrics: ClassVar[tuple[str, ...]]
    """What `evaluate` can measure."""
    task_type: ClassVar[str | None] = None
    keep: ClassVar[tuple[str, ...]] = ()
    """What modules beside the adapters that are trained whole may be called."""

    model: str
    train: str
    test: str
    subset: str | None = None
    test_subset: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    max_length: int = 128
    validation_rows: int = 256
    max_test: int | None = None
    max_train: int | None = None
    metric: str = ""

    def __post_init__(self) -> None:
        if not self.metric:
            object.__setattr__(self, "metric", self.measured[0])
        if self.metric not in self.measured:
            raise DataError(f"metric={self.metric!r}: {nearest(self.metric, self.measured)}")
        self._check_counts()

    def _check_counts(self) -> None:
        for name in ("max_length", "validation_rows", "max_test", "max_train"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"{name}={value} must be at least 1.")

    @property
    def measured(self) -> tuple[str, ...]:
        """Those of `metrics` that it measures with these settings."""
        return self.metrics

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller value of the metric is better."""
        return self.metric in LOWER_IS_BETTER

    @property
    def search_metric(self) -> str:
        """What learning rates are chosen by unless asked otherwise; `evaluate` measures it."""
        return self.metric

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """What learning rates may be chosen by."""
        return self.measured

    def kept_in(self, model: nn.Module) -> tuple[str, ...]:
        """Those of `keep` that the model has.

        Raises:
            DataError: It has none of them.
        """
        found = tuple(name for name in self.keep if hasattr(model, name))
        if self.keep and not found:
            raise DataError(
                f"model={self.model!r}: {type(model).__name__} has no head named "
                f"{' or '.join(self.keep)}, so it is not known what to train beside the adapters."
            )
        return found

    def definitions(self) -> Sequence[Path]:
        """Files that decide what is measured, beside the rows."""
        return ()

    @abstractmethod
    def load_model(self) -> PreTrainedModel:
        """The model to adapt, in fp32; new heads are drawn from the global random state."""

    @abstractmethod
    def blank_model(self, config: PretrainedConfig) -> PreTrainedModel:
        """The same model from its configuration alone; on the meta device it takes no memory."""

    @abstractmethod
    def evaluate(self, model: nn.Module, data: TaskData, rows: Sequence[Row]) -> dict[str, float]:
        """Metrics on some rows, `search_metric` among them; the model's mode is as before."""

    def evaluate_test(self, model: nn.Module, data: TaskData) -> dict[str, float]:
        """Metrics on the test part, `metric` among them."""
        return self.evaluate(model, data, data.test)

    @abstractmethod
    def _encode(self, row: Mapping[str, Any], processor: Any) -> Row:
        """One row of the data set as the model takes it, with `labels`."""

    def _encode_test(self, row: Mapping[str, Any], processor: Any) -> Row:
        """One row of the test part, where its columns may be others."""
        return self._encode(row, processor)

    def _processor(self) -> Any:
        """What turns rows into tensors."""
        return AutoTokenizer.from_pretrained(self.model)

    def _collate(self, processor: Any) -> Collate:
        return padded(processor)

    def _rows(self) -> tuple[list[Row], list[Row]]:
        """The rows as they are, to train on and to test on."""
        rows = read_rows(self.train, self.subset, self.train_split)
        return rows, read_rows(self.test, self.test_subset or self.subset, self.test_split)

    def _usable(
        self, train: list[Row], test: list[Row], processor: Any
    ) -> tuple[list[Row], list[Row]]:
        """Those rows of both parts that the task is to use, in order."""
        return train, test

    def _test_rows(self, test: Sequence[Row]) -> list[Row]:
        """The rows that are tested on."""
        return [test[i] for i in evenly(len(test), self.max_test)]

    def load(self) -> TaskData:
        """Read, split and encode.

        Raises:
            DataError: A source is missing, has other columns, or has too few rows.
        """
        processor = self._processor()
        rows, test = self._usable(*self._rows(), processor)
        if len(rows) <= self.validation_rows:
            raise DataError(
                f"{self.train}: {len(rows)} rows, of which validation_rows={self.validation_rows} "
                "are to be held out; lower validation_rows."
            )
        if not test and self.test:
            raise DataError(f"{self.test}: holds no row to test on that this task can use.")
        order = np.random.default_rng(0).permutation(len(rows))
        held, kept = order[: self.validation_rows], np.sort(order[self.validation_rows :])
        return TaskData(
            [self._encode(rows[i], processor) for i in kept[: self.max_train]],
            [self._encode(rows[i], processor) for i in held],
            [self._encode_test(row, processor) for row in self._test_rows(test)],
            self._collate(processor),
            processor,
        )


def evenly(count: int, at_most: int | None) -> list[int]:
    """Places of rows that are evenly spread, all of them if there are not too many."""
    if at_most is None or at_most >= count:
        return list(range(count))
    spread: list[int] = np.linspace(0, count - 1, at_most).round().astype(int).tolist()
    return spread


def padded(tokenizer: PreTrainedTokenizerBase) -> Collate:
    """Batches padded at their ends; labels of tokens likewise, labels of rows as they are."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
            "attention_mask": mask,
        }
        if "token_type_ids" in rows[0]:
            kinds = [torch.tensor(row["token_type_ids"]) for row in rows]
            batch["token_type_ids"] = pad_sequence(kinds, batch_first=True)
        if isinstance(rows[0]["labels"], list):
            labels = [torch.tensor(row["labels"]) for row in rows]
            batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL)
        else:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch

    return collate


def logits_of(model: nn.Module, data: TaskData, rows: Sequence[Row], size: int = 64) -> Tensor:
    """The logits of all rows, in evaluation mode and without labels; the mode is as before."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            found = [
                model(**{k: v.to(device) for k, v in batch.items() if k != "labels"}).logits.cpu()
                for batch in data.batches(rows, size)
            ]
    finally:
        model.train(training)
    return torch.cat(found).float()
