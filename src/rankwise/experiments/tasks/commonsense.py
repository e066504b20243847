"""The commonsense eight on the hub, and how LLM-Adapters words them as instructions.

The wording is that of LLM-Adapters' files (Hu et al. 2023, `commonsense_170k.json`), which
RandLoRA and LR-LoRA train on, so that hub rows and its files give the same text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.errors import DataError

Instruction = dict[str, str]


@dataclass(frozen=True)
class ChoiceSet:
    """One data set.

    Attributes:
        hub_id: Where it is.
        subset: Configuration.
        instruct: A row as `instruction`, `output` and `answer`.
        train_split: Split to train on.
        test_split: Split with labels to test on.
    """

    hub_id: str
    subset: str | None
    instruct: Callable[[Mapping[str, Any]], Instruction]
    train_split: str = "train"
    test_split: str = "validation"


def _instruction(text: str, answers: Sequence[str], right: int) -> Instruction:
    answer = answers[right]
    return {
        "instruction": f"{text}\n\nAnswer format: {'/'.join(answers)}",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def _numbered(
    word: str, question: str, options: Sequence[str], right: int, gap: str
) -> Instruction:
    """`Word1: option gap Word2: option`, answered by `word1`."""
    shown = gap.join(f"{word.capitalize()}{i}: {text}" for i, text in enumerate(options, 1))
    names = [f"{word}{i}" for i in range(1, len(options) + 1)]
    return _instruction(f"{question}\n\n{shown}", names, right)


def _boolq(row: Mapping[str, Any]) -> Instruction:
    question = f"{row['question']}?"
    text = f"Please answer the following question with true or false, question: {question}"
    return _instruction(text, ["true", "false"], 0 if row["answer"] else 1)


def _piqa(row: Mapping[str, Any]) -> Instruction:
    question = f"Please choose the correct solution to the question: {row['goal']}"
    options = [row["sol1"], row["sol2"]]
    return _numbered("solution", question, options, int(row["label"]), "\n\n")


def _siqa(row: Mapping[str, Any]) -> Instruction:
    text = f"{row['context']} {row['question']}"
    question = f"Please choose the correct answer to the question: {text}"
    options = [row["answerA"], row["answerB"], row["answerC"]]
    return _numbered("answer", question, options, int(row["label"]) - 1, " ")


def _hellaswag(row: Mapping[str, Any]) -> Instruction:
    text = re.sub(r" ?\[[^]]*\] ?", " ", f"{row['activity_label']}: {row['ctx']}")
    question = f"Please choose the correct ending to complete the given sentence: {text}"
    return _numbered("ending", question, row["endings"], int(row["label"]), " ")


def _winogrande(row: Mapping[str, Any]) -> Instruction:
    question = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{row['sentence']}"
    )
    options = [row["option1"], row["option2"]]
    return _numbered("option", question, options, int(row["answer"]) - 1, " ")


def _science(column: str) -> Callable[[Mapping[str, Any]], Instruction]:
    """ARC and OpenBookQA: `choices` with their labels, `answerKey` among them."""

    def instruct(row: Mapping[str, Any]) -> Instruction:
        labels = list(row["choices"]["label"])
        if row["answerKey"] not in labels:
            raise DataError(f"a row's answerKey {row['answerKey']!r} is not among {labels}.")
        question = f"Please choose the correct answer to the question: {row[column]}"
        right = labels.index(row["answerKey"])
        return _numbered("answer", question, row["choices"]["text"], right, " ")

    return instruct


_ARC = _science("question")

COMMONSENSE: Mapping[str, ChoiceSet] = {
    "boolq": ChoiceSet("google/boolq", None, _boolq),
    "piqa": ChoiceSet("baber/piqa", None, _piqa),
    "social_i_qa": ChoiceSet("lighteval/siqa", None, _siqa),
    "hellaswag": ChoiceSet("Rowan/hellaswag", None, _hellaswag),
    "winogrande": ChoiceSet("allenai/winogrande", "winogrande_xl", _winogrande),
    "ARC-Easy": ChoiceSet("allenai/ai2_arc", "ARC-Easy", _ARC, test_split="test"),
    "ARC-Challenge": ChoiceSet("allenai/ai2_arc", "ARC-Challenge", _ARC, test_split="test"),
    "openbookqa": ChoiceSet(
        "allenai/openbookqa", "main", _science("question_stem"), test_split="test"
    ),
}
"""By the names of LLM-Adapters' files. PIQA and SocialIQA are copies as parquet files: `datasets`
no longer runs the scripts that the originals are made of."""
