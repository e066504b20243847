"""Statistics in their own precision, whatever precision the caller's model runs in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import torch
from torch import nn


@contextmanager
def autocast_off() -> Iterator[None]:
    """Switch autocasting off, for the CPU and the accelerator, where the caller has it on.

    Under it a product of fp32 matrices is made in bf16 or fp16, whatever they were widened to.
    Backward passes run in it as well, hence around whatever hooks call. Also a decorator.
    """
    with ExitStack() as stack:
        for device in _devices():
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def loss_scale(model: nn.Module, items: int) -> float:
    """What a mean loss over `items` is multiplied by before its backward pass: 1 but in fp16.

    There the gradient of a mean over thousands of tokens is smaller than the smallest number,
    6e-8, where it starts, at the logits. That of the sum is not; a power of two rounds nothing.
    """
    half = any(p.dtype == torch.float16 for p in model.parameters())
    return 2.0 ** math.floor(math.log2(items)) if half else 1.0


@cache
def _devices() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)
