"""Streaming accumulators over (input, output gradient) pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.errors import ProfileError
from rankwise.profiling.precision import autocast_off
from rankwise.profiling.staging import (
    GradientSum,
    KeptGradients,
    MeanGradient,
    TokenGradient,
    wide_dtype,
)

_ENTRIES = 2**18
"""Entries of the weight that a sensitivity looks at at a time, about a core's cache."""
Statistic = Literal["mean", "gram", "fisher", "convergence"]
"""What a profile can hold: see `profile_gradients`."""


Stream = GradientSum | KeptGradients
"""What a module's batch gradients go into."""


@dataclass(frozen=True)
class ModuleResult:
    """What the batches said about one module.

    Attributes:
        gradient: Mean gradient `(d_out, d_in)`, fp32 or wider, or the tokens that make it where
            they are few (see `dense`); None if no batch reached it.
        rows: Input rows (tokens, padding included) it saw.
        batches: Batches that reached it.
        zero_batches: Those of them whose gradient was exactly zero.
        gram: `C_ab = <G_a, G_b> / M` over all M batches, fp64 on the CPU, if asked for.
        fisher: Mean over samples and entries of squared per-sample gradients, if asked for.
        gids: GID of the mean over the first 1, 2, 4, ..., N batches, if asked for.
    """

    gradient: MeanGradient | None
    rows: int
    batches: int
    zero_batches: int
    gram: Float[Tensor, "m m"] | None
    fisher: float | None
    gids: list[float]


@dataclass
class _Module:
    stream: Stream
    rows: int = 0
    batches: int = 0
    zero_batches: int = 0
    square_sum: float = 0.0  # of per-sample gradients, over samples and entries
    entries: int = 0  # of the weight


@dataclass
class _Staged:
    """What the running batch will add to a module if it counts."""

    rows: int = 0
    is_zero: bool = True
    uses: list[tuple[Tensor, Tensor]] | None = None


class _Input(NamedTuple):
    """The input seen last, which later modules may share."""

    x: Tensor
    version: int
    flat: Tensor
    peak: float

    def is_same(self, x: Tensor) -> bool:
        """Whether x is the memory looked at, unchanged since; views count its changes together."""
        return (
            x.data_ptr() == self.x.data_ptr()
            and x._version == self.version
            and (x.shape, x.stride()) == (self.x.shape, self.x.stride())
            and (x.dtype, x.device) == (self.x.dtype, self.x.device)
        )


class StreamingStatistics:
    """The statistics of several modules, batch by batch.

    Mean gradient: `G = sum_b n_b G_b / sum_b n_b` with `G_b = sum_t g_t x_t'` the gradient of the
    mean loss of batch b over its `n_b` labelled items (RaLoRA Algorithm 1, weighted so that unequal
    batches count by their items). Gram matrix: `<G_a, G_b> / M`, each batch as it is (GARD 3.2).
    Products and sums are fp32 or wider, under autocasting too: in fp16 a gradient of 1e-4 loses
    most of its entries.

    A batch with a NaN or an infinity anywhere counts for no module. What that needs is held per
    module until the batch is over: the smaller of its input and output gradient and one matrix of
    the weight's size; with `"fisher"` the input and output gradient in any case. While all batches
    together have few tokens (see `GradientSum`), their inputs and output gradients are held to the
    end instead of the sum, one and a half times the weight's size at most.
    """

    def __init__(
        self,
        modules: Iterable[str],
        wanted: Iterable[Statistic] = (),
        make_stream: Callable[[str], Stream] | None = None,
    ) -> None:
        self._wanted = frozenset(wanted)
        make = make_stream or self._make_stream
        self._modules = {name: _Module(make(name)) for name in modules}
        self._samples = 0
        self._staged: dict[str, _Staged] = {}
        self._items = 0
        self._scale = 1.0
        self._batch_rows = 0
        self._spoiled: str | None = None
        self._last_input: _Input | None = None

    def _make_stream(self, _name: str) -> Stream:
        convergence = "convergence" in self._wanted
        if "gram" in self._wanted:
            return KeptGradients(convergence=convergence)
        return GradientSum(convergence=convergence)

    def begin_batch(self, items: int, rows: int, scale: float = 1.0) -> None:
        """Start a batch of `rows` samples whose loss is a mean over `items` labelled items.

        `scale` is what that loss was multiplied by before its backward pass.
        """
        self._items = items
        self._scale = scale
        self._batch_rows = rows
        self._staged = {}
        self._spoiled = None

    @autocast_off()
    def consume(
        self, name: str, x: Float[Tensor, "*rows d_in"], g: Float[Tensor, "*rows d_out"]
    ) -> None:
        """Add one use of a module; a module used several times in a forward adds up."""
        if self._spoiled is not None or not x.numel():
            return
        if self._scale != 1:
            g = g.to(wide_dtype(g.dtype)) / self._scale
        seen, flat_g = self._input(x), g.reshape(-1, g.shape[-1])
        largest = seen.peak * _peak(g) * len(flat_g) * self._items
        if not largest < torch.finfo(wide_dtype(x.dtype)).max:  # a NaN, an infinity, an overflow
            self._spoiled = name
            return
        staged = self._staged.setdefault(name, _Staged())
        staged.rows += len(flat_g)
        if "fisher" in self._wanted:
            _check_samples(name, x, self._batch_rows)
            staged.uses = [*(staged.uses or ()), (x, g)]
        if largest:
            staged.is_zero = False
            self._modules[name].stream.add(seen.flat, flat_g, self._items)

    def _input(self, x: Tensor) -> _Input:
        """Modules that share their input follow each other: it is looked at once."""
        if self._last_input is None or not self._last_input.is_same(x):
            self._last_input = _Input(x, x._version, x.reshape(-1, x.shape[-1]), _peak(x))
        return self._last_input

    @property
    def spoiled(self) -> str | None:
        """The module for whose sake the running batch is going to be dropped."""
        return self._spoiled

    def spoil(self, name: str) -> None:
        """Let the running batch be dropped, for the sake of `name` unless a module was first."""
        self._spoiled = self._spoiled or name

    @autocast_off()
    def end_batch(self) -> str | None:
        """Let the batch count, or drop it and return the module that holds a NaN or infinity."""
        self._last_input = None
        if self._spoiled is not None:
            self.drop_batch()
            return self._spoiled
        for name, module in self._modules.items():
            module.stream.keep(self._items)
            staged = self._staged.pop(name, None)
            if staged is None:
                continue
            module.rows += staged.rows
            module.batches += 1
            module.zero_batches += staged.is_zero
            if staged.uses is not None:
                x, g = staged.uses[0]
                module.entries = x.shape[-1] * g.shape[-1]
                squares = sample_square_norms(staged.uses)
                module.square_sum += float(squares.sum()) * self._items**2
        self._samples += self._batch_rows
        return None

    def drop_batch(self) -> None:
        """Forget the batch for every module."""
        self._last_input = None
        self._staged = {}
        for module in self._modules.values():
            module.stream.drop()

    def arrays(self) -> dict[str, Tensor]:
        """Everything counted so far, for a checkpoint between two batches."""
        found = {
            f"{name}:{key}": tensor
            for name, module in self._modules.items()
            for key, tensor in module.stream.arrays().items()
        }
        counts = [[m.rows, m.batches, m.zero_batches] for m in self._modules.values()]
        return found | {"counts": torch.tensor(counts), "samples": torch.tensor(self._samples)}

    def restore(self, arrays: Mapping[str, Tensor]) -> None:
        """Go on from what `arrays` of statistics of the same modules gave; not for `"fisher"`."""
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in self._modules}
        for key, tensor in arrays.items():
            name, _, part = key.rpartition(":")
            if name:
                parts[name][part] = tensor
        self._samples = int(arrays["samples"])
        for (name, module), counts in zip(
            self._modules.items(), arrays["counts"].tolist(), strict=True
        ):
            module.stream.restore(parts[name])
            module.rows, module.batches, module.zero_batches = counts

    @autocast_off()
    def pop(self, name: str) -> ModuleResult:
        """The statistics of a module, giving up its memory."""
        module = self._modules.pop(name)
        gradient, gram, gids = module.stream.finish()
        fisher = None
        if "fisher" in self._wanted:
            fisher = module.square_sum / (max(self._samples, 1) * max(module.entries, 1))
        return ModuleResult(
            gradient, module.rows, module.batches, module.zero_batches, gram, fisher, gids
        )


def sample_square_norms(uses: Sequence[tuple[Tensor, Tensor]]) -> Float[Tensor, " samples"]:
    """`||sum_t g_t x_t'||_F^2` of every sample, over all uses of a module, in fp64.

    Through the products of token pairs, `sum_ts (x_t . x_s)(g_t . g_s)`, where samples are short,
    else sample by sample.

    Args:
        uses: Pairs `x (samples, ..., d_in)`, `g (samples, ..., d_out)`.
    """
    samples = len(uses[0][0])
    wide = wide_dtype(uses[0][0].dtype)
    x = torch.cat([x.reshape(samples, -1, x.shape[-1]) for x, _ in uses], 1).to(wide)
    g = torch.cat([g.reshape(samples, -1, g.shape[-1]) for _, g in uses], 1).to(wide)
    peak_x, peak_g = _peak(x), _peak(g)
    if not peak_x * peak_g:
        return torch.zeros(samples, dtype=torch.float64)
    x, g = x / peak_x, g / peak_g  # squares of small gradients underflow
    tokens, d_in, d_out = x.shape[1], x.shape[2], g.shape[2]
    if tokens * (d_in + d_out) < d_in * d_out:
        squares = ((x @ x.mT) * (g @ g.mT)).sum((1, 2)).clamp_min(0).cpu().double()
    else:
        norms = [torch.linalg.matrix_norm(g[i].T @ x[i]) for i in range(samples)]
        squares = torch.stack(norms).cpu().double() ** 2
    return squares * (peak_x * peak_g) ** 2


def sensitivity(weight: Float[Tensor, "d_out d_in"], gradient: MeanGradient) -> float:
    """Loss sensitivity `I = mean(|W * G|)`, elementwise (RaLoRA Eq. 5).

    The unit is loss per weight: to first order, the loss changes by at most `I` times the number
    of weights when every weight is set to zero. A few rows are looked at at a time, so that a
    gradient of few tokens is never formed.
    """
    d_out, d_in = weight.shape
    total = 0.0
    step = max(_ENTRIES // d_in, 1)
    for start in range(0, d_out, step):
        end = min(start + step, d_out)
        if isinstance(gradient, TokenGradient):
            rows = gradient.rows(start, end)
        else:
            rows = gradient[start:end]
        rows = rows.to(weight.device)
        products = weight[start:end].to(rows.dtype) * rows
        total += float(products.abs_().sum(dtype=torch.float64))
    return total / (d_out * d_in)


def _peak(tensor: Tensor) -> float:
    """The largest absolute value; NaN if there is one, in a single pass without a copy."""
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high))


def _check_samples(name: str, x: Tensor, rows: int) -> None:
    if x.ndim < 2 or x.shape[0] != rows:
        raise ProfileError(
            f"statistics='fisher': the input of module {name} has shape {tuple(x.shape)} in a "
            f"batch of {rows} samples; its first axis must be the samples. Leave the module out "
            "of targets, or 'fisher' out of statistics."
        )
