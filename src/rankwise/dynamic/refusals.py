"""Where ranks cannot move, said before training and not by a hang or a silent divergence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from rankwise.adapters.factors import HasState, LoraFactors
from rankwise.dynamic import workers
from rankwise.errors import DynamicError

_REMEDY = "train with DDP or in one process, or give static ranks: rankwise.attach without dynamic"


def check_mode(mode: str) -> None:
    """Refuse to change shapes of parameters that several processes hold.

    Raises:
        DynamicError: There are several processes and the mode is `"resize"`.
    """
    if mode == "resize" and workers.count() > 1:
        raise DynamicError(
            "mode='resize' changes parameters that other processes and wrappers hold on to; with "
            f"{workers.count()} processes use mode='masked', or unwrap the model, resize and wrap "
            "again."
        )


def check_trainer(args: TrainingArguments) -> None:
    """Refuse a Trainer that shards parameters or keeps their optimizer state elsewhere.

    Raises:
        DynamicError: It uses DeepSpeed, FSDP or `nn.DataParallel`.
    """
    if args.n_gpu > 1:
        raise DynamicError(
            f"the Trainer splits batches over {args.n_gpu} GPUs by nn.DataParallel, which moves "
            f"activations between them; start it with torchrun --nproc-per-node={args.n_gpu}, or "
            "set CUDA_VISIBLE_DEVICES to one GPU."
        )
    plugin: Any = getattr(args, "deepspeed_plugin", None)
    if plugin is not None:
        raise DynamicError(
            f"the Trainer uses DeepSpeed ZeRO-{plugin.zero_stage}, which keeps adapters and their "
            f"moments in flat or partitioned buffers, whose rows cannot move; {_REMEDY}."
        )
    if args.fsdp:
        raise DynamicError(
            "the Trainer uses FSDP, which shards adapters and their moments over the processes, so "
            f"that no process has whole rows to move; {_REMEDY}."
        )


def check_parameters(factors: Mapping[str, LoraFactors]) -> None:
    """Refuse factors of which this process has a part only.

    Raises:
        DynamicError: FSDP2 or DeepSpeed ZeRO-3 has sharded them.
    """
    for name, found in factors.items():
        for parameter in (found.a, found.b):
            sharder = _sharder(parameter)
            if sharder is not None:
                raise DynamicError(
                    f"{name}: {sharder} has sharded the adapter over the processes, so that no "
                    f"process has whole rows to move; {_REMEDY}."
                )


def plain_optimizer(
    optimizer: HasState, factors: Mapping[str, LoraFactors]
) -> torch.optim.Optimizer:
    """The optimizer inside wrappers, which must train the factors themselves.

    Raises:
        DynamicError: There is none, or it holds other parameters.
    """
    inner: Any = optimizer
    while hasattr(inner, "optimizer"):  # Accelerate's wrapper calls itself an Optimizer too
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise DynamicError(
            f"optimizer is a {type(inner).__name__}; dynamic ranks follow a "
            "torch.optim.Optimizer, or a wrapper that keeps one in .optimizer."
        )
    held = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    for name, found in factors.items():
        if not {id(found.a), id(found.b)} <= held:
            raise DynamicError(
                f"{name}: the optimizer does not hold this adapter's parameters, so their moments "
                "could not follow a change of rank. Give it the model's trainable parameters, "
                f"after any wrapper that replaces them; with FSDP or DeepSpeed, {_REMEDY}."
            )
    return inner


class LossScaler(Protocol):
    """What multiplies the loss before its backward pass, as `torch.amp.GradScaler` does."""

    def get_scale(self) -> float:
        """The factor of the next backward pass."""


def scaler_of(optimizer: HasState) -> LossScaler | None:
    """The loss scaler that a wrapper around the optimizer brings, as accelerate's does."""
    inner: Any = optimizer
    while hasattr(inner, "optimizer"):
        scaler: LossScaler | None = getattr(inner, "scaler", None)
        if scaler is not None:
            return scaler
        inner = inner.optimizer
    return None


def _sharder(parameter: nn.Parameter) -> str | None:
    if hasattr(parameter, "ds_id"):  # deepspeed.zero.Init marks what it partitions
        return "DeepSpeed ZeRO-3"
    return "FSDP2" if isinstance(parameter, DTensor) else None
