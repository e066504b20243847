"""Sentences and labels on an encoder with a new head; GLUE by the names of its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from rankwise.errors import DataError, nearest
from rankwise.experiments.tasks import scores
from rankwise.experiments.tasks.base import Task, TaskData, logits_of
from rankwise.experiments.tasks.glue import GLUE, GLUE_ID, GlueTable
from rankwise.experiments.tasks.reading import Row, label_of, text_of


@dataclass(frozen=True)
class ClassificationTask(Task):
    """Sentences and labels on an encoder with a new head.

    Attributes:
        text_column: The sentence.
        pair_column: A second sentence, for tasks on pairs.
        label_column: A whole number from 0; any number where `labels` is 1.
        labels: How many classes; 1 for regression.
    """

    metrics: ClassVar[tuple[str, ...]] = (
        "accuracy",
        "matthews",
        "f1",
        "pearson",
        "spearman",
        "loss",
    )
    task_type = "SEQ_CLS"
    keep: ClassVar[tuple[str, ...]] = ("classifier", "score")

    text_column: str = "sentence"
    pair_column: str | None = None
    label_column: str = "label"
    labels: int = 2

    @property
    def measured(self) -> tuple[str, ...]:
        """Correlations are of numbers, the others of classes, F1 of two."""
        unknown = {
            1: ("accuracy", "matthews", "f1"),
            2: ("pearson", "spearman"),
        }.get(self.labels, ("f1", "pearson", "spearman"))
        return tuple(name for name in self.metrics if name not in unknown)

    def load_model(self) -> PreTrainedModel:
        """An encoder with a head of so many outputs."""
        model = AutoModelForSequenceClassification.from_pretrained(
            self.model, dtype=torch.float32, num_labels=self.labels
        )
        assert isinstance(model, PreTrainedModel)
        return model

    def blank_model(self, config: PretrainedConfig) -> PreTrainedModel:
        """From its configuration alone."""
        config.num_labels = self.labels
        model = AutoModelForSequenceClassification.from_config(config)
        assert isinstance(model, PreTrainedModel)
        return model

    def evaluate(self, model: nn.Module, data: TaskData, rows: Sequence[Row]) -> dict[str, float]:
        """Accuracy and Matthews' correlation, F1 of two classes; of numbers, both correlations.

        And the loss that is trained: cross-entropy in nats, of numbers the mean squared error.
        """
        logits = logits_of(model, data, rows)
        true = [row["labels"] for row in rows]
        if self.labels == 1:
            predicted = logits[:, 0]
            return {
                "pearson": scores.pearson(predicted.tolist(), true),
                "spearman": scores.spearman(predicted.tolist(), true),
                "loss": float(nn.functional.mse_loss(predicted, torch.tensor(true))),
            }
        classes = logits.argmax(-1).tolist()
        found = {
            "accuracy": scores.accuracy(classes, true),
            "matthews": scores.matthews_correlation(classes, true),
            "loss": float(nn.functional.cross_entropy(logits, torch.tensor(true))),
        }
        return found | ({"f1": scores.f1_score(classes, true)} if self.labels == 2 else {})

    def _encode(self, row: Mapping[str, Any], processor: Any) -> Row:
        pair = text_of(row, self.pair_column) if self.pair_column else None
        encoded = processor(
            text_of(row, self.text_column), pair, truncation=True, max_length=self.max_length
        )
        made = {"input_ids": encoded["input_ids"], "labels": self._label(row)}
        if pair is not None and "token_type_ids" in encoded:
            made["token_type_ids"] = encoded["token_type_ids"]
        return made

    def _label(self, row: Mapping[str, Any]) -> int | float:
        if self.labels > 1:
            return label_of(row, self.label_column, self.labels)
        value = row.get(self.label_column)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(f"column {self.label_column!r} holds {value!r}, which is no number.")
        return float(value)


@dataclass(frozen=True)
class AcceptabilityTask(ClassificationTask):
    """CoLA: its metric is Matthews' correlation."""

    metrics: ClassVar[tuple[str, ...]] = ("matthews", "accuracy", "f1", "loss")


@dataclass(frozen=True)
class GlueTask(ClassificationTask):
    """A task of GLUE on an encoder with a new head; columns and metric follow from its name.

    Attributes:
        train: Hub id or a local file with the hub's columns.
        test: Likewise; the hub's test parts have no labels, so their validation parts serve.
        subset: `"cola"`, `"sst2"`, `"mrpc"`, `"stsb"`, `"qqp"`, `"mnli"` (matched), `"qnli"`,
            `"rte"` or `"wnli"`.
    """

    train: str = GLUE_ID
    test: str = GLUE_ID
    test_split: str = ""

    def __post_init__(self) -> None:
        table = glue_table(self.subset)
        first, second = table.columns
        object.__setattr__(self, "text_column", first)
        object.__setattr__(self, "pair_column", second)
        object.__setattr__(self, "labels", table.labels)
        if not self.test_split:
            object.__setattr__(self, "test_split", table.test_split)
        if not self.metric:
            object.__setattr__(self, "metric", table.metric)
        super().__post_init__()


def glue_table(subset: str | None) -> GlueTable:
    """What is known of a task of GLUE.

    Raises:
        DataError: There is none of that name.
    """
    if subset is None or subset not in GLUE:
        raise DataError(f"subset={subset!r} is no task of GLUE; {nearest(str(subset), GLUE)}")
    return GLUE[subset]
