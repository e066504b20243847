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
    """Evaluates f; made for one call, because it gathers the gradients of the parameters.

    Attributes:
        scale: Entries come multiplied by it, because factors of U are scaled more cheaply than U.
        block: Entries at a time that stay in a core's own cache with all temporaries.
    """

    scale: float = 1.0
    block: int = 2**14

    def room(self, count: int, like: Tensor) -> Tensor:
        """A vector for the next entries; it saves a copy to put them there."""
        return torch.empty(count, dtype=like.dtype, device=like.device)

    @abstractmethod
    def value(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """`f(u)` at `v = scale u`, a new tensor."""

    @abstractmethod
    def backward(
        self, v: Float[Tensor, " n"], upstream: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """`f(u)` and `upstream f'(u)`, new tensors.

        Adds `sum upstream df(u)/dtheta` to the parameters' gradients.
        """

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
        return list(zip(*(t.double().split(size) for t in tensors), strict=True))

    def value(self, v: Tensor) -> Tensor:
        """`f(u)`."""
        parts = [self.basis.value(chunk, self.f) for (chunk,) in self._chunks(v)]
        return torch.cat(parts).to(self.dtype)

    def backward(self, v: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """`f(u)` and `upstream f'(u)`."""
        values, slopes = [], []
        for chunk, weight in self._chunks(v, upstream):
            values.append(self.basis.value(chunk, self.f))
            slopes.append(weight * self.basis.slope(chunk, self.f))
            parts = self.basis.gradients(chunk, weight, self.f)
            self.total = [
                part if total is None or part is None else total + part
                for total, part in zip(self.total, parts, strict=True)
            ]
        return torch.cat(values).to(self.dtype), torch.cat(slopes).to(self.dtype)

    def gradients(self) -> ParameterGradients:
        """The gradients gathered so far."""
        amplitude, bandwidth, grid = self.total
        assert amplitude is not None
        return ParameterGradients(amplitude, bandwidth, grid)


class Polynomial(Evaluator):
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
        self.coefficients, self.slopes = ((c * self.signs).to(dtype) for c in chebyshev)
        self.scale, self.adjoint = 1 / radius, adjoint
        self.moments = torch.zeros_like(powers)
        # the rows, the weight and four results fill half of a cache of 2 MiB
        self.block = 2**18 // (len(powers) + 5)
        self.rows: Tensor | None = None

    def room(self, count: int, like: Tensor) -> Tensor:
        """The row of `T_1(v) = v`."""
        if self.rows is None or self.rows.shape[1] != count:
            shape = (len(self.powers), count)
            self.rows = torch.empty(shape, dtype=like.dtype, device=like.device)
            self.rows[0] = 1
        return self.rows[1]

    def value(self, v: Tensor) -> Tensor:
        """`f(u)` by Horner's rule, one pass over the entries a degree."""
        *rest, before, last = self.powers.unbind()
        result = torch.addcmul(before, v, last)
        for coefficient in reversed(rest):
            torch.addcmul(coefficient, result, v, out=result)
        return result

    def backward(self, v: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """`f(u)`, `upstream f'(u)` and the moments from one set of rows."""
        first = self.room(len(v), v)
        if v.data_ptr() != first.data_ptr():
            first.copy_(v)
        assert self.rows is not None
        for j in range(2, len(self.rows)):
            two = 2.0 if j % 2 else -2.0
            torch.addcmul(self.rows[j - 2], self.rows[j - 1], first, value=two, out=self.rows[j])
        value = torch.mv(self.rows.T, self.coefficients)
        slope = torch.mv(self.rows.T, self.slopes).mul_(upstream)
        # a matrix-vector product would add thousands of terms one after the other; `sum` adds them
        # in pairs and keeps two digits more where they cancel
        sums = self.rows[1:].mul_(upstream).sum(dim=1)
        self.moments += torch.cat([upstream.sum()[None], sums]) * self.signs
        return value, slope

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
        self.steps, self.shift, self.adjoint = scale, shift, adjoint
        self.moments = torch.zeros_like(table)

    def _locate(self, u: Tensor) -> tuple[Tensor, Tensor]:
        cells = self.table.shape[1]
        s = u.double().mul_(self.steps).add_(self.shift).clamp_(0, cells)
        index = s.long().clamp_(max=cells - 1)
        return index, (s - index).to(u.dtype)

    def value(self, v: Tensor) -> Tensor:
        """`f(u)`."""
        index, t = self._locate(v)
        c0, c1, c2, c3 = (row.index_select(0, index) for row in self.table)
        return c3.mul_(t).add_(c2).mul_(t).add_(c1).mul_(t).add_(c0)

    def backward(self, v: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """`f(u)`, `upstream f'(u)` and the moments of every cell."""
        index, t = self._locate(v)
        c0, c1, c2, c3 = (row.index_select(0, index) for row in self.table)
        # Horner's rule for the cubic and, one step behind, for its derivative
        inner = torch.addcmul(c2, c3, t)
        outer = torch.addcmul(c1, inner, t)
        slope = torch.addcmul(outer, torch.addcmul(inner, c3, t), t)
        value = torch.addcmul(c0, outer, t)
        weight, wide = upstream.double(), t.double()
        for m, total in enumerate(self.moments):
            if m:
                weight = weight * wide
            total += torch.bincount(index, weight, minlength=len(total))
        return value, slope.mul_(self.steps).mul_(upstream)

    def gradients(self) -> ParameterGradients:
        """The gradients gathered so far."""
        return self.adjoint(self.moments)
