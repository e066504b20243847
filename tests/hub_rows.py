"""A row of each of the commonsense eight, with the columns that it has on the hub."""

from __future__ import annotations

from typing import Any

HUB_ROWS: dict[str, dict[str, Any]] = {
    "boolq": {"question": "is it so", "passage": "p", "answer": False},
    "piqa": {"goal": "sit", "sol1": "a chair", "sol2": "a wall", "label": 1},
    "social_i_qa": {
        "context": "Al ran.",
        "question": "Why?",
        "answerA": "x",
        "answerB": "y",
        "answerC": "z",
        "label": "2",
    },
    "hellaswag": {
        "activity_label": "Home",
        "ctx": "[header] A man [title] sits",
        "endings": ["a", "b", "c", "d"],
        "label": "1",
    },
    "winogrande": {"sentence": "The _ fell.", "option1": "cup", "option2": "tree", "answer": "2"},
    "ARC-Easy": {
        "question": "What?",
        "choices": {"text": ["u", "v"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "ARC-Challenge": {
        "question": "What?",
        "choices": {"text": ["u", "v"], "label": ["1", "2"]},
        "answerKey": "2",
    },
    "openbookqa": {
        "question_stem": "What?",
        "choices": {"text": ["u", "v"], "label": ["A", "B"]},
        "answerKey": "B",
    },
}
