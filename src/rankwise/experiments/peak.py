"""Peak memory of one part of a process, where the system lets it be measured."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """Counts from when it is made: resident memory on Linux, allocated memory on a GPU.

    What earlier parts of the process have freed is given back to the system first.

    Attributes:
        before: MiB in use at the start; None if unknown.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = True
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before: float | None = torch.cuda.memory_allocated(device) / 2**20
            return
        _trim_heap()
        try:
            _CLEAR.write_text("5")  # sets VmHWM to what is resident now (man 5 proc)
        except OSError:
            self._known = False
        self.before = _status("VmRSS") if self._known else None

    def peak(self) -> float | None:
        """MiB at most since the start; None where the system does not tell."""
        if self._device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self._device) / 2**20, 1)
        return _status("VmHWM") if self._known else None


def _trim_heap() -> None:
    """Let glibc give freed blocks back, which stay resident otherwise; others have no such call."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _status(field: str) -> float | None:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return round(int(line.split()[1]) / 2**10, 1)
    return None
