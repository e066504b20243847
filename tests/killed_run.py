"""A run that may be killed at any moment and goes on from its last whole checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import rankwise as rw
from dynamic_runs import trainer_run

PHASES = {"s": "step", "e": "event", "c": "save"}
"""Marker that begins a phase -> its name; the capital letter ends it."""
Mark = Callable[[str], None]


class _Steps(TrainerCallback):
    """Marks where optimizer steps begin and end."""

    def __init__(self, mark: Mark) -> None:
        self._mark = mark

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._mark("s")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._mark("S")


def run(folder: Path, steps: int, mark: Mark) -> dict[str, Any]:
    """Train to the end, from the last whole checkpoint if there is one; all that must be equal."""
    torch.set_num_threads(1)
    checkpoint = rw.last_checkpoint(folder)
    if checkpoint is not None and checkpoint.name == f"checkpoint-{steps}":
        # killed after its last save: resumed from there, Trainer would take one step too many
        shutil.rmtree(checkpoint)
        checkpoint = rw.last_checkpoint(folder)
    trainer, callback = trainer_run(
        folder,
        compact=False,
        options={"interval": 10, "window": 3},
        callbacks=[_Steps(mark)],
        save_strategy="steps",
        save_steps=1,
        save_total_limit=3,
        logging_steps=1,
        max_steps=steps,
    )
    _mark_around(callback.ranks, "_event", mark, "e", "E")
    _mark_around(trainer, "_save_checkpoint", mark, "c", None)
    _mark_around(callback, "on_save", mark, None, "C")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    state = trainer.optimizer.state_dict()["state"]
    return {
        "weights": {k: v for k, v in trainer.model.state_dict().items() if "lora_" in k},
        "optimizer": {
            f"{i} {k}": torch.as_tensor(v) for i, s in state.items() for k, v in s.items()
        },
        "events": str(callback.ranks.saved()),
        "losses": str([e["loss"] for e in trainer.state.log_history if "loss" in e]),
    }


def child(folder: str, steps: int, pipe: int) -> None:
    """What a process does that may be killed; every marker is one byte in the pipe."""
    done = run(Path(folder), steps, lambda marker: _tell(pipe, marker))
    torch.save(done, f"{folder}.part")
    os.replace(f"{folder}.part", f"{folder}.done")


def _tell(pipe: int, marker: str) -> None:
    os.write(pipe, marker.encode())


def _mark_around(
    thing: Any, method: str, mark: Mark, before: str | None, after: str | None
) -> None:
    original = getattr(thing, method)

    def marked(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            mark(before)
        found = original(*args, **kwargs)
        if after is not None:
            mark(after)
        return found

    setattr(thing, method, marked)
