"""How much memory profiling will need beyond the model, before it starts.

By formula, from the targets' shapes alone; `b` bytes an activation, `T` tokens a batch, `M`
batches, `(d_in, d_out)` of every target, `h` the hidden size, `V` the vocabulary, `L` layers:

- activations: the graph of one batch, `b T sum(d_in + d_out)`: the input and the output of every
  target, which is what else is saved in a transformer layer, too, to some percent;
- logits: `3 * 4 T V`: their log-softmax and two gradients, fp32;
- sums: `4 sum(d_in d_out)`, of all modules by hooks, of one layer by the sweep;
- staged: what holds back one batch, per module the smaller of its input and output gradient,
  `b T (d_in + d_out)`, and one more sum, `4 d_in d_out`; with `"gram"`, the batches kept: M times
  as much, instead of sums;
- layer inputs (sweep): `b M T h (L + 1)`;
- spectra: fp64 copies of one module's gradient and, `k = min(d_in, d_out)`, of its smaller side's
  Gram matrix: with what LAPACK needs for eigenvectors, `8 (2 d_in d_out + 5 k^2)`, and with the
  projection on them, `8 (3 d_in d_out + 3 k^2)`, whichever is more.

The total is the largest of what lives at one time: a backward pass, its end, a spectrum. The
sweep is compared with hooks on one sample, which needs the activations and logits of that. Where it
differentiates the loss in chunks, the logits of a batch are fewer than the formula says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from rankwise.profiling.batches import check_statistics
from rankwise.profiling.staging import prefixes
from rankwise.targets import LinearShape, find_targets, layer_position

_FP32 = 4
_FP64 = 8
_LOGITS = 3
_ROW_BLOCK = 3 * 2**22 * _FP32
"""The rows of all batches that a Gram matrix is summed over, scaled, and their sizes."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that profiling needs beyond the model; not all of them at the same time.

    Attributes:
        engine: The engine it is for.
        activations: Graph of one batch.
        logits: Logits of one batch and their gradients.
        layer_inputs: Inputs of every layer for every batch (sweep).
        sums: Sums of gradients.
        staged: What holds back one batch until it counts.
        gram: Batch gradients kept for Gram matrices.
        spectra: Workspace of one module's spectrum.
        gradients: Mean gradients kept in the profile.
        total: The most that lives at one time.
    """

    engine: Literal["hooks", "sweep"]
    activations: int
    logits: int
    layer_inputs: int
    sums: int
    staged: int
    gram: int
    spectra: int
    gradients: int
    total: int

    def __str__(self) -> str:
        parts = {
            field.name.replace("_", " "): getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("engine", "total")
        }
        shown = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
        return f"about {_size(self.total)} beside the model ({self.engine}): {shown}"

    def warning(self, available: int | None) -> str | None:
        """What to change if that is more than there is; None if it fits or is not known."""
        if available is None or self.total <= available:
            return None
        remedies = {
            "activations": "a smaller batch or shorter sequences",
            "logits": "a smaller batch or shorter sequences",
            "layer_inputs": "fewer batches",
            "sums": "engine='sweep' or fewer targets",
            "staged": "engine='sweep' or fewer targets",
            "gram": "engine='sweep' or fewer batches"
            if self.engine == "hooks"
            else "fewer batches",
            "spectra": "fewer targets",
            "gradients": "out=, which writes gradients one by one, or not keeping them",
        }
        largest = max(remedies, key=lambda part: getattr(self, part))
        return (
            f"profiling needs about {_size(self.total)} beside the model and {_size(available)} "
            f"are available; most of it is {largest.replace('_', ' ')}: less is needed with "
            f"{remedies[largest]}."
        )


def estimate_memory(
    model: nn.Module,
    targets: str | Sequence[str] = "all-linear",
    *,
    batches: int = 8,
    tokens: int,
    samples: int = 1,
    statistics: Iterable[str] = (),
    engine: Literal["auto", "hooks", "sweep"] = "auto",
    keep_gradients: bool = False,
) -> MemoryEstimate:
    """Estimate what `profile_gradients` needs beyond the model itself, without running anything.

    See the module's text for the formula. It is for transformers in which the targets are most of
    the model, with the attention scores never stored (`sdpa`) and without gradient checkpointing,
    which saves most of the activations.

    Args:
        model: The model; it may be on the meta device.
        targets: As for `profile_gradients`, like the rest.
        batches: M; under several workers, one worker's.
        tokens: Tokens of a batch, padding included.
        samples: Sequences of a batch.
        statistics: What is measured besides the mean.
        engine: `"auto"` as there.
        keep_gradients: Whether gradients are kept in memory; not with `out=`.

    Raises:
        TargetError: The targets match nothing usable.
        ProfileError: An unknown statistic.
    """
    selected = find_targets(model, targets)
    wanted = check_statistics(statistics)
    keeps = "gram" in wanted
    sweeps = engine == "sweep" or (engine == "auto" and keeps)
    b = next(model.parameters()).dtype.itemsize
    layers = [[selected[name] for name in names] for names in _layers(selected)]
    every = [shape for layer in layers for shape in layer]
    activations = b * tokens * sum(shape.rank_cost for shape in every)
    logits = _LOGITS * _FP32 * tokens * _vocabulary(model)
    inputs = b * batches * tokens * _hidden_size(model, every) * (len(layers) + 1)
    held = layers if sweeps else [every]
    sums = 0 if keeps else max(_sums(part) for part in held)
    staged = max(_staged(part, tokens, b) for part in held)
    gram = batches * staged if keeps else 0
    finishing = [
        _finishing(part, gram * _staged(part, tokens, b) // max(staged, 1), batches, wanted)
        for part in held
    ]
    graph = max(b * tokens * sum(s.rank_cost for s in part) for part in held)
    kept = _sums(every) if keep_gradients else 0
    if sweeps:
        compared = (activations + logits) // samples
        in_pass = max(compared, inputs + logits, inputs + graph + (gram or sums))
        ends = inputs + (gram or sums + staged)
    else:
        inputs = 0
        in_pass = (gram or sums) + activations + logits
        ends = gram or sums + staged
    return MemoryEstimate(
        engine="sweep" if sweeps else "hooks",
        activations=activations,
        logits=logits,
        layer_inputs=inputs,
        sums=sums,
        staged=0 if keeps else staged,
        gram=gram,
        spectra=max(map(spectra_bytes, every)),
        gradients=kept,
        total=max(in_pass, ends, inputs + max(finishing)) + kept,
    )


def spectra_bytes(shape: LinearShape) -> int:
    """Workspace of one spectrum: see `rankwise.spectra.singular_values`."""
    matrix, gram = shape.d_in * shape.d_out, shape.max_rank**2
    return _FP64 * max(2 * matrix + 5 * gram, 3 * matrix + 3 * gram)


def available_memory(device: torch.device) -> int | None:
    """Bytes that a process can still get on a device; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [free for free in (_free_of_system(), _free_of_container()) if free is not None]
    return min(found, default=None)


def _layers(names: Iterable[str]) -> list[list[str]]:
    """Names by layer, in model order."""

    def layer(name: str) -> tuple[str, int | None]:
        position = layer_position(name)
        return position.stack, position.index

    return [list(group) for _, group in groupby(names, layer)]


def _sums(shapes: Iterable[LinearShape]) -> int:
    return _FP32 * sum(shape.d_in * shape.d_out for shape in shapes)


def _staged(shapes: Iterable[LinearShape], tokens: int, b: int) -> int:
    total = 0
    for shape in shapes:
        factors, product = tokens * shape.rank_cost, shape.d_in * shape.d_out
        total += b * factors if factors < product else _FP32 * product
    return total


def _finishing(
    shapes: Sequence[LinearShape], gram: int, batches: int, wanted: frozenset[str]
) -> int:
    """The most that lives while modules are finished one by one, giving up their memory."""
    most = 0
    left = gram or _sums(shapes)
    means = len(prefixes(batches)) + 1 if "convergence" in wanted else 2
    for shape in shapes:
        own = _sums([shape])
        work = max(spectra_bytes(shape), 3 * own)  # the latter for the sensitivity
        if gram:
            most = max(most, left + means * own + _ROW_BLOCK)
            left -= gram * shape.rank_cost // sum(s.rank_cost for s in shapes)
            most = max(most, left + own + work)
        else:
            most = max(most, left + work)
            left -= own
    return most


def _vocabulary(model: nn.Module) -> int:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    weight = getattr(head, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else 0


def _hidden_size(model: nn.Module, shapes: Iterable[LinearShape]) -> int:
    size = getattr(getattr(model, "config", None), "hidden_size", None)
    return size if isinstance(size, int) else min(shape.d_in for shape in shapes)


def _free_of_system() -> int | None:
    path = Path("/proc/meminfo")
    if path.is_file():
        for line in path.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _free_of_container() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return max(int(limit) - used, 0) if limit.isdecimal() else None


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
