"""One way of measuring gradients in a process of its own: `python -m benchmarks.worker WAY ...`.

Prints the seconds it took and the memory it needed at its peak beyond the loaded model. The
baselines are the plain published procedures, written out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankwise as rw
from benchmarks.text import Batch, frozen_model, text_batches

Arrays = dict[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """What one way costs, and the arrays it found."""

    seconds: float
    extra_bytes: int
    arrays: Arrays


def cost_of(way: str, count: int, size: int) -> Cost:
    """Run one of `WAYS` on `count` batches of `size` sequences, in a fresh process."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.safetensors"
        command = [sys.executable, "-m", "benchmarks.worker", way, str(count), str(size), str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        told = json.loads(done.stdout.splitlines()[-1])
        return Cost(told["seconds"], told["extra_bytes"], load_file(out))


def _autograd(model: nn.Module, batch: Batch, layers: dict[str, nn.Module]) -> Arrays:
    """The weight gradients of one batch, as PyTorch gives them."""
    model(**batch, use_cache=False).loss.backward()
    gradients = {name: layer.weight.grad for name, layer in layers.items()}
    for layer in layers.values():
        layer.weight.grad = None
    return gradients


def _targets(model: nn.Module) -> dict[str, nn.Module]:
    layers = {name: model.get_submodule(name) for name in rw.find_targets(model)}
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    return layers


def released(model: nn.Module, batches: list[Batch]) -> Arrays:
    """RaLoRA's released code: mean gradient on the CPU, full SVD, effective rank."""
    layers = _targets(model)
    means: Arrays = {}
    for batch in batches:
        for name, gradient in _autograd(model, batch, layers).items():
            share = gradient.cpu() / len(batches)
            means[name] = means[name] + share if name in means else share
    found = {}
    for name, mean in means.items():
        values = torch.linalg.svd(mean).S
        p = values / values.sum()
        found[name] = torch.exp(torch.special.entr(p).sum())
    return found


def gram_naive(model: nn.Module, batches: list[Batch]) -> Arrays:
    """GARD's definition: keep every batch's gradient, then `C_ab = <G_a, G_b> / M`."""
    layers = _targets(model)
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    for batch in batches:
        for name, gradient in _autograd(model, batch, layers).items():
            kept[name].append(gradient)
    found = {}
    for name, gradients in kept.items():
        grams = [[torch.sum(a * b, dtype=torch.float64) for b in gradients] for a in gradients]
        found[name] = torch.stack([torch.stack(row) for row in grams]) / len(batches)
    return found


def _rankwise(
    engine: rw.profiling.Engine, statistic: rw.profiling.Statistic
) -> Callable[[nn.Module, list[Batch]], Arrays]:
    def measure(model: nn.Module, batches: list[Batch]) -> Arrays:
        profile = rw.profile_gradients(
            model,
            batches,
            batches=len(batches),
            statistics=(statistic,),
            engine=engine,
            progress=False,
        )
        if profile.provenance.engine != engine:
            raise RuntimeError(f"{engine} gave way to {profile.provenance.engine}")
        if profile.gram is not None:
            return dict(profile.gram)
        return {name: torch.tensor(gid) for name, gid in profile.gid.items()}

    return measure


WAYS: dict[str, Callable[[nn.Module, list[Batch]], Arrays]] = {
    "released": released,
    "hooks": _rankwise("hooks", "mean"),
    "sweep": _rankwise("sweep", "mean"),
    "gram-naive": gram_naive,
    "gram-sweep": _rankwise("sweep", "gram"),
}


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> None:
    """Load, warm up, run one way, and print what it cost."""
    way, count, size, out = sys.argv[1:]
    batches, model = text_batches(int(count), int(size)), frozen_model()
    with torch.no_grad():  # every page of the weights is read once
        model(input_ids=batches[0]["input_ids"][:1, :8])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory("VmRSS")
    started = time.perf_counter()
    found = WAYS[way](model, batches)
    seconds = time.perf_counter() - started
    extra = _memory("VmHWM") - before
    save_file(found, out)
    print(json.dumps({"seconds": seconds, "extra_bytes": extra}))


if __name__ == "__main__":
    main()
