"""What methods are compared on: data, a model to adapt, and a metric.

A task reads a local file or a hub data set, holds a validation part out of the training part (the
same for every seed, so that learning rates are chosen on one sample), and leaves the test part for
final figures only.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rankwise.errors import DataError
from rankwise.profiling.loss import IGNORED_LABEL
from rankwise.training.evaluate import held_out_loss

Row = dict[str, Any]
Collate = Callable[[Sequence[Row]], dict[str, Tensor]]
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class TaskData:
    """Encoded rows in three parts, and how to make a batch of them."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    collate: Collate

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
        train_split: Split of a hub data set.
        test_split: Likewise; of GLUE the test labels are hidden, so `validation` serves.
        max_length: Tokens of a sequence.
        validation_rows: Rows held out of the training part to choose learning rates on.
        max_test: Use only so many test rows, evenly spread.
        max_train: Use only the first rows to train.
    """

    metric: ClassVar[str]
    lower_is_better: ClassVar[bool] = False
    task_type: ClassVar[str | None] = None
    keep: ClassVar[tuple[str, ...]] = ()
    """Modules beside the adapters that are trained whole."""

    model: str
    train: str
    test: str
    subset: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    max_length: int = 128
    validation_rows: int = 256
    max_test: int | None = None
    max_train: int | None = None

    @abstractmethod
    def load_model(self) -> PreTrainedModel:
        """The model to adapt, in fp32; new heads are drawn from the global random state."""

    @abstractmethod
    def evaluate(self, model: nn.Module, data: TaskData, rows: Sequence[Row]) -> dict[str, float]:
        """Metrics on some rows, `metric` among them; the model's mode is as before."""

    @abstractmethod
    def _encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Row:
        """One row of the data set as the model takes it, with `labels`."""

    def load(self) -> TaskData:
        """Read, split and encode.

        Raises:
            DataError: A source is missing, has other columns, or has too few rows.
        """
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        rows = _read(self.train, self.subset, self.train_split)
        test = _read(self.test, self.subset, self.test_split)
        if len(rows) <= self.validation_rows:
            raise DataError(
                f"{self.train}: {len(rows)} rows, of which validation_rows={self.validation_rows} "
                "are to be held out; lower validation_rows."
            )
        order = np.random.default_rng(0).permutation(len(rows))
        held, kept = order[: self.validation_rows], np.sort(order[self.validation_rows :])
        spread = np.arange(len(test))
        if self.max_test is not None and self.max_test < len(test):
            spread = np.linspace(0, len(test) - 1, self.max_test).round().astype(int)
        parts = [
            [rows[i] for i in kept[: self.max_train]],
            [rows[i] for i in held],
            [test[i] for i in spread],
        ]
        train, validation, final = (
            [self._encode(row, tokenizer) for row in part] for part in parts
        )
        return TaskData(train, validation, final, _collator(tokenizer))


@dataclass(frozen=True)
class CompletionTask(Task):
    """Causal language modelling of a completion after its prompt; the metric is held-out loss.

    Attributes:
        prompt_column: Read, not learned; empty for plain text.
        completion_column: Learned.
    """

    metric = "loss"
    lower_is_better = True
    task_type = "CAUSAL_LM"

    prompt_column: str = "question"
    completion_column: str = "answer"

    def load_model(self) -> PreTrainedModel:
        """A causal language model."""
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        assert isinstance(model, PreTrainedModel)
        return model

    def evaluate(self, model: nn.Module, data: TaskData, rows: Sequence[Row]) -> dict[str, float]:
        """Mean negative log-likelihood per labelled token, and its exponential."""
        found = held_out_loss(model, data.batches(rows, 16), step=0)
        return {"loss": found.loss, "perplexity": found.perplexity}

    def _encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Row:
        prompt = _text(row, self.prompt_column) if self.prompt_column else ""
        return _completion(
            prompt, _text(row, self.completion_column), tokenizer, self.max_length, prompt_ends="\n"
        )


@dataclass(frozen=True)
class ChoiceTask(CompletionTask):
    """Multiple choice by likelihood: the answer is the candidate completion that is most likely.

    Rows are those of LLM-Adapters' commonsense sets: the instruction ends in `Answer format: a/b/c`
    and the completion is `the correct answer is b`. The log-likelihood of a candidate is summed
    over its tokens.
    """

    metric = "accuracy"
    lower_is_better = False

    prompt_column: str = "instruction"
    completion_column: str = "output"

    def evaluate(self, model: nn.Module, data: TaskData, rows: Sequence[Row]) -> dict[str, float]:
        """Share of rows whose right answer is the most likely one."""
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        right = 0
        try:
            for row in rows:
                batch = data.collate(row["candidates"])
                labels = batch.pop("labels")[:, 1:].to(device)
                inputs = {key: value.to(device) for key, value in batch.items()}
                with torch.no_grad():
                    logits = model(**inputs).logits[:, :-1].float()
                known = labels != IGNORED_LABEL
                log_p = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
                right += int((log_p * known).sum(1).argmax()) == row["answer"]
        finally:
            model.train(training)
        return {"accuracy": right / len(rows)}

    def _encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Row:
        prompt = _text(row, self.prompt_column)
        found = re.search(r"Answer format:\s*(\S+)\s*$", prompt)
        answer = _text(row, "answer")
        choices = found.group(1).split("/") if found else []
        if answer not in choices:
            raise DataError(
                f"a row's answer {answer!r} is not among its choices {choices}; the instruction "
                "must end in 'Answer format: a/b/c'."
            )
        completion = _text(row, self.completion_column)
        candidates = [
            _completion(
                prompt,
                completion.replace(answer, choice),
                tokenizer,
                self.max_length,
                prompt_ends="\n",
            )
            for choice in choices
        ]
        right = choices.index(answer)
        return {**candidates[right], "candidates": candidates, "answer": right}


@dataclass(frozen=True)
class ClassificationTask(Task):
    """Sentences and labels on an encoder with a new head.

    Attributes:
        text_column: The sentence.
        pair_column: A second sentence, for tasks on pairs.
        label_column: A whole number from 0.
        labels: How many classes.
    """

    metric = "accuracy"
    task_type = "SEQ_CLS"
    keep = ("classifier",)

    text_column: str = "sentence"
    pair_column: str | None = None
    label_column: str = "label"
    labels: int = 2

    def load_model(self) -> PreTrainedModel:
        """An encoder with a classification head."""
        model = AutoModelForSequenceClassification.from_pretrained(
            self.model, dtype=torch.float32, num_labels=self.labels
        )
        assert isinstance(model, PreTrainedModel)
        return model

    def evaluate(self, model: nn.Module, data: TaskData, rows: Sequence[Row]) -> dict[str, float]:
        """Accuracy, and Matthews' correlation of predicted and true labels (phi for two)."""
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        predicted: list[int] = []
        try:
            for batch in data.batches(rows, 64):
                inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
                with torch.no_grad():
                    predicted += model(**inputs).logits.argmax(-1).tolist()
        finally:
            model.train(training)
        true = [row["labels"] for row in rows]
        return {
            "accuracy": float(np.mean(np.equal(predicted, true))),
            "matthews": matthews_correlation(predicted, true),
        }

    def _encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Row:
        pair = _text(row, self.pair_column) if self.pair_column else None
        encoded = tokenizer(
            _text(row, self.text_column), pair, truncation=True, max_length=self.max_length
        )
        return {"input_ids": encoded["input_ids"], "labels": int(row[self.label_column])}


@dataclass(frozen=True)
class AcceptabilityTask(ClassificationTask):
    """CoLA: its metric is Matthews' correlation."""

    metric = "matthews"


TASKS: Mapping[str, type[Task]] = {
    "completion": CompletionTask,
    "choice": ChoiceTask,
    "classification": ClassificationTask,
    "acceptability": AcceptabilityTask,
}
"""Kinds of tasks by the name that experiment files use."""


def matthews_correlation(predicted: Sequence[int], true: Sequence[int]) -> float:
    """Matthews' correlation coefficient; 0 where a side is constant, as is customary.

    For K classes it is the correlation of the two one-hot codings (Gorodkin 2004).

    Example:
        >>> round(matthews_correlation([0, 1, 1, 0], [0, 1, 0, 0]), 4)
        0.5774
    """
    p, t = np.asarray(predicted), np.asarray(true)
    classes = np.union1d(p, t)
    x = (p[:, None] == classes).astype(float)
    y = (t[:, None] == classes).astype(float)
    x, y = x - x.mean(0), y - y.mean(0)
    spread = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / spread) if spread else 0.0


def _read(source: str, subset: str | None, split: str) -> list[Row]:
    path = Path(source).expanduser()
    try:
        if path.suffix == ".tsv":
            return _read_tsv(path)
        if path.suffix in _FORMATS:
            kind = _FORMATS[path.suffix]
            rows = datasets.load_dataset(kind, data_files=str(path), split="train")
        else:
            rows = datasets.load_dataset(source, subset, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise DataError(f"data {source}: cannot be read ({reason}).") from error
    return [dict(row) for row in rows]


def _read_tsv(path: Path) -> list[Row]:
    """Sentences and labels in either order: CoLA's files have four columns, SST-2's two."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        cells = line.split("\t")
        if len(cells) == 4:
            label, sentence = cells[1], cells[3]
        elif len(cells) == 2:
            sentence, label = cells
        else:
            raise DataError(f"{path}, line {number}: {len(cells)} columns; 2 or 4 are expected.")
        if not label.isdecimal():
            raise DataError(f"{path}, line {number}: label {label!r} is no whole number.")
        rows.append({"sentence": sentence, "label": int(label)})
    return rows


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(f"a row has no text in column {column!r}; it has {', '.join(row)}.")
    return value


def _completion(
    prompt: str,
    completion: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    prompt_ends: str,
) -> Row:
    """Token ids of both, the prompt's own tokens unlabelled; cut at the front if too long."""
    before = tokenizer(prompt + prompt_ends, verbose=False)["input_ids"] if prompt else []
    after = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        after = [*after, tokenizer.eos_token_id]
    after = after[:max_length]
    before = before[max(0, len(before) + len(after) - max_length) :]
    return {"input_ids": before + after, "labels": [IGNORED_LABEL] * len(before) + after}


def _collator(tokenizer: PreTrainedTokenizerBase) -> Collate:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        padded = pad_sequence(ids, batch_first=True, padding_value=pad)
        mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
        if isinstance(rows[0]["labels"], list):
            labels = pad_sequence(
                [torch.tensor(row["labels"]) for row in rows],
                batch_first=True,
                padding_value=IGNORED_LABEL,
            )
        else:
            labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": padded, "attention_mask": mask, "labels": labels}

    return collate
