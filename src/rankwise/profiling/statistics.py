"""Streaming accumulators over (input, output gradient) pairs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.errors import ProfileError


class MeanGradient:
    """Mean of `dL/dW` over all labelled items of all batches, one fp32 matrix per module.

    `G = sum_b n_b G_b / sum_b n_b` with `G_b = sum_t g_t x_t'` the gradient of the mean loss of
    batch b over its `n_b` labelled items (RaLoRA Algorithm 1, weighted so that unequal batches
    count by their items). Products and sums are fp32 or wider: in fp16 a gradient of 1e-4 loses
    most of its entries.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self._sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = dict.fromkeys(modules, 0)
        """Input rows (tokens) seen per module."""
        self.batches: dict[str, int] = dict.fromkeys(self.rows, 0)
        """Batches that reached each module."""
        self.total_count = 0
        """Labelled items over all batches."""
        self._count = 0
        self._index = -1
        self._reached: set[str] = set()

    def begin_batch(self, count: int, *, index: int) -> None:
        """Start a batch, the loader's `index`-th, whose loss is a mean over `count` items."""
        self._count = count
        self._index = index
        self._reached.clear()

    def consume(self, name: str, x: Float[Tensor, "t d_in"], g: Float[Tensor, "t d_out"]) -> None:
        """Add one use of a module; a module used several times in a forward adds up.

        Raises:
            ProfileError: The input or the gradient holds a NaN or an infinity.
        """
        if not (torch.isfinite(g).all() and torch.isfinite(x).all()):
            raise ProfileError(
                f"non-finite gradient in module {name}, batch {self._index}: check that batch, or "
                "profile in float32 or bfloat16 instead of float16."
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        if name not in self._sums:
            self._sums[name] = torch.zeros(g.shape[1], x.shape[1], dtype=wide, device=g.device)
        self._sums[name].addmm_(g.to(wide).T, x.to(wide), alpha=self._count)
        self.rows[name] += x.shape[0]
        self._reached.add(name)

    def end_batch(self) -> None:
        """Count the batch for every module it reached."""
        self.total_count += self._count
        for name in self._reached:
            self.batches[name] += 1

    def pop(self, name: str) -> Float[Tensor, "d_out d_in"] | None:
        """The mean gradient of a module, giving up its memory; None if no batch reached it."""
        total = self._sums.pop(name, None)
        return None if total is None else total.div_(self.total_count)


def sensitivity(
    weight: Float[Tensor, "d_out d_in"], gradient: Float[Tensor, "d_out d_in"]
) -> float:
    """Loss sensitivity `I = mean(|W * G|)`, elementwise (RaLoRA Eq. 5).

    The unit is loss per weight: to first order, the loss changes by at most `I` times the number
    of weights when every weight is set to zero.
    """
    return float((weight.to(gradient.dtype) * gradient).abs().mean(dtype=torch.float64))
