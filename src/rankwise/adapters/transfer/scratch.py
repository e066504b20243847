"""Memory for what passes form and do not keep."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Scratch(threading.local):
    """Matrices for the passes of one thread, used by one layer after the other.

    Memory that is given back and asked for again is cleared page by page each time, which would
    cost a CPU as much as f does. GPUs have torch's caching allocator.
    """

    def __init__(self) -> None:
        self.held: dict[tuple[int, torch.dtype], Tensor] = {}

    def matrix(self, slot: int, rows: int, columns: int, like: Tensor) -> Tensor:
        """An uninitialised matrix; the one before it in the same slot is overwritten."""
        if like.device.type != "cpu":
            return like.new_empty(rows, columns)
        count, held = rows * columns, self.held.get((slot, like.dtype))
        if held is None or held.numel() < count:
            with torch.inference_mode(False):  # else it could not be used outside of it
                held = self.held[slot, like.dtype] = like.new_empty(count)
        return held[:count].view(rows, columns)


scratch = Scratch()
