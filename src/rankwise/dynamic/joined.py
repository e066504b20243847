"""Batch gradients over several workers, joined: what one process sees of the joined batches.

Every worker backpropagates its part of a batch, and what trains is the mean of the parts. So the
gradient of the joined batch b is `G_b = (1/W) sum_w G_bw`, and the Gram matrix is theirs,
`C_ab = <G_a, G_b> / M`. Cross products of the parts would need every part of every worker in one
place; sums of rows need `2 (W - 1) / W` of a gradient's size on the wire whatever W is, and a block
of rows of all batches in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.dynamic import workers
from rankwise.profiling.staging import (
    BatchGradient,
    GradientSum,
    KeptGradients,
    MeanGradient,
    TokenGradient,
)
from rankwise.targets import LinearShape

_BLOCK = 2**22
"""Entries of a sum that travel at a time."""


class JoinedSum(GradientSum):
    """A running sum of which every worker holds a part."""

    def __init__(self, shape: LinearShape, like: Tensor) -> None:
        super().__init__(convergence=False)
        self._nothing = like.new_zeros(1, 1).expand(shape.d_out, shape.d_in)

    def join_(self) -> None:
        """Hold the mean over the workers of what each has summed up."""
        total = self._total
        if total is None:
            total = TokenGradient(tuple(self._kept)).dense() if self._kept else self._nothing
        self._total, self._kept = _joined(total), []

    def finish(self) -> tuple[MeanGradient | None, Tensor | None, list[float]]:
        """The mean gradient over the joined batches; no Gram matrix, no GIDs."""
        self.join_()
        return super().finish()


class JoinedGradients(KeptGradients):
    """Batch gradients of which every worker keeps its part."""

    def __init__(self, shape: LinearShape, like: Tensor) -> None:
        super().__init__(convergence=False)
        self._shape = (shape.d_out, shape.d_in)
        self._like = like
        self._joined = 0  # how many of the first are the same everywhere

    def join_(self) -> None:
        """Hold the joined batches instead of the parts."""
        d_out, d_in = self._shape_of_all
        for b in range(self._joined, len(self._kept)):
            rows = _Part(self._kept[b], self._like, d_in).own(0, d_out)
            self._kept[b] = BatchGradient.from_arrays({"product": _joined(rows)})
        self._joined = len(self._kept)

    def finish(self) -> tuple[Tensor | None, Tensor | None, list[float]]:
        """Mean and Gram matrix of the joined batches; no GIDs."""
        d_in = self._shape_of_all[1]
        parts = (_Part(kept, self._like, d_in) for kept in self._kept[self._joined :])
        self._kept = [*self._kept[: self._joined], *parts]
        return super().finish()

    def restore(self, arrays: dict[str, Tensor]) -> None:  # type: ignore[override]
        """Go on from what `arrays` gave after `join_`, of as many workers as there were."""
        super().restore(arrays)
        self._joined = len(self._kept)

    @property
    def _shape_of_all(self) -> tuple[int, int]:
        assert self._shape is not None
        return self._shape


class _Part(BatchGradient):
    """A batch's gradient of which every worker has a part; its rows are asked for by all."""

    def __init__(self, own: BatchGradient, like: Tensor, d_in: int) -> None:
        super().__init__()
        self._own = own
        self._like = like
        self._d_in = d_in

    @property
    def is_empty(self) -> bool:
        return False  # the other workers may have what this one lacks

    def own(self, start: int, end: int) -> Tensor:
        if self._own.is_empty:
            return self._like.new_zeros(end - start, self._d_in)
        return self._own.rows(start, end)

    def rows(self, start: int, end: int) -> Tensor:
        return workers.mean(self.own(start, end))


def _joined(matrix: Tensor) -> Tensor:
    """The mean over the workers, a few rows at a time."""
    step = max(_BLOCK // matrix.shape[1], 1)
    return torch.cat([workers.mean(rows) for rows in matrix.split(step)])
