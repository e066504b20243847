"""Multiple choice by likelihood: one data set, or several of the commonsense eight at once."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rankwise.errors import DataError, nearest
from rankwise.experiments.tasks.base import TaskData, evenly
from rankwise.experiments.tasks.commonsense import COMMONSENSE
from rankwise.experiments.tasks.language import CompletionTask, encode_completion
from rankwise.experiments.tasks.reading import Row, read_rows, text_of
from rankwise.profiling.loss import IGNORED_LABEL

PASS_TOKENS = 512
"""Tokens of a pass over several questions; each has the logits of a whole vocabulary."""


@dataclass(frozen=True)
class ChoiceTask(CompletionTask):
    """Multiple choice by likelihood: the answer is the candidate completion that is most likely.

    Rows are those of LLM-Adapters' commonsense sets: the instruction ends in `Answer format: a/b/c`
    and the completion is `the correct answer is b`. The log-likelihood of a candidate is summed
    over its tokens. `choice_loss` is the negative logarithm of the right one's share of the
    candidates' likelihood, which tells models apart that pick the same answers; guessing among n
    has log(n).

    Attributes:
        answers: `"names"`: the options stand in the prompt, and their names are the candidates.
            `"texts"`: they are left out of the prompt and are the candidates themselves, which
            small models need; where the prompt lists none, as in BoolQ, the names are.
    """

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "choice_loss")

    prompt_column: str = "instruction"
    completion_column: str = "output"
    answers: Literal["names", "texts"] = "names"

    def evaluate(self, model: nn.Module, data: TaskData, rows: Sequence[Row]) -> dict[str, float]:
        """Share of rows whose right answer is the most likely one, and the mean choice loss."""
        return _mean_scores(self._scores(model, rows))

    def _scores(self, model: nn.Module, rows: Sequence[Row]) -> list[dict[str, float]]:
        """The metrics of each row alone."""
        training = model.training
        model.eval()
        try:
            return [
                _scores_of(likelihoods, row)
                for batch in _batches(rows)
                for row, likelihoods in zip(
                    batch,
                    candidate_likelihoods(model, [row["candidates"] for row in batch]),
                    strict=True,
                )
            ]
        finally:
            model.train(training)

    def _encode(self, row: Mapping[str, Any], processor: Any) -> Row:
        prompt = text_of(row, self.prompt_column)
        found = re.search(r"Answer format:\s*(\S+)\s*$", prompt)
        answer = text_of(row, "answer")
        choices = found.group(1).split("/") if found else []
        if answer not in choices:
            raise DataError(
                f"a row's answer {answer!r} is not among its choices {choices}; the instruction "
                "must end in 'Answer format: a/b/c'."
            )
        if self.answers == "texts":
            prompt, texts = question_and_options(prompt, choices)
        else:
            completion = text_of(row, self.completion_column)
            texts = completions_of(completion, answer, choices)
        candidates = self._candidates(prompt + "\n", texts, processor)
        right = choices.index(answer)
        return {**candidates[right], "candidates": candidates, "answer": right}

    def _encode_test(self, row: Mapping[str, Any], processor: Any) -> Row:
        return self._encode(row, processor)

    def _candidates(self, prompt: str, texts: Sequence[str], processor: Any) -> list[Row]:
        """All after the same tokens, so that a prompt that is too long is cut for all alike."""
        whole = [
            encode_completion("", text, processor, self.max_length, self.start) for text in texts
        ]
        longest = max(len(row["input_ids"]) for row in whole)
        if longest >= self.max_length:
            raise DataError(
                f"max_length={self.max_length} leaves no token of the question before an answer of "
                f"{longest} tokens; raise max_length."
            )
        return [
            encode_completion(
                prompt,
                text,
                processor,
                self.max_length - longest + len(row["input_ids"]),
                self.start,
            )
            for text, row in zip(texts, whole, strict=True)
        ]


def completions_of(completion: str, answer: str, choices: Sequence[str]) -> list[str]:
    """The completion with each choice in place of its last mention of the answer.

    Raises:
        DataError: The completion does not mention the answer as a word of its own.
    """
    # not a part of another word of Latin letters; others know no spaces between words
    word = rf"(?<!\w){re.escape(answer)}(?!\w)"
    mentions = list(re.finditer(word, completion, re.ASCII))
    if not mentions:
        raise DataError(
            f"a row's completion {completion!r} does not mention its answer {answer!r}, so that "
            "no other choice can stand in its place; correct the row, or use answers: texts."
        )
    start, end = mentions[-1].span()
    return [completion[:start] + choice + completion[end:] for choice in choices]


@dataclass(frozen=True)
class CommonsenseTask(ChoiceTask):
    """Several of the commonsense eight, trained on together and tested one by one.

    Its metrics are means over the parts, as LLM-Adapters reports its accuracy; those of each part
    are measured as well.

    Attributes:
        train: `"hub"`, each part's own data set, or a folder of LLM-Adapters' files,
            `NAME.train.json`.
        test: Likewise, `NAME.test.json`.
        parts: Names among `COMMONSENSE`; default: all eight.
        max_train: Rows of all parts together, drawn at random; the same ones every time.
        max_test: Rows of each part.
    """

    train: str = "hub"
    test: str = "hub"
    parts: list[str] = field(default_factory=lambda: list(COMMONSENSE))

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in self.parts:
            if part not in COMMONSENSE:
                raise DataError(f"parts: {part!r} is unknown; {nearest(part, COMMONSENSE)}")
        if not self.parts:
            raise DataError("parts: name at least one data set.")

    def evaluate(self, model: nn.Module, data: TaskData, rows: Sequence[Row]) -> dict[str, float]:
        """Metrics of each part, and their means."""
        scores = self._scores(model, rows)
        parts: dict[str, dict[str, float]] = {}
        for part in self.parts:
            own = [score for score, row in zip(scores, rows, strict=True) if row["part"] == part]
            if own:
                parts[part] = _mean_scores(own)
        named = {f"{k}_{part}": v for part, found in parts.items() for k, v in found.items()}
        return _mean_scores(list(parts.values())) | named

    def _rows(self) -> tuple[list[Row], list[Row]]:
        train = [row for part in self.parts for row in self._part(part, self.train, "train")]
        order = np.random.default_rng(0).permutation(len(train))
        test: list[Row] = []
        for part in self.parts:
            rows = self._part(part, self.test, "test")
            test += [rows[i] for i in evenly(len(rows), self.max_test)]
        return [train[i] for i in order], test

    def _test_rows(self, test: Sequence[Row]) -> list[Row]:
        """Chosen part by part already."""
        return list(test)

    def _part(self, part: str, source: str, split: str) -> list[Row]:
        known = COMMONSENSE[part]
        if source == "hub":
            name = known.train_split if split == "train" else known.test_split
            rows = [known.instruct(row) for row in read_rows(known.hub_id, known.subset, name)]
        else:
            path = Path(source).expanduser() / f"{part}.{split}.json"
            rows = read_rows(str(path), None, split)
        return [dict(row) | {"part": part} for row in rows]

    def _encode(self, row: Mapping[str, Any], processor: Any) -> Row:
        return super()._encode(row, processor) | {"part": row["part"]}


def question_and_options(instruction: str, names: Sequence[str]) -> tuple[str, list[str]]:
    r"""The question alone, and the texts of its options; their names if it lists none.

    Example:
        >>> question_and_options(
        ...     "Which is red?\n\nAnswer1: snow Answer2: blood\n\nAnswer format: answer1/answer2",
        ...     ["answer1", "answer2"],
        ... )
        ('Which is red?', ['snow', 'blood'])
    """
    text = instruction[: instruction.rindex("Answer format:")].strip()
    listed = r"\s+(.*?)\s+".join(re.escape(f"{name.capitalize()}:") for name in names)
    found = re.fullmatch(rf"(.*?)\s*{listed}\s+(.*)", text, re.DOTALL)
    if found is None:
        return text, list(names)
    question, *options = found.groups()
    return question, options


def _scores_of(likelihoods: Tensor, row: Row) -> dict[str, float]:
    return {
        "accuracy": float(int(likelihoods.argmax()) == row["answer"]),
        "choice_loss": -float(likelihoods.log_softmax(0)[row["answer"]]),
    }


def _mean_scores(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Questions in order, as many at once as `PASS_TOKENS` allows; one alone may have more."""
    batch: list[Row] = []
    longest_prefix = longest_rest = answers = 0
    for row in rows:
        ids = [candidate["input_ids"] for candidate in row["candidates"]]
        prefix = _shared_length(ids)
        rest = max(map(len, ids)) - prefix
        longest_prefix, longest_rest = max(longest_prefix, prefix), max(longest_rest, rest)
        answers += len(ids)
        tokens = max((len(batch) + 1) * longest_prefix, answers * longest_rest)
        if batch and tokens > PASS_TOKENS:
            yield batch
            batch, longest_prefix, longest_rest, answers = [], prefix, rest, len(ids)
        batch.append(row)
    if batch:
        yield batch


def candidate_likelihoods(
    model: nn.Module, questions: Sequence[Sequence[Row]]
) -> tuple[Tensor, ...]:
    """Log-likelihoods of each question's n candidates, less one constant of theirs, `(n,)`.

    The tokens that all candidates of a question begin with are run once, and their keys and values
    serve all: several times less work than a pass of each. What they give the labels among them is
    the constant. Questions are padded at their left, so that all candidates begin at one place.

    Args:
        model: A causal language model in evaluation mode.
        questions: The candidates of each; they have at least one token in common and differ after.
    """
    device = next(model.parameters()).device
    shared = [_shared_length([row["input_ids"] for row in rows]) for rows in questions]
    owner = torch.tensor([i for i, rows in enumerate(questions) for _ in rows], device=device)

    def joined(parts: Iterable[Sequence[int]], pad: int = 0, side: str = "right") -> Tensor:
        tensors = [torch.tensor(part, device=device) for part in parts]
        return pad_sequence(tensors, batch_first=True, padding_value=pad, padding_side=side)

    def rest(column: str) -> list[list[int]]:
        pairs = zip(questions, shared, strict=True)
        return [row[column][start:] for rows, start in pairs for row in rows]

    labels = joined(rest("labels"), IGNORED_LABEL)
    first = (rows[0]["input_ids"][:start] for rows, start in zip(questions, shared, strict=True))
    mask = joined(([1] * start for start in shared), side="left")
    with torch.no_grad():
        start = model(
            input_ids=joined(first, side="left"),
            use_cache=True,
            **_where(model, mask, mask.shape[1]),
            **_last_logits(model),
        )
        logits = start.logits[:, -1:].float()[owner]
        if labels.shape[1] > 1:
            cache = start.past_key_values
            cache.batch_select_indices(owner)
            inputs = joined(rest("input_ids"))[:, :-1]
            whole = torch.cat([mask[owner], torch.ones_like(inputs)], 1)
            where = _where(model, whole, inputs.shape[1])
            more = model(input_ids=inputs, past_key_values=cache, use_cache=True, **where).logits
            logits = torch.cat([logits, more.float()], 1)
    known = labels != IGNORED_LABEL
    log_p = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return (log_p * known).sum(1).split([len(rows) for rows in questions])


def _where(model: nn.Module, mask: Tensor, last: int) -> dict[str, Tensor]:
    """The mask of all tokens so far, and the places of the last ones in their rows."""
    if not _takes(model, "position_ids"):  # what has none reads the mask
        return {"attention_mask": mask}
    places = (mask.cumsum(1) - 1).clamp_min(0)[:, -last:]
    return {"attention_mask": mask, "position_ids": places}


def _last_logits(model: nn.Module) -> dict[str, int]:
    """Asks for the last token's logits alone, of models that can be asked."""
    return {"logits_to_keep": 1} if _takes(model, "logits_to_keep") else {}


def _takes(model: nn.Module, argument: str) -> bool:
    """Whether the model, or the one inside PEFT's, has the argument."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return argument in inspect.signature(base.forward).parameters


def _shared_length(ids: Sequence[Sequence[int]]) -> int:
    """How many tokens all begin with, but never all of one."""
    shortest = min(map(len, ids))
    for place in range(shortest - 1):
        if len({row[place] for row in ids}) > 1:
            return place
    return shortest - 1
