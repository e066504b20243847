"""A run that may be killed at any moment and goes on from its last whole checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

import rankwise as rw
from dynamic_runs import trainer_run

STEPS = 10


def run(folder: Path) -> dict[str, Any]:
    """Train to the end, from the last whole checkpoint if there is one; all that must be equal."""
    torch.set_num_threads(1)
    checkpoint = rw.last_checkpoint(folder)
    if checkpoint is not None and checkpoint.name == f"checkpoint-{STEPS}":
        # killed after its last save: resumed from there, Trainer would take one step too many
        shutil.rmtree(checkpoint)
        checkpoint = rw.last_checkpoint(folder)
    trainer, callback = trainer_run(
        folder,
        compact=False,
        options={"interval": 3, "window": 2},
        save_strategy="steps",
        save_steps=1,
        max_steps=STEPS,
    )
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


def child(folder: str, started: str) -> None:
    """What a process does that may be killed."""
    Path(started).write_text(str(os.getpid()))
    done = run(Path(folder))
    torch.save(done, f"{folder}.part")
    os.replace(f"{folder}.part", f"{folder}.done")
