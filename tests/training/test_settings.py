"""What docs/train.md promises of `training` and `profile` reaches Trainer and the profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from rankwise.training import fit
from rankwise.training.config import RunConfig
from rankwise.training.train import train
from tiny_folder import save_tiny_llama, write_texts


def _config(place: Path, **changes: Any) -> RunConfig:
    document = {
        "model": str(place / "model"),
        "output": str(place / "run"),
        "data": {"train": str(place / "train.jsonl"), "held_out": str(place / "held.jsonl")},
        "method": {"name": "ralora", "r": 2},
    }
    return RunConfig.model_validate(document | changes)


def test_settings_reach_the_trainer(tmp_path: Path) -> None:
    training = {
        "batch_size": 3,
        "gradient_accumulation": 5,
        "learning_rate": 0.02,
        "weight_decay": 0.3,
        "max_grad_norm": 0.7,
        "log_every": 2,
        "gradient_checkpointing": True,
        "epochs": 2.0,
    }
    settings = _config(tmp_path, seed=4, training=training)
    found = fit._arguments(settings, 7, tmp_path)
    assert (found.max_steps, found.per_device_train_batch_size) == (7, 3)
    assert (found.gradient_accumulation_steps, found.weight_decay) == (5, 0.3)
    assert (found.learning_rate, found.max_grad_norm, found.logging_steps) == (0.02, 0.7, 2)
    assert (found.seed, found.data_seed) == (4, 4)
    assert getattr(found, fit._CHECKPOINTING) is True
    assert fit._steps(settings.training, 31) == 6  # twice three steps, the last not full


@pytest.mark.parametrize(("scheduler", "end"), [("cosine", 0.1), ("linear", 0.0)])
def test_where_the_learning_rate_ends(tmp_path: Path, scheduler: str, end: float) -> None:
    chosen = _config(tmp_path, training={"scheduler": scheduler, "warmup": 0.0})
    found = fit._arguments(chosen, 8, tmp_path)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(
        found.lr_scheduler_type,
        optimizer,
        0,
        8,
        scheduler_specific_kwargs=found.lr_scheduler_kwargs,
    )
    for _ in range(8):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr()[0] == pytest.approx(end)


def test_dropout_modes_and_batches_of_a_run(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model")
    write_texts(tmp_path / "train.jsonl")
    write_texts(tmp_path / "held.jsonl", 5)
    training = {"steps": 1, "batch_size": 2, "dropout": 0.25}
    profile = {"batches": 2, "batch_size": 3, "train_mode": True}
    run = train(_config(tmp_path, training=training, profile=profile))
    assert run.model.peft_config["default"].dropout == 0.25
    assert run.profile is not None
    provenance = run.profile.provenance
    assert provenance.train_mode
    assert (provenance.batches, set(provenance.batch_sizes)) == (2, {3})
    # two rows a step, of two accumulated ones
    halves = {"steps": 1, "batch_size": 1, "gradient_accumulation": 2}
    again = train(_config(tmp_path, output=str(tmp_path / "again"), training=halves))
    assert run.record.train_tokens == again.record.train_tokens > 0
