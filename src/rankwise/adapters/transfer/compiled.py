"""The polynomial compiled by `torch.compile`: one pass over the entries, whatever the degree.

Degrees share two kernels for each direction, with coefficients padded by zeros to 8 or 16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from rankwise.adapters.transfer.evaluators import Polynomial

TERMS = (8, 16)
"""Coefficients of the kernels; the largest degree is one less."""


class CompiledPolynomial(Polynomial):
    """As `Polynomial`, by compiled kernels, which take a whole matrix at a time.

    The first call of each compiles it, which takes up to a minute and a C++ compiler (Triton on
    GPUs); torch keeps the result on disk.
    """

    def __init__(self, source: Polynomial) -> None:
        self.__dict__.update(vars(source))
        self.block = 2**62
        self.terms = next(terms for terms in TERMS if terms >= len(source.powers))
        count = self.terms - len(source.powers)
        dtype = source.powers.dtype
        self.padded = [torch.nn.functional.pad(c, (0, count)).to(dtype) for c in source.chebyshev]

    def value_(self, v: Tensor, *, base: Tensor | None = None, scale: float = 1.0) -> None:
        """`base + scale f(u)`."""
        _compiled(_value_, self.terms)(v, self.padded[0] * scale, base)

    def backward_(
        self, v: Tensor, upstream: Tensor, *, base: Tensor | None = None, scale: float = 1.0
    ) -> None:
        """`upstream f'(u)`, `base + scale f(u)` and the moments."""
        values, slopes = self.padded
        sums = _compiled(_backward_, self.terms)(v, upstream, values * scale, slopes, base)
        self.moments += sums.double().sum(dim=1)[: len(self.moments)]


def _plus(base: Tensor | None, values: Tensor) -> Tensor:
    return values if base is None else base + values


def _value_(terms: int, v: Tensor, coefficients: Tensor, base: Tensor | None) -> None:
    """Clenshaw's rule, which needs no denormal powers."""
    last = torch.zeros_like(v)
    one = last + coefficients[terms - 1]
    for j in range(terms - 2, 0, -1):
        one, last = coefficients[j] + 2 * v * one - last, one
    v.copy_(_plus(base, coefficients[0] + v * one - last))


def _backward_(
    terms: int,
    v: Tensor,
    upstream: Tensor,
    coefficients: Tensor,
    slopes: Tensor,
    base: Tensor | None,
) -> Tensor:
    """The moments of every row: short sums, which lose no digits and need no second pass."""
    before, now = torch.ones_like(v), v
    value, slope = coefficients[0] + coefficients[1] * v, slopes[0] + slopes[1] * v
    sums = [upstream.sum(dim=1), (upstream * v).sum(dim=1)]
    for j in range(2, terms):
        before, now = now, 2 * v * now - before
        value = value + coefficients[j] * now
        slope = slope + slopes[j] * now
        sums.append((upstream * now).sum(dim=1))
    moments = torch.stack(sums)
    v.copy_(slope * upstream)
    upstream.copy_(_plus(base, value))
    return moments


@cache
def _compiled(kernel: Callable[..., Any], terms: int) -> Callable[..., Any]:
    return torch.compile(partial(kernel, terms), dynamic=True)
