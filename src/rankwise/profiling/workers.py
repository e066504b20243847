"""Processes that profile together: exchanging tensors, and failing together instead of hanging.

Everything they say to each other goes through one exchange. It begins with a line from every worker
that says whether it is well and what it is about to send, so that a worker that has failed can
answer whatever the others are waiting for, and workers out of step are found before data is mixed.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from rankwise.errors import ProfileError, nearest, reason_of

Distributed = Literal["auto", "split", "sharded", "off"]
"""Whether workers share the batches, and what each one's loader gives: see `profile_gradients`."""

_WELL, _FAILED, _UNSUITABLE = 0, 1, 2
_HEADER = 8  # status, subject, dtype, number of axes, up to four sizes
_MESSAGE_BYTES = 1024
_DTYPES = (torch.float32, torch.float64, torch.uint8)


class OthersUnsuitableError(Exception):
    """Another worker found that the layer sweep does not fit."""


class Workers:
    """One process that profiles alone, and the interface of several."""

    rank = 0
    size = 1

    def gather(self, tensor: Tensor, subject: str) -> list[Tensor]:
        """Every worker's tensor, by rank, on the CPU; they may differ in shape.

        Args:
            tensor: fp32, fp64 or uint8, of at most four axes; all workers' have one dtype.
            subject: What it is; the workers' must agree.

        Raises:
            ProfileError: Another worker failed, ended, or speaks of something else.
        """
        return [tensor]

    def gather_values(self, value: Any, subject: str) -> list[Any]:
        """Every worker's value, by rank: anything that JSON can hold."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(t.numpy().tobytes()) for t in self.gather(text, subject)]

    def any(self, flag: bool, subject: str) -> bool:
        """Whether the flag is set on any worker."""
        return any(self.gather_values(flag, subject))

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Let every worker fail if their facts differ.

        Raises:
            ProfileError: Names the fact, the worker and the values.
        """
        everyones = self.gather_values(dict(facts), "what to measure")
        for rank, theirs in enumerate(everyones):
            for key, value in everyones[0].items():
                if theirs.get(key) != value:
                    raise ProfileError(
                        f"worker {rank} has {key} {theirs.get(key)!r}, worker 0 has {value!r}; "
                        "every worker must be given the same."
                    )

    def tell_unsuitable(self, reason: str) -> None:
        """Let the others give up the layer sweep too."""

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Let the others fail when an error leaves the block, and not wait for this worker."""
        yield


class ProcessGroup(Workers):
    """The workers of an initialised `torch.distributed` group."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        backend = dist.get_backend()
        by_gpu = "nccl" in backend and "gloo" not in backend
        self._device = torch.device("cuda", torch.cuda.current_device()) if by_gpu else "cpu"
        self._over = False

    def gather(self, tensor: Tensor, subject: str) -> list[Tensor]:  # noqa: D102
        flat = tensor.detach().reshape(-1).to(self._device)
        shapes = self._announce(tensor, subject)
        longest = max(map(_numel, shapes))
        if not longest:
            return [tensor.new_empty(shape, device="cpu") for shape in shapes]
        padded = torch.nn.functional.pad(flat, (0, longest - flat.numel()))
        received = self._all_gather(padded)
        return [
            part[: _numel(shape)].reshape(shape).cpu()
            for part, shape in zip(received, shapes, strict=True)
        ]

    def tell_unsuitable(self, reason: str) -> None:  # noqa: D102
        with suppress(OthersUnsuitableError):
            self._announce_trouble(_UNSUITABLE, reason)

    @contextmanager
    def failing_together(self) -> Iterator[None]:  # noqa: D102
        try:
            yield
        except Exception as error:
            # not on Ctrl-C, which ends the process: the others see the connection break
            if not self._over:
                with suppress(ProfileError, OthersUnsuitableError):
                    self._announce_trouble(_FAILED, f"{type(error).__name__}: {error}")
            raise
        finally:
            self._over = True

    def _announce(self, tensor: Tensor, subject: str) -> list[list[int]]:
        """Say what comes; returns the shape of what comes from each worker."""
        sizes = [*tensor.shape, *[0] * (4 - tensor.ndim)]
        header = [_WELL, zlib.crc32(subject.encode()), _DTYPES.index(tensor.dtype), tensor.ndim]
        headers = self._all_gather(torch.tensor([*header, *sizes], device=self._device))
        lines = [h.tolist() for h in headers]
        if any(line[0] != _WELL for line in lines):
            self._hear_trouble(_WELL, "")
        for rank, line in enumerate(lines):
            if line[1:3] != header[1:3]:
                self._over = True
                raise ProfileError(
                    f"workers are out of step: worker {rank} does not send {subject!r}; every "
                    "worker must profile the same model with the same settings."
                )
        return [line[4 : 4 + line[3]] for line in lines]

    def _announce_trouble(self, status: int, message: str) -> None:
        self._all_gather(torch.tensor([status] + [0] * (_HEADER - 1), device=self._device))
        self._hear_trouble(status, message)

    def _hear_trouble(self, status: int, message: str) -> None:
        text = message.encode()[: _MESSAGE_BYTES - 1].ljust(_MESSAGE_BYTES - 1, b" ")
        own = torch.tensor([status, *text], dtype=torch.uint8, device=self._device)
        for rank, line in enumerate(self._all_gather(own)):
            said = line[1:].cpu().numpy().tobytes().decode(errors="replace").strip()
            if rank != self.rank and int(line[0]) == _FAILED:
                self._over = True
                raise ProfileError(f"worker {rank} failed, so this one stops: {said}")
            if rank != self.rank and int(line[0]) == _UNSUITABLE:
                message = message or f"worker {rank}: {said}"
        raise OthersUnsuitableError(message)

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        received = [torch.empty_like(tensor) for _ in range(self.size)]
        try:
            dist.all_gather(received, tensor)
        except RuntimeError as error:
            self._over = True
            raise ProfileError(
                "the connection to another worker broke; it has probably ended. Its own output "
                f"says why ({reason_of(error, 1)})."
            ) from error
        return received


def find_workers(distributed: str) -> Workers:
    """The workers that are to share the batches.

    Raises:
        ProfileError: `distributed` is not known, or asks for workers that are not there.
    """
    if distributed not in get_args(Distributed):
        raise ProfileError(
            f"distributed={distributed!r}; {nearest(distributed, get_args(Distributed))}"
        )
    if distributed == "off":
        return Workers()
    if dist.is_available() and dist.is_initialized():
        return ProcessGroup() if dist.get_world_size() > 1 else Workers()
    started = int(os.environ.get("WORLD_SIZE", "1") or 1)
    if started > 1 or distributed != "auto":
        raise ProfileError(
            f"distributed={distributed!r} with WORLD_SIZE={started} and no process group: call "
            "torch.distributed.init_process_group() first (Accelerator() does), or pass "
            "distributed='off' to measure all batches in each process."
        )
    return Workers()


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
