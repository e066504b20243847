"""Encoder-decoders such as T5: classification by the likelihood of words, and GLUE worded by T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel

from rankwise.errors import DataError
from rankwise.experiments.tasks import scores
from rankwise.experiments.tasks.base import Task, TaskData
from rankwise.experiments.tasks.classification import glue_table
from rankwise.experiments.tasks.glue import GLUE_ID
from rankwise.experiments.tasks.reading import Row, label_of, text_of
from rankwise.training.evaluate import held_out_loss

BATCH = 32


@dataclass(frozen=True)
class TextToTextTask(Task):
    """An encoder-decoder that answers with the words of a class, or with any text.

    With `words`, the answer is the class whose words are likeliest, so that no answer is outside
    the classes. Without, the answer is a text and only its loss is measured.

    Attributes:
        prefix: What the input begins with, such as `cola`.
        columns: Texts of the input; with a prefix each is introduced by its name, as T5's are.
        label_column: A whole number from 0, or the text to answer where there are no `words`.
        words: What each class is called.
    """

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "matthews", "f1", "loss")
    task_type = "SEQ_2_SEQ_LM"

    prefix: str = ""
    columns: list[str] = field(default_factory=lambda: ["sentence"])
    label_column: str = "label"
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.words and not self.metric:
            object.__setattr__(self, "metric", "loss")
        if not self.words and self.metric in set(self.metrics) - {"loss"}:
            raise DataError(f"metric={self.metric!r} needs words=, the names of the classes.")
        super().__post_init__()

    @property
    def measured(self) -> tuple[str, ...]:
        """F1 of two classes; without `words` the loss alone."""
        if not self.words:
            return ("loss",)
        return tuple(name for name in self.metrics if name != "f1" or len(self.words) == 2)

    def load_model(self) -> PreTrainedModel:
        """An encoder-decoder."""
        model = AutoModelForSeq2SeqLM.from_pretrained(self.model, dtype=torch.float32)
        assert isinstance(model, PreTrainedModel)
        return model

    def blank_model(self, config: PretrainedConfig) -> PreTrainedModel:
        """From its configuration alone."""
        model = AutoModelForSeq2SeqLM.from_config(config)
        assert isinstance(model, PreTrainedModel)
        return model

    def evaluate(self, model: nn.Module, data: TaskData, rows: Sequence[Row]) -> dict[str, float]:
        """Loss; with classes their accuracy, Matthews' correlation, and F1 of two."""
        found = {"loss": held_out_loss(model, data.batches(rows, BATCH), step=0).loss}
        if not self.words:
            return found
        words = [self._answer(word, data.processor) for word in self.words]
        predicted: list[int] = []
        training = model.training
        model.eval()
        try:
            for batch in data.batches(rows, BATCH):
                predicted += word_likelihoods(model, batch, words).argmax(1).tolist()
        finally:
            model.train(training)
        true = [row["class"] for row in rows]
        found["accuracy"] = scores.accuracy(predicted, true)
        found["matthews"] = scores.matthews_correlation(predicted, true)
        return found | ({"f1": scores.f1_score(predicted, true)} if len(self.words) == 2 else {})

    def _encode(self, row: Mapping[str, Any], processor: Any) -> Row:
        parts = [(name, text_of(row, name)) for name in self.columns]
        named = [f"{name}: {text}" if self.prefix else text for name, text in parts]
        encoded = processor(
            " ".join([self.prefix, *named]).strip(), truncation=True, max_length=self.max_length
        )
        if not self.words:
            answer = text_of(row, self.label_column)
            return {"input_ids": encoded["input_ids"], "labels": self._answer(answer, processor)}
        label = label_of(row, self.label_column, len(self.words))
        return {
            "input_ids": encoded["input_ids"],
            "labels": self._answer(self.words[label], processor),
            "class": label,
        }

    def _answer(self, text: str, processor: Any) -> list[int]:
        ids: list[int] = processor(text_target=text, truncation=True, max_length=self.max_length)[
            "input_ids"
        ]
        return ids


@dataclass(frozen=True)
class GlueTextTask(TextToTextTask):
    """A task of GLUE as T5 was taught it: `mrpc sentence1: ... sentence2: ...`, answered in words.

    Attributes:
        train: Hub id or a local file with the hub's columns.
        test: Likewise; the hub's test parts have no labels, so their validation parts serve.
        subset: As in `GlueTask`, without `"stsb"`, which is a regression.
    """

    train: str = GLUE_ID
    test: str = GLUE_ID
    test_split: str = ""

    def __post_init__(self) -> None:
        table = glue_table(self.subset)
        if not table.words:
            raise DataError(f"subset={self.subset!r} is a regression; T5 has no words for it here.")
        object.__setattr__(self, "prefix", self.subset)
        object.__setattr__(self, "columns", [name for name in table.columns if name])
        object.__setattr__(self, "words", list(table.words))
        if not self.test_split:
            object.__setattr__(self, "test_split", table.test_split)
        if not self.metric:
            object.__setattr__(self, "metric", table.metric)
        super().__post_init__()


def word_likelihoods(
    model: nn.Module, batch: Mapping[str, Tensor], words: Sequence[Sequence[int]]
) -> Tensor:
    """Log-likelihood of each class's words for each row, `(n_rows, n_words)`.

    The encoder runs once; the decoder runs for each class.

    Args:
        model: An encoder-decoder in evaluation mode.
        batch: `input_ids` and `attention_mask`.
        words: Token ids of each class, their end token among them.
    """
    device = next(model.parameters()).device
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    columns = []
    with torch.no_grad():
        encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)  # type: ignore[operator]
        for word in words:
            labels = torch.tensor([word] * len(ids), device=device)
            logits = model(encoder_outputs=encoded, attention_mask=mask, labels=labels).logits
            log_p = logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
            columns.append(log_p.sum(1))
    return torch.stack(columns, 1)
