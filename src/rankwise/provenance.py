"""Where a number came from: fingerprints of models and data, versions, hardware, commit."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES_PER_PARAMETER = 16
_PACKAGES = ("rankwise", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


def model_fingerprint(model: nn.Module) -> str:
    """A short hash that tells whether two models share structure and weights.

    Hashes the name and shape of every parameter of the model body and sixteen evenly spaced
    values of each, rounded to bf16 so that a model loaded in bf16 or fp32 has one fingerprint.
    Task heads stay out: they are drawn at random whenever a classifier is built. Quantised
    weights count by name and shape only.

    Returns:
        Sixteen hexadecimal digits.
    """
    body = getattr(model, "base_model", None)
    body = body if isinstance(body, nn.Module) else model
    digest = hashlib.sha256()
    for name, parameter in sorted(body.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if hasattr(parameter, "tensor_data_names"):
            continue  # torchao's, which says that it is fp32
        if parameter.is_floating_point() and not parameter.is_meta and parameter.numel():
            flat = parameter.detach().reshape(-1)
            at = torch.linspace(0, flat.numel() - 1, _SAMPLES_PER_PARAMETER, dtype=torch.float64)
            sample = flat[at.long().to(flat.device)].to(torch.bfloat16).float().cpu()
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def batch_digest(batch: Mapping[str, Any]) -> bytes:
    """A hash of one batch: names, shapes and values of its tensors."""
    digest = hashlib.sha256()
    for key in sorted(batch):
        value = batch[key]
        if isinstance(value, Tensor):
            digest.update(f"{key}{tuple(value.shape)}".encode())
            plain = value.detach().cpu().contiguous()
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()


class DataFingerprint:
    """A hash over the batches that were seen, in order, through a hash of each."""

    def __init__(self, digests: Iterable[bytes] = ()) -> None:
        self._digest = hashlib.sha256(b"".join(digests))

    def update(self, batch: Mapping[str, Any]) -> None:
        """Add one batch."""
        self._digest.update(batch_digest(batch))

    def hexdigest(self) -> str:
        """Sixteen hexadecimal digits."""
        return self._digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Python and the versions of the installed packages that can change a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, str | int]:
    """Processor, cores, threads in use, memory and accelerator of this machine."""
    facts: dict[str, str | int] = {
        "machine": platform.machine(),
        "processor": _processor_name(),
        "cores": os.cpu_count() or 1,
        "torch_threads": torch.get_num_threads(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_gib"] = round(
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        )
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def git_commit(written: Iterable[Path] = ()) -> str | None:
    """The commit of the repository that the current folder is in, or None outside of one.

    It ends in `-dirty` where a tracked file differs from the commit.

    Args:
        written: Folders that the run itself writes results to. What changed there does not count:
            it is not what the run was started from.
    """
    try:
        commit = _git("describe", "--always", "--abbrev=12")
        top = Path(_git("rev-parse", "--show-toplevel")).resolve()
        folders = [folder.resolve() for folder in written]
        besides = [
            f":(top,exclude,literal){folder.relative_to(top).as_posix()}"
            for folder in folders
            if folder != top and folder.is_relative_to(top)
        ]
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *besides)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changes else commit


def _git(*arguments: str) -> str:
    answer = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, timeout=5, check=True
    )
    return answer.stdout.strip()


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
