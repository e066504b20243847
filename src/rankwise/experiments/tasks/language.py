"""Causal language models: completions, and questions that end in a number."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rankwise.errors import DataError
from rankwise.experiments.tasks.base import Task, TaskData, evenly
from rankwise.experiments.tasks.reading import Row, text_of
from rankwise.experiments.tasks.scores import final_number
from rankwise.profiling.loss import IGNORED_LABEL
from rankwise.training.data import encode_prompt
from rankwise.training.evaluate import held_out_loss


@dataclass(frozen=True)
class CompletionTask(Task):
    """Causal language modelling of a completion after its prompt; the metric is held-out loss.

    `median_loss` and `worst_loss` are the median and the largest of the rows' own losses, beside
    the mean over all tokens: one row that a run has broken moves the mean by more than methods
    differ.

    Attributes:
        prompt_column: Read, not learned; empty for plain text, whose blank rows are left out.
        completion_column: Learned.
        test_prompt_column: Of the test part, if it has other columns.
        test_completion_column: Likewise.
        drop_longer: Leave rows out that have more than `max_length` tokens, instead of cutting
            them at the front.
        start: In front of every row, and never cut off: a line break, or the token that a document
            begins with. Models whose tokenizer adds none may break on single rows without it.
    """

    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "median_loss", "worst_loss")
    task_type = "CAUSAL_LM"

    prompt_column: str = "question"
    completion_column: str = "answer"
    test_prompt_column: str | None = None
    test_completion_column: str | None = None
    drop_longer: bool = False
    start: str = ""

    def load_model(self) -> PreTrainedModel:
        """A causal language model."""
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        assert isinstance(model, PreTrainedModel)
        return model

    def blank_model(self, config: PretrainedConfig) -> PreTrainedModel:
        """From its configuration alone."""
        model = AutoModelForCausalLM.from_config(config)
        assert isinstance(model, PreTrainedModel)
        return model

    def evaluate(self, model: nn.Module, data: TaskData, rows: Sequence[Row]) -> dict[str, float]:
        """Mean negative log-likelihood per labelled token, its exponential, median, worst row."""
        with _row_losses(model) as losses:
            found = held_out_loss(model, data.batches(rows, 16), step=0)
        return {
            "loss": found.loss,
            "perplexity": found.perplexity,
            "median_loss": median(losses),
            "worst_loss": max(losses),
        }

    def _rows(self) -> tuple[list[Row], list[Row]]:
        parts = super()._rows()
        if self.prompt_column:
            return parts
        train, test = (
            [row for row in part if str(row.get(column, "")).strip()]
            for part, column in zip(parts, (self.completion_column, self._test_column), strict=True)
        )
        return train, test

    def _usable(
        self, train: list[Row], test: list[Row], processor: Any
    ) -> tuple[list[Row], list[Row]]:
        if not self.drop_longer:
            return train, test
        whole = replace(self, max_length=sys.maxsize)
        short = [row for row in test if self._fits(whole._encode_test(row, processor))]
        if not short:
            raise DataError(
                f"drop_longer: every row of {self.test} has more than {self.max_length} tokens; "
                "raise max_length."
            )
        return [row for row in train if self._fits(whole._encode(row, processor))], short

    def _fits(self, row: Row) -> bool:
        return len(row["input_ids"]) <= self.max_length

    @property
    def _test_column(self) -> str:
        return self.test_completion_column or self.completion_column

    def _encode(self, row: Mapping[str, Any], processor: Any) -> Row:
        return self._prompted(row, self.prompt_column, self.completion_column, processor)

    def _encode_test(self, row: Mapping[str, Any], processor: Any) -> Row:
        prompt = self.prompt_column if self.test_prompt_column is None else self.test_prompt_column
        return self._prompted(row, prompt, self._test_column, processor)

    def _prompted(self, row: Mapping[str, Any], prompt: str, completion: str, tokens: Any) -> Row:
        before = text_of(row, prompt) + "\n" if prompt else ""
        text = text_of(row, completion)
        return encode_completion(before, text, tokens, self.max_length, self.start)


@dataclass(frozen=True)
class MathTask(CompletionTask):
    """Questions whose answer ends in a number, such as GSM8K: held-out loss and exact match.

    Exact match is the share of questions whose greedily generated answer ends in the right number:
    the one after `####` or `answer is`, else the last.

    Attributes:
        generate: Answer only so many rows, evenly spread; 0 for none. Without any, only the
            loss is measured.
        max_new_tokens: Of an answer.
    """

    metrics: ClassVar[tuple[str, ...]] = (
        "loss",
        "exact_match",
        "perplexity",
        "median_loss",
        "worst_loss",
    )

    generate: int | None = None
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric == "exact_match" and self.generate == 0:
            raise DataError("generate=0: exact_match needs generated answers; leave generate out.")

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """Exact match where answers are generated."""
        return tuple(m for m in self.metrics if m != "exact_match" or self.generate != 0)

    def evaluate(self, model: nn.Module, data: TaskData, rows: Sequence[Row]) -> dict[str, float]:
        """Loss on all rows, and exact match on those that are generated and have a number."""
        found = super().evaluate(model, data, rows)
        numbered = [row for row in rows if row["number"] is not None]
        chosen = [numbered[i] for i in evenly(len(numbered), self.generate)]
        if chosen:
            answers = greedy(model, data, chosen, self.max_new_tokens)
            right = [
                final_number(text) == row["number"]
                for text, row in zip(answers, chosen, strict=True)
            ]
            found["exact_match"] = sum(right) / len(right)
        return found

    def _prompted(self, row: Mapping[str, Any], prompt: str, completion: str, tokens: Any) -> Row:
        number = final_number(text_of(row, completion))
        return super()._prompted(row, prompt, completion, tokens) | {"number": number}

    def _encode_test(self, row: Mapping[str, Any], processor: Any) -> Row:
        encoded = super()._encode_test(row, processor)
        if encoded["number"] is None:
            raise DataError(f"a test row's answer holds no number: {dict(row)!r}.")
        return encoded


@contextmanager
def _row_losses(model: nn.Module) -> Iterator[list[float]]:
    """Each labelled row's mean loss, of every batch that the model is called with meanwhile."""
    losses: list[float] = []

    def note(_: nn.Module, __: tuple[Any, ...], batch: dict[str, Any], output: Any) -> None:
        for logits, labels in zip(output.logits, batch["labels"], strict=True):
            targets = labels[1:]
            if (targets != IGNORED_LABEL).any():
                loss = F.cross_entropy(logits[:-1].float(), targets, ignore_index=IGNORED_LABEL)
                losses.append(float(loss))

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        yield losses
    finally:
        handle.remove()


def encode_completion(
    prompt: str,
    completion: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    start: str = "",
) -> Row:
    """Token ids of both after `start`, only the completion labelled; a long prompt loses its front.

    The tokenizer's own first token is never lost.

    Raises:
        DataError: `start` leaves no room.
    """
    first, before = encode_prompt(prompt, tokenizer, start)
    room = max_length - len(first)
    if room <= 0:
        raise DataError(
            f"what stands first (start={start!r}) fills all of max_length={max_length}; raise it."
        )
    after = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        after = [*after, tokenizer.eos_token_id]
    after = after[:room]
    before = first + before[max(0, len(before) + len(after) - room) :]
    return {"input_ids": before + after, "labels": [IGNORED_LABEL] * len(before) + after}


def prompt_of(row: Row) -> list[int]:
    """The tokens before the first label."""
    labels = row["labels"]
    first = next((i for i, label in enumerate(labels) if label != IGNORED_LABEL), len(labels))
    ids: list[int] = row["input_ids"][:first]
    return ids


def greedy(
    model: nn.Module, data: TaskData, rows: Sequence[Row], max_new_tokens: int, size: int = 16
) -> list[str]:
    """Completions of the rows' prompts, the likeliest token each time; the mode is as before."""
    tokenizer: PreTrainedTokenizerBase = data.processor
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    texts: list[str] = []
    try:
        for start in range(0, len(rows), size):
            prompts = [prompt_of(row) for row in rows[start : start + size]]
            width = max(map(len, prompts))
            ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
            with torch.no_grad():
                made = model.generate(  # type: ignore[operator]
                    input_ids=ids,
                    attention_mask=mask.to(device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=pad,
                )
            texts += tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
    finally:
        model.train(training)
    return texts
