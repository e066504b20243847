"""Three ways to evaluate a transfer function on many entries, and its derivatives with it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.adapters.transfer.bases import ParameterGradients, Transfer
from rankwise.adapters.transfer.scratch import scratch

Adjoint = Callable[[Tensor], ParameterGradients]
"""From the gradient by an evaluator's coefficients to that by the function's parameters."""


class Evaluator(ABC):
    """Evaluates f in place; made for one call, because it gathers the gradients of the parameters.

    Attributes:
        scale: Entries come multiplied by it, because factors of U are scaled more cheaply than U.
        block: Entries at a time. One less than torch gives to a second thread: the operations of a
            block are too short to wait for another thread between any two of them, and their
            temporaries stay in a core's own cache.
    """

    scale: float = 1.0
    block: int = 2**15 - 1

    @abstractmethod
    def fresh(self) -> Self:
        """The same function with no gradients gathered yet."""

    @abstractmethod
    def value_(
        self, v: Float[Tensor, "rows n"], *, base: Tensor | None = None, scale: float = 1.0
    ) -> None:
        """Replace `v` by `base + scale f(u)`."""

    @abstractmethod
    def backward_(
        self,
        v: Float[Tensor, "rows n"],
        upstream: Float[Tensor, "rows n"],
        *,
        base: Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        """Replace `v` by `upstream f'(u)`, and `upstream` by `base + scale f(u)`.

        Adds `sum upstream df(u)/dtheta` to the parameters' gradients.
        """

    @abstractmethod
    def gradients(self) -> ParameterGradients:
        """What the calls of `backward_` added up to, in fp64."""


class _Moments(Evaluator):
    """Gathers moments, from which the adjoint of its coefficients makes the gradients."""

    moments: Tensor
    adjoint: Adjoint

    def fresh(self) -> Self:
        """The same function with no gradients gathered yet."""
        new = copy.copy(self)
        new.moments = torch.zeros_like(self.moments)
        return new

    def gradients(self) -> ParameterGradients:
        """The gradients gathered so far."""
        return self.adjoint(self.moments)


def _write(values: Tensor, base: Tensor | None, scale: float, out: Tensor) -> None:
    """`out = base + scale values`, rounded once."""
    if base is None:
        torch.mul(values, scale, out=out)
    else:
        torch.add(base, values, alpha=scale, out=out)


class Direct(Evaluator):
    """By the formulas, in fp64, entry by entry and function by function."""

    BLOCK = 2**18
    """Entries times basis functions at a time: some temporaries of 2 MiB."""

    def __init__(self, f: Transfer, dtype: torch.dtype) -> None:
        self.f, self.dtype = f, dtype
        self.total: list[Tensor | None] = [None, None, None]

    def fresh(self) -> Self:
        """The same function with no gradients gathered yet."""
        return type(self)(self.f, self.dtype)

    def _chunks(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        size = max(1, self.BLOCK // len(self.f.amplitude))
        return list(zip(*(t.double().split(size) for t in tensors), strict=True))

    def value_(self, v: Tensor, *, base: Tensor | None = None, scale: float = 1.0) -> None:
        """`base + scale f(u)`."""
        parts = [self.f.value(chunk) for (chunk,) in self._chunks(v.reshape(-1))]
        _write(torch.cat(parts).to(self.dtype).view_as(v), base, scale, v)

    def backward_(
        self, v: Tensor, upstream: Tensor, *, base: Tensor | None = None, scale: float = 1.0
    ) -> None:
        """`upstream f'(u)` and `base + scale f(u)`."""
        values, slopes = [], []
        for chunk, weight in self._chunks(v.reshape(-1), upstream.reshape(-1)):
            values.append(self.f.value(chunk))
            slopes.append(weight * self.f.slope(chunk))
            parts = self.f.gradients(chunk, weight)
            self.total = [
                part if total is None or part is None else total + part
                for total, part in zip(self.total, parts, strict=True)
            ]
        v.copy_(torch.cat(slopes).view_as(v))
        _write(torch.cat(values).to(self.dtype).view_as(v), base, scale, upstream)

    def gradients(self) -> ParameterGradients:
        """The gradients gathered so far."""
        amplitude, bandwidth, grid = self.total
        assert amplitude is not None
        return ParameterGradients(amplitude, bandwidth, grid)


class Polynomial(_Moments):
    """A polynomial of `v = u / R`, `|v| <= 1`.

    Args:
        powers: Its coefficients.
        chebyshev: Its coefficients and those of its derivative by u, in Chebyshev polynomials.
        radius: R.
        adjoint: From the moments `sum upstream T_j(v)`.
        dtype: Of entries and results.
    """

    def __init__(
        self,
        powers: Tensor,
        chebyshev: tuple[Tensor, Tensor],
        radius: float,
        adjoint: Adjoint,
        dtype: torch.dtype,
    ) -> None:
        self.powers = powers.to(dtype)
        # the rows' signs are +, +, -, -, +, ...: then each is the one before the last plus or minus
        # 2 v times the last, which is one operation
        order = torch.arange(len(powers), device=powers.device)
        self.signs = 1.0 - 2.0 * (order % 4 >= 2).double()
        self.chebyshev = chebyshev
        self.signed = (torch.stack(chebyshev) * self.signs).to(dtype)
        self.scale, self.adjoint = 1 / radius, adjoint
        self.moments = torch.zeros_like(powers)
        # the rows, two results and what they are written to fill half of a cache of 2 MiB
        self.block = min(self.block, 2**18 // (len(powers) + 5))
        self._rows: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def _room(self, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rows for the `T_j(v)`, `T_0` done; in one and one by one, which takes time to cut."""
        if self._rows is None or self._rows[0].shape[1] != v.numel():
            rows = scratch.matrix(2, len(self.powers), v.numel(), v)
            rows[0] = 1
            self._rows = rows, rows.unbind()
        return self._rows

    def value_(self, v: Tensor, *, base: Tensor | None = None, scale: float = 1.0) -> None:
        """`base + scale f(u)` by Horner's rule, one pass over the entries a degree."""
        *rest, before, last = self.powers.unbind()
        result = torch.addcmul(before, v, last)
        for coefficient in reversed(rest):
            torch.addcmul(coefficient, result, v, out=result)
        _write(result, base, scale, v)

    def backward_(
        self, v: Tensor, upstream: Tensor, *, base: Tensor | None = None, scale: float = 1.0
    ) -> None:
        """`upstream f'(u)`, `base + scale f(u)` and the moments, from the `T_j(v)` in turn."""
        flat, (rows, (before, first, *others)) = upstream.reshape(-1), self._room(v)
        first.copy_(v.reshape(-1))
        sums, now, two = [flat.sum(), torch.dot(first, flat)], first, -2.0
        for row in others:
            torch.addcmul(before, now, first, value=two, out=row)
            # not one product for all of them: it would add thousands of terms one by one
            sums.append(torch.dot(row, flat))
            before, now, two = now, row, -two
        self.moments += torch.stack(sums) * self.signs
        value, slope = (self.signed @ rows).view(2, *v.shape)
        torch.mul(slope, upstream, out=v)
        _write(value, base, scale, upstream)


class Cells(_Moments):
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
        self.steps, self.shift, self.adjoint = scale, shift, adjoint
        self.moments = torch.zeros_like(table)

    def _locate(self, u: Tensor) -> tuple[Tensor, Tensor]:
        cells = self.table.shape[1]
        s = u.double().mul_(self.steps).add_(self.shift).clamp_(0, cells)
        index = s.long().clamp_(max=cells - 1)
        return index, (s - index).to(u.dtype)

    def value_(self, v: Tensor, *, base: Tensor | None = None, scale: float = 1.0) -> None:
        """`base + scale f(u)`."""
        index, t = self._locate(v.reshape(-1))
        c0, c1, c2, c3 = (row.index_select(0, index) for row in self.table)
        values = c3.mul_(t).add_(c2).mul_(t).add_(c1).mul_(t).add_(c0)
        _write(values.view_as(v), base, scale, v)

    def backward_(
        self, v: Tensor, upstream: Tensor, *, base: Tensor | None = None, scale: float = 1.0
    ) -> None:
        """`upstream f'(u)`, `base + scale f(u)` and the moments of every cell."""
        index, t = self._locate(v.reshape(-1))
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
        torch.mul(slope.mul_(self.steps).view_as(v), upstream, out=v)
        _write(value.view_as(v), base, scale, upstream)
