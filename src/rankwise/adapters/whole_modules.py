"""Modules that PEFT trains whole beside an adapter, and that hence get none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_BY_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""What PEFT adds to `modules_to_save` by the task type."""


def trained_whole(
    names: Iterable[str], modules_to_save: Sequence[str] | None, task_type: str | None
) -> dict[str, str]:
    """Which of these modules PEFT trains whole instead, and the entry that asks for it.

    PEFT takes an entry for every module of that name and all inside it.
    """
    entries = [*(modules_to_save or ()), *_BY_TASK.get(task_type or "", ())]
    found = {}
    for name in names:
        for entry in entries:
            if f".{entry}." in f".{name}.":
                found[name] = entry
    return found
