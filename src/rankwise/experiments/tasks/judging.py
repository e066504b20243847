"""Answers rated by another model, as MT-Bench does, through an OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from rankwise.experiments.tasks.base import TaskData
from rankwise.experiments.tasks.judge import Judge
from rankwise.experiments.tasks.language import CompletionTask, greedy
from rankwise.experiments.tasks.reading import Row, text_of
from rankwise.profiling.loss import IGNORED_LABEL
from rankwise.training.data import encode_prompt


@dataclass(frozen=True)
class JudgedTask(CompletionTask):
    """Completions to learn, and questions whose answers a judge rates from 1 to 10.

    Learning rates are chosen by the held-out loss; the judge sees answers of the trained model
    only, greedily generated, the first turn of each question (MT-Bench single answer grading,
    Zheng et al. 2023).

    Attributes:
        test: Questions; a hub data set id or a file.
        test_split: Of a hub data set.
        test_prompt_column: A question, or a list of turns of which the first is asked.
        reference_column: A right answer, or a list of them, shown to the judge where there is one.
        category_column: Ratings are averaged by it as well.
        judge_model: As the endpoint names it.
        endpoint: Base address, to which `/chat/completions` is added.
        key_variable: Environment variable that holds the key; empty for an endpoint without keys.
        max_new_tokens: Of an answer.
    """

    metrics: ClassVar[tuple[str, ...]] = ("rating",)

    test: str = "HuggingFaceH4/mt_bench_prompts"
    test_split: str = "train"
    test_prompt_column: str | None = "prompt"
    reference_column: str = "reference"
    category_column: str = "category"
    judge_model: str = "gpt-4o"
    endpoint: str = "https://api.openai.com/v1"
    key_variable: str = "OPENAI_API_KEY"
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        Judge(self.judge_model, self.endpoint, self.key_variable)

    @property
    def search_metric(self) -> str:
        """The held-out loss."""
        return "loss"

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """Those of text; no judge is asked."""
        return super().metrics

    def load(self) -> TaskData:
        """Read, split and encode, and see whether the judge's key is there.

        Raises:
            DataError: As for any task; or there is no key.
        """
        Judge(self.judge_model, self.endpoint, self.key_variable).check_key()
        return super().load()

    def evaluate_test(self, model: nn.Module, data: TaskData) -> dict[str, float]:
        """Mean rating, and that of each category.

        Raises:
            DataError: The judge cannot be reached, or gives no rating.
        """
        judge = Judge(self.judge_model, self.endpoint, self.key_variable)
        answers = greedy(model, data, data.test, self.max_new_tokens)
        ratings = [
            judge.rate(row["question"], answer, row["reference"])
            for row, answer in zip(data.test, answers, strict=True)
        ]
        return {"rating": float(np.mean(ratings))} | _by_category(data.test, ratings)

    def _encode_test(self, row: Mapping[str, Any], processor: Any) -> Row:
        column = self.test_prompt_column or self.prompt_column
        question = text_of({**row, column: _first(row.get(column))}, column)
        first, asked = encode_prompt(question + "\n", processor, self.start)
        ids = first + asked[max(0, len(first) + len(asked) - self.max_length) :]
        return {
            "input_ids": ids,
            "labels": [IGNORED_LABEL] * len(ids),
            "question": question,
            "reference": _first(row.get(self.reference_column)) or "",
            "category": str(row.get(self.category_column) or ""),
        }


def _first(value: Any) -> Any:
    """The first of several turns."""
    return (value[0] if value else None) if isinstance(value, list | tuple) else value


def _by_category(rows: Sequence[Row], ratings: Sequence[float]) -> dict[str, float]:
    names = sorted({row["category"] for row in rows} - {""})
    return {
        f"rating_{name}": float(
            np.mean([r for r, row in zip(ratings, rows, strict=True) if row["category"] == name])
        )
        for name in names
    }
