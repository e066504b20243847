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
BLOCK = 2**17
"""Entries at a time: a call costs some 50 microseconds, and 512 KiB stay in a core's cache."""


class CompiledPolynomial(Polynomial):
    """As `Polynomial`, by compiled kernels.

    The first call of each compiles it, which takes up to a minute and a C++ compiler (Triton on
    GPUs); torch keeps the result on disk.
    """

    def __init__(self, source: Polynomial) -> None:
        self.__dict__.update(vars(source))
        self.block = BLOCK
        self.terms = next(terms for terms in TERMS if terms >= len(source.powers))
        count = self.terms - len(source.powers)
        pairs = (source.coefficients * source.signs, source.slopes * source.signs)
        parts = (torch.nn.functional.pad(c, (0, count)) for c in pairs)
        dtype = source.powers.dtype
        self.coefficients, self.slopes = (part.to(dtype) for part in parts)

    def room(self, count: int, like: Tensor) -> Tensor:
        """A vector of its own: there are no rows."""
        return torch.empty(count, dtype=like.dtype, device=like.device)

    def value(self, v: Tensor) -> Tensor:
        """`f(u)`."""
        result: Tensor = _compiled(_value, self.terms)(v, self.coefficients)
        return result

    def backward(self, v: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """`f(u)`, `upstream f'(u)` and the moments."""
        kernel = _compiled(_backward, self.terms)
        value, slope, sums = kernel(v, upstream, self.coefficients, self.slopes)
        self.moments += sums[: len(self.moments)]
        return value, slope


def _value(terms: int, v: Tensor, coefficients: Tensor) -> Tensor:
    """Clenshaw's rule, which needs no denormal powers."""
    last = torch.zeros_like(v)
    one = last + coefficients[terms - 1]
    for j in range(terms - 2, 0, -1):
        one, last = coefficients[j] + 2 * v * one - last, one
    return coefficients[0] + v * one - last


def _backward(
    terms: int, v: Tensor, upstream: Tensor, coefficients: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    before, now = torch.ones_like(v), v
    value, slope = coefficients[0] + coefficients[1] * v, slopes[0] + slopes[1] * v
    sums = [upstream.sum(), (upstream * v).sum()]
    for j in range(2, terms):
        before, now = now, 2 * v * now - before
        value = value + coefficients[j] * now
        slope = slope + slopes[j] * now
        sums.append((upstream * now).sum())
    return value, slope * upstream, torch.stack(sums)


@cache
def _compiled(kernel: Callable[..., Any], terms: int) -> Callable[..., Any]:
    return torch.compile(partial(kernel, terms), dynamic=True)
