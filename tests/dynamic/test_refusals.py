"""What shards parameters, or keeps their moments elsewhere, is refused by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

import rankwise as rw
from dynamic_runs import WATER, adamw, attached
from rankwise.adapters.factors import lora_factors
from rankwise.dynamic import DynamicRanks
from rankwise.errors import DynamicError, PlanError


def test_a_method_is_no_plan() -> None:
    for refused in (lambda: rw.RankCallback(WATER), lambda: DynamicRanks(attached()[0], WATER)):
        with pytest.raises(PlanError, match=r"a rank plan is needed, .* not a WaterFill"):
            refused()


def test_zero3_is_refused_by_its_marks_on_parameters() -> None:
    model, plan = attached()
    next(iter(lora_factors(model).values())).a.ds_id = 7
    with pytest.raises(DynamicError, match=r"q_proj: DeepSpeed ZeRO-3 has sharded .* DDP"):
        DynamicRanks(model, plan, WATER)


def test_a_trainer_with_deepspeed_is_refused_with_its_stage(tmp_path: Path) -> None:
    model, plan = attached()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model, args)
    args.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    trainer.callback_handler.add_callback(rw.RankCallback(plan))
    with pytest.raises(DynamicError, match="the Trainer uses DeepSpeed ZeRO-3"):
        trainer.callback_handler.on_init_end(args, trainer.state, trainer.control)


def test_a_trainer_with_fsdp_is_refused(tmp_path: Path) -> None:
    model, plan = attached()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model, args)
    args.fsdp = True
    trainer.callback_handler.add_callback(rw.RankCallback(plan))
    with pytest.raises(DynamicError, match=r"the Trainer uses FSDP, .* train with DDP"):
        trainer.callback_handler.on_init_end(args, trainer.state, trainer.control)


def test_a_trainer_with_data_parallel_is_refused(tmp_path: Path) -> None:
    model, plan = attached()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model, args)
    args._n_gpu = 2
    trainer.callback_handler.add_callback(rw.RankCallback(plan))
    with pytest.raises(DynamicError, match=r"2 GPUs by nn.DataParallel, .* --nproc-per-node=2"):
        trainer.callback_handler.on_init_end(args, trainer.state, trainer.control)


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    """Flat buffers and parameters from before a wrapper replaced them."""
    model, plan = attached()
    ranks = DynamicRanks(model, plan, WATER)
    flat = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(DynamicError, match=r"q_proj: the optimizer does not hold this adapter's"):
        ranks.watch(flat)
    ranks.watch(adamw(model))
