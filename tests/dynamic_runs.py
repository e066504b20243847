"""Small dynamic runs, in a plain loop and with Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import rankwise as rw
from rankwise.dynamic import DynamicRanks
from rankwise.methods import Method
from rankwise.plan import RankPlan
from tiny_models import tiny_llama, token_batch

WATER = rw.WaterFill(r=4, r_min=1, r_max=8)


def attached(
    dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> tuple[PeftModel, RankPlan]:
    torch.manual_seed(0)
    base = tiny_llama().to(dtype)
    plan = rw.Lora(r=4).plan(rw.find_targets(base))
    return rw.attach(base, plan, dropout=dropout).to(dtype), plan


def adamw(model: torch.nn.Module, **options: Any) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, **({"lr": 1e-2} | options))


def plain_run(
    steps: int = 12,
    *,
    method: Method = WATER,
    accumulation: int = 1,
    make_optimizer: Any = adamw,
    dtype: torch.dtype = torch.float32,
    mode: Any = "masked",
    **options: Any,
) -> tuple[DynamicRanks, list[float], list[dict[str, int]]]:
    """Train in a plain loop; returns the session, the losses and the ranks after every step."""
    model, plan = attached(dtype=dtype)
    optimizer = make_optimizer(model)
    chosen = rw.DynamicOptions(**({"interval": 5, "window": 3} | options))
    ranks = DynamicRanks(model, plan, method, chosen, optimizer=optimizer, mode=mode)
    losses, seen = [], []
    for step in range(steps):
        for part in range(accumulation):
            with ranks.observe():
                loss = model(**token_batch([9, 6], seed=step * accumulation + part)).loss
                (loss / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ranks.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        seen.append(dict(ranks.state.ranks))
    return ranks, losses, seen


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Token rows of one length, the same on every machine."""

    def __init__(self, rows: int = 64) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in token_batch([9], seed=index).items()}


def trainer_run(
    folder: Path,
    *,
    mode: Any = "masked",
    method: Method = WATER,
    resume_from: Path | None = None,
    compact: bool = True,
    options: dict[str, Any] | None = None,
    dropout: float = 0.1,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> tuple[Trainer, rw.RankCallback]:
    """A Trainer with a RankCallback, ready to train."""
    model, plan = attached(dropout=dropout)
    chosen = rw.DynamicOptions(**({"interval": 5, "window": 3} | (options or {})))
    callback = rw.RankCallback(
        plan, method, chosen, mode=mode, resume_from=resume_from, compact=compact
    )
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 1,
    }
    trainer = Trainer(
        model,
        TrainingArguments(**(settings | arguments)),
        train_dataset=Rows(),
        eval_dataset=Rows(4),
        callbacks=[*callbacks, callback],
    )
    return trainer, callback
