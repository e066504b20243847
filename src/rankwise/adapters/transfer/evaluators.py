"""Three ways to evaluate a transfer function on many entries, and its derivatives with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.adapters.transfer.bases import BASES, ParameterGradients, Transfer

Adjoint = Callable[[Tensor], ParameterGradients]
"""From the gradient by an evaluator's coefficients to that by the function's parameters."""


class Evaluator(ABC):
    """Evaluates f; made for one call, because it gathers the gradients of the parameters."""

    @abstractmethod
    def value(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`f(u)`, a new tensor."""

    @abstractmethod
    def backward(
        self, u: Float[Tensor, "*shape"], upstream: Float[Tensor, "*shape"]
    ) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """`f(u)` and `f'(u)`; adds `sum upstream df(u)/dtheta` to the parameters' gradients."""

    @abstractmethod
    def gradients(self) -> ParameterGradients:
        """What the calls of `backward` added up to, in fp64."""


class Direct(Evaluator):
    """By the formulas, in fp64, entry by entry and function by function."""

    BLOCK = 2**18
    """Entries times basis functions at a time: some temporaries of 2 MiB."""

    def __init__(self, f: Transfer, dtype: torch.dtype) -> None:
        self.f, self.dtype, self.basis = f, dtype, BASES[f.basis]
        self.total: list[Tensor | None] = [None, None, None]

    def _chunks(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        size = max(1, self.BLOCK // len(self.f.amplitude))
        return list(zip(*(t.reshape(-1).split(size) for t in tensors), strict=True))

    def value(self, u: Tensor) -> Tensor:
        """`f(u)`."""
        parts = [self.basis.value(chunk.double(), self.f) for (chunk,) in self._chunks(u)]
        return torch.cat(parts).reshape(u.shape).to(self.dtype)

    def backward(self, u: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """`f(u)` and `f'(u)`."""
        values, slopes = [], []
        for chunk, weight in self._chunks(u, upstream):
            wide = chunk.double()
            values.append(self.basis.value(wide, self.f))
            slopes.append(self.basis.slope(wide, self.f))
            parts = self.basis.gradients(wide, weight.double(), self.f)
            self.total = [
                part if total is None or part is None else total + part
                for total, part in zip(self.total, parts, strict=True)
            ]
        return (
            torch.cat(values).reshape(u.shape).to(self.dtype),
            torch.cat(slopes).reshape(u.shape).to(self.dtype),
        )

    def gradients(self) -> ParameterGradients:
        """The gradients gathered so far."""
        amplitude, bandwidth, grid = self.total
        assert amplitude is not None
        return ParameterGradients(amplitude, bandwidth, grid)


class Powers(Evaluator):
    """A polynomial in powers of `v = scale u`, `|v| <= 1`."""

    def __init__(
        self, coefficients: Tensor, scale: float, adjoint: Adjoint, dtype: torch.dtype
    ) -> None:
        degrees = torch.arange(len(coefficients), device=coefficients.device)
        self.coefficients = coefficients.to(dtype)
        # of f'(u) in the same powers; the last is 0
        self.slopes = (coefficients * degrees * scale).roll(-1).to(dtype)
        self.scale, self.adjoint = scale, adjoint
        self.moments = torch.zeros_like(coefficients)
        self.rows: Tensor | None = None

    def value(self, u: Tensor) -> Tensor:
        """`f(u)` by Horner's rule, one pass over the entries a degree."""
        v = u * self.scale
        *rest, last = self.coefficients.unbind()
        result = torch.full_like(v, float(last))
        for coefficient in reversed(rest):
            torch.addcmul(coefficient, result, v, out=result)
        return result

    def backward(self, u: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """`f(u)`, `f'(u)` and the moments from one set of powers, kept by rows."""
        rows = self._powers(u)
        value, slope = torch.empty_like(u), torch.empty_like(u)
        torch.mv(rows.T, self.coefficients, out=value.view(-1))
        torch.mv(rows.T, self.slopes, out=slope.view(-1))
        # a matrix-vector product would add thousands of terms one after the other; `sum` adds them
        # in pairs and keeps two digits more where they cancel
        sums = rows.mul_(upstream.reshape(-1)).sum(dim=1)
        self.moments += sums
        return value, slope

    def _powers(self, u: Tensor) -> Tensor:
        count = len(self.coefficients)
        if self.rows is None or self.rows.shape[1] != u.numel():
            self.rows = torch.empty(count, u.numel(), dtype=u.dtype, device=u.device)
        self.rows[0] = 1
        power = first = torch.mul(u.reshape(-1), self.scale, out=self.rows[1])
        for row in self.rows[2:].unbind():
            power = torch.mul(power, first, out=row)
        return self.rows

    def gradients(self) -> ParameterGradients:
        """The gradients gathered so far."""
        return self.adjoint(self.moments)


class Cells(Evaluator):
    """Cubics on equal cells: with `s = scale u + shift`, in `s - floor(s)` on cell `floor(s)`.

    The cell and its variable are found in fp64: in fp32 the whole part of s would cost the
    fraction its digits.
    """

    def __init__(
        self,
        table: Float[Tensor, "4 cells"],
        scale: float,
        shift: float,
        adjoint: Adjoint,
        dtype: torch.dtype,
    ) -> None:
        self.table = table.to(dtype).contiguous()
        self.scale, self.shift, self.adjoint = scale, shift, adjoint
        self.moments = torch.zeros_like(table)

    def _locate(self, u: Tensor) -> tuple[Tensor, Tensor]:
        cells = self.table.shape[1]
        s = u.reshape(-1).double().mul_(self.scale).add_(self.shift).clamp_(0, cells)
        index = s.long().clamp_(max=cells - 1)
        return index, (s - index).to(u.dtype)

    def value(self, u: Tensor) -> Tensor:
        """`f(u)`."""
        index, t = self._locate(u)
        c0, c1, c2, c3 = (row.index_select(0, index) for row in self.table)
        return c3.mul_(t).add_(c2).mul_(t).add_(c1).mul_(t).add_(c0).view(u.shape)

    def backward(self, u: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """`f(u)`, `f'(u)` and the moments of every cell."""
        index, t = self._locate(u)
        c0, c1, c2, c3 = (row.index_select(0, index) for row in self.table)
        # Horner's rule for the cubic and, one step behind, for its derivative
        inner = torch.addcmul(c2, c3, t)
        outer = torch.addcmul(c1, inner, t)
        slope = torch.addcmul(outer, torch.addcmul(inner, c3, t), t)
        value = torch.addcmul(c0, outer, t)
        weight, wide = upstream.reshape(-1).double(), t.double()
        for m, total in enumerate(self.moments):
            if m:
                weight = weight * wide
            total += torch.bincount(index, weight, minlength=len(total))
        return value.view(u.shape), slope.mul_(self.scale).view(u.shape)

    def gradients(self) -> ParameterGradients:
        """The gradients gathered so far."""
        return self.adjoint(self.moments)
