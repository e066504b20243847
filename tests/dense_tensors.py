"""Counting tensors as large as a weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class DenseTensors(TorchDispatchMode):
    """Counts how many storages as large as a tensor's live at one time, without its own."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.like, self.peak = like.untyped_storage(), 0
        self.alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            known = storage.data_ptr() == self.like.data_ptr()
            if storage.nbytes() >= self.like.nbytes() and not known:
                self.alive[storage.data_ptr()] = StorageWeakRef(storage)
        self.alive = {at: ref for at, ref in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, len(self.alive))
        return result
