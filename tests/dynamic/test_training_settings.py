"""What surrounds dynamic training stays as it was: schedules, step counts, precision, the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
import rankwise.files
from dynamic_runs import WATER, adamw, attached, trainer_run
from rankwise.adapters.factors import lora_factors
from rankwise.dynamic import DynamicRanks
from rankwise.dynamic.checkpoint import WINDOW_FILE
from rankwise.errors import FileError
from tiny_models import tiny_llama, token_batch


@pytest.mark.parametrize("mode", ["masked", "resize"])
def test_events_leave_the_schedule_and_step_counts_alone(mode: Any) -> None:
    model, plan = attached()
    optimizer = adamw(model, lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-2 / (1 + step))
    options = rw.DynamicOptions(interval=2)
    ranks = DynamicRanks(model, plan, WATER, options, optimizer=optimizer, mode=mode)
    parameters = list(optimizer.param_groups[0]["params"])
    for step in range(1, 7):
        with ranks.observe():
            model(**token_batch([9, 6], seed=step)).loss.backward()
        optimizer.step()
        ranks.step()
        schedule.step()
        optimizer.zero_grad()
        assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0] == 1e-2 / (1 + step)
        assert schedule.last_epoch == step == ranks.steps
        assert {float(state["step"]) for state in optimizer.state.values()} == {step}
    assert sum(m.before != m.after for event in ranks.events for m in event.moves) > 0
    now = optimizer.param_groups[0]["params"]
    assert len(now) == len(parameters) and all(map(lambda a, b: a is b, now, parameters))


def bf16_run(base: torch.dtype, mode: Any = "masked") -> DynamicRanks:
    torch.manual_seed(0)
    plan = rw.Lora(r=4).plan(rw.find_targets(tiny_llama()))
    model = rw.attach(tiny_llama().to(base), plan)
    optimizer = adamw(model, lr=1e-3)
    options = rw.DynamicOptions(interval=3)
    ranks = DynamicRanks(model, plan, WATER, options, optimizer=optimizer, mode=mode)
    for step in range(6):
        with ranks.observe():
            model(**token_batch([9, 6], seed=step)).loss.backward()
        optimizer.step()
        ranks.step()
        optimizer.zero_grad()
    return ranks


def test_a_16_bit_base_moves_ranks_as_the_32_bit_one_does() -> None:
    half, whole = bf16_run(torch.bfloat16), bf16_run(torch.float32)
    assert {f.a.dtype for f in lora_factors(half.model).values()} == {torch.float32}
    assert any(move.before != move.after for event in half.events for move in event.moves)
    assert half.state.ranks == bf16_run(torch.bfloat16, "resize").state.ranks
    for name, energies in half.state.averages.items():
        largest = whole.state.averages[name][0] ** 0.5  # of the singular values
        assert energies[0] ** 0.5 == pytest.approx(largest, rel=0.05)
    for name, found in lora_factors(half.model).items():
        found.check_empty(half.state.ranks[name], half._optimizer)


@pytest.mark.parametrize(
    ("call", "code"), [("fsync", errno.ENOSPC), ("replace", errno.EROFS)], ids=["full", "read-only"]
)
def test_a_disk_that_takes_no_window_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    settings: dict[str, Any] = {
        "save_strategy": "steps", "save_steps": 1, "max_steps": 6, "compact": False,
    }  # fmt: skip
    whole, expected = trainer_run(tmp_path / "whole", **settings)
    whole.train()
    trainer, _ = trainer_run(tmp_path / "run", **settings)
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        patch.setattr(rankwise.files.os, call, fail)
        with pytest.raises(FileError, match=rf"{WINDOW_FILE}: cannot be written"):
            trainer.train()
    last = rw.last_checkpoint(tmp_path / "run")
    assert last == tmp_path / "run" / "checkpoint-2"  # the window opens in step 3
    assert not list((tmp_path / "run" / "checkpoint-3").glob(f"*{WINDOW_FILE}*"))
    again, callback = trainer_run(tmp_path / "run", **settings)
    again.train(resume_from_checkpoint=str(last))
    assert callback.ranks.saved() == expected.ranks.saved()
    for name, found in lora_factors(again.model).items():
        assert torch.equal(found.b, lora_factors(whole.model)[name].b)
