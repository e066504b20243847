"""Statistics in their own precision, whatever precision the caller's model runs in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import torch


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


@cache
def _devices() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)
