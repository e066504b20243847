"""Bases of the transfer function f, directly from their formulas in fp64.

`f(u) = sum_k a_k phi(w_k (u - g_k))` with `phi` the sinc of LR-LoRA (Eq. 4) or a Gaussian
(`exp(-t^2)`), and at the same number of parameters 2K cubic B-splines, K sines and K cosines, or 2K
Chebyshev polynomials (LR-LoRA table 13); `sin(omega u)` is SineLoRA's fixed nonlinearity.

Everything here is exact and slow: cost and memory grow with the number of basis functions. It is
the reference, the fallback, and what `expansion.py` evaluates at its few nodes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

BasisName = Literal["sinc", "rbf", "spline", "fourier", "polynomial", "sine"]


@dataclass(frozen=True)
class Transfer:
    """A transfer function: a basis and its parameters.

    Attributes:
        basis: Name of the basis.
        span: Half width L of the interval; the frequency omega for `"sine"`.
        amplitude: `a`, of length K, 2K for the linear bases, 1 for `"sine"`.
        bandwidth: `w > 0`, of length K, for `"sinc"` and `"rbf"`.
        grid: `g`, of length K, for `"sinc"` and `"rbf"`.
        constant: False takes `f(0)` away, so that the function goes through the origin.
    """

    basis: BasisName
    span: float
    amplitude: Float[Tensor, " m"]
    bandwidth: Float[Tensor, " k"] | None = None
    grid: Float[Tensor, " k"] | None = None
    constant: bool = True

    def wide(self) -> Transfer:
        """The same in fp64, detached."""
        return Transfer(
            self.basis,
            self.span,
            self.amplitude.detach().double(),
            None if self.bandwidth is None else self.bandwidth.detach().double(),
            None if self.grid is None else self.grid.detach().double(),
            self.constant,
        )

    def value(self, u: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """`f(u)`, for parameters in fp64."""
        basis = BASES[self.basis]
        values = basis.value(u, self)
        return values if self.constant else values - basis.value(u.new_zeros(1), self)

    def slope(self, u: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """`f'(u)`, for parameters in fp64."""
        return BASES[self.basis].slope(u, self)

    def gradients(
        self, u: Float[Tensor, " n"], upstream: Float[Tensor, " n"]
    ) -> ParameterGradients:
        """`sum_n upstream_n df(u_n)/dtheta` for every parameter theta, in fp64."""
        if not self.constant:
            u = torch.cat([u, u.new_zeros(1)])
            upstream = torch.cat([upstream, -upstream.sum(dim=0, keepdim=True)])
        return BASES[self.basis].gradients(u, upstream, self)


class ParameterGradients(NamedTuple):
    """Gradients by amplitude, bandwidth and grid; None where the basis has no such parameter."""

    amplitude: Tensor
    bandwidth: Tensor | None
    grid: Tensor | None


_SERIES = 0.25
_TERMS = [(-1) ** n * math.pi ** (2 * n) * 2 * n / math.factorial(2 * n + 1) for n in range(1, 11)]


def sinc_derivative(t: Tensor) -> Tensor:
    """`(cos(pi t) - sinc(t)) / t`, by its series where |t| < 1/4.

    The formula loses all its digits near 0, where both terms are 1; ten terms of the series are
    right to 1e-20 up to 1/4, from where on the formula is right to some roundings.
    """
    near = t.abs() < _SERIES
    square = torch.where(near, t, 0) ** 2
    series = torch.zeros_like(t)
    for term in reversed(_TERMS):
        series = series * square + term
    far = torch.where(near, 1, t)
    return torch.where(near, series * t, (torch.cos(math.pi * far) - torch.sinc(far)) / far)


def gaussian(t: Tensor) -> Tensor:
    """`exp(-t^2)`."""
    return torch.exp(-t * t)


def gaussian_derivative(t: Tensor) -> Tensor:
    """`-2 t exp(-t^2)`."""
    return -2 * t * torch.exp(-t * t)


class Basis(ABC):
    """How one basis is computed; parameters are fp64 tensors."""

    local: ClassVar[bool] = False
    """Whether it has bandwidths and a grid."""

    @abstractmethod
    def amplitudes(self, k: int) -> int:
        """How many amplitudes stand for K basis functions with a bandwidth each."""

    @abstractmethod
    def value(self, u: Float[Tensor, " n"], f: Transfer) -> Float[Tensor, " n"]:
        """`f(u)`."""

    @abstractmethod
    def slope(self, u: Float[Tensor, " n"], f: Transfer) -> Float[Tensor, " n"]:
        """`f'(u)`."""

    @abstractmethod
    def gradients(
        self, u: Float[Tensor, " n"], upstream: Float[Tensor, " n"], f: Transfer
    ) -> ParameterGradients:
        """`sum_n upstream_n df(u_n)/dtheta` for every parameter theta."""

    def reach(self, f: Transfer, radius: float) -> float:
        """The range `[-radius, radius]` in units of the fastest function: radians, for most."""
        raise NotImplementedError(f"{type(self).__name__} is expanded piece by piece")

    def log_bound(self, j: int, reach: float, functions: int) -> float:
        """Logarithm of a bound on the j-th Chebyshev coefficient of every basis function."""
        raise NotImplementedError(f"{type(self).__name__} is expanded piece by piece")


class Local(Basis):
    """`sum_k a_k phi(w_k (u - g_k))`."""

    local = True

    def __init__(
        self, phi: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor]
    ) -> None:
        self.phi, self.derivative = phi, derivative

    def amplitudes(self, k: int) -> int:
        """K, beside K bandwidths."""
        return k

    @staticmethod
    def _offsets(u: Tensor, f: Transfer) -> tuple[Tensor, Tensor, Tensor]:
        """`u_n - g_k`, `w` and `w_k (u_n - g_k)`."""
        assert f.bandwidth is not None and f.grid is not None
        offsets = u[:, None] - f.grid
        return offsets, f.bandwidth, offsets * f.bandwidth

    def value(self, u: Tensor, f: Transfer) -> Tensor:
        """`f(u)`."""
        return self.phi(self._offsets(u, f)[2]) @ f.amplitude

    def slope(self, u: Tensor, f: Transfer) -> Tensor:
        """`f'(u) = sum_k a_k w_k phi'(t_k)`."""
        _, w, t = self._offsets(u, f)
        return self.derivative(t) @ (f.amplitude * w)

    def gradients(self, u: Tensor, upstream: Tensor, f: Transfer) -> ParameterGradients:
        """`da = sum H phi`, `dw = a sum H (u - g) phi'`, `dg = -a w sum H phi'`."""
        offsets, w, t = self._offsets(u, f)
        slopes = self.derivative(t)
        weighted = upstream @ slopes
        return ParameterGradients(
            upstream @ self.phi(t),
            f.amplitude * (upstream @ (offsets * slopes)),
            -f.amplitude * w * weighted,
        )


class Sinc(Local):
    """Normalised sinc `sin(pi t) / (pi t)` (LR-LoRA Eq. 3)."""

    def __init__(self) -> None:
        super().__init__(torch.sinc, sinc_derivative)

    def reach(self, f: Transfer, radius: float) -> float:
        """`pi w_max R`: sinc holds frequencies up to pi w."""
        assert f.bandwidth is not None
        return math.pi * float(f.bandwidth.detach().abs().max()) * radius

    def log_bound(self, j: int, reach: float, functions: int) -> float:
        """`|c_j| <= 2 (reach/2)^j / (j! (j + 1))`.

        `sinc(w (u - g))` is the mean of `exp(i pi w s (u - g))` over s in [-1, 1], whose
        coefficients on `[-R, R]` are Bessel functions `2 |J_j(s reach)| <= 2 (|s| reach/2)^j / j!`.
        """
        return math.log(2) + j * math.log(reach / 2) - math.lgamma(j + 1) - math.log(j + 1)


class Gaussian(Local):
    """Gaussian radial basis `exp(-t^2)`."""

    def __init__(self) -> None:
        super().__init__(gaussian, gaussian_derivative)

    def reach(self, f: Transfer, radius: float) -> float:
        """`2 w_max R`."""
        assert f.bandwidth is not None
        return 2 * float(f.bandwidth.detach().abs().max()) * radius

    def log_bound(self, j: int, reach: float, functions: int) -> float:
        """`|c_j| <= 2 (reach/2)^j Gamma((j+1)/2) / (sqrt(pi) j!)`.

        `exp(-(w (u - g))^2)` is the mean of `exp(i q (u - g))` over normal q of variance `2 w^2`;
        the Bessel bound of sinc, averaged, has the moment `E |q|^j`.
        """
        moment = math.lgamma((j + 1) / 2) - math.log(math.pi) / 2
        return math.log(2) + j * math.log(reach / 2) + moment - math.lgamma(j + 1)


class Linear(Basis):
    """`sum_m a_m phi_m(u)` with functions that have no parameters."""

    def amplitudes(self, k: int) -> int:
        """2K, the size of K functions with a bandwidth each."""
        return 2 * k

    @abstractmethod
    def functions(self, u: Tensor, f: Transfer) -> Float[Tensor, "n m"]:
        """`phi_m(u_n)`."""

    @abstractmethod
    def derivatives(self, u: Tensor, f: Transfer) -> Float[Tensor, "n m"]:
        """`phi_m'(u_n)`."""

    def value(self, u: Tensor, f: Transfer) -> Tensor:
        """`f(u)`."""
        return self.functions(u, f) @ f.amplitude

    def slope(self, u: Tensor, f: Transfer) -> Tensor:
        """`f'(u)`."""
        return self.derivatives(u, f) @ f.amplitude

    def gradients(self, u: Tensor, upstream: Tensor, f: Transfer) -> ParameterGradients:
        """`da_m = sum H phi_m(u)`."""
        return ParameterGradients(upstream @ self.functions(u, f), None, None)


class Spline(Linear):
    """Cubic B-splines `B((u - c_m) / h)` on 2K uniform centres of `[-L, L]`."""

    @staticmethod
    def step(f: Transfer) -> float:
        """Distance h of neighbouring centres."""
        return 2 * f.span / (len(f.amplitude) - 1)

    def _t(self, u: Tensor, f: Transfer) -> Tensor:
        centres = torch.arange(len(f.amplitude), dtype=u.dtype, device=u.device)
        return ((u + f.span) / self.step(f))[:, None] - centres

    def functions(self, u: Tensor, f: Transfer) -> Tensor:
        """`B(t)`: `(4 - 6 t^2 + 3 |t|^3) / 6` inside 1, `(2 - |t|)^3 / 6` inside 2, else 0."""
        t = self._t(u, f).abs()
        return ((2 - t).clamp_min(0) ** 3 - 4 * (1 - t).clamp_min(0) ** 3) / 6

    def derivatives(self, u: Tensor, f: Transfer) -> Tensor:
        """`B'(t) / h`."""
        t = self._t(u, f)
        size = t.abs()
        slope = -((2 - size).clamp_min(0) ** 2) / 2 + 2 * (1 - size).clamp_min(0) ** 2
        return slope * t.sign() / self.step(f)


class Fourier(Linear):
    """`sin(pi m u / L)` for m = 1..K, then `cos(pi m u / L)`."""

    @staticmethod
    def _angles(u: Tensor, f: Transfer) -> tuple[Tensor, Tensor]:
        count = len(f.amplitude) // 2
        frequencies = torch.arange(1, count + 1, dtype=u.dtype, device=u.device)
        frequencies = frequencies * (math.pi / f.span)
        return u[:, None] * frequencies, frequencies

    def functions(self, u: Tensor, f: Transfer) -> Tensor:
        """Sines and cosines."""
        angles, _ = self._angles(u, f)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    def derivatives(self, u: Tensor, f: Transfer) -> Tensor:
        """Cosines and minus sines, times the frequencies."""
        angles, frequencies = self._angles(u, f)
        return torch.cat([angles.cos() * frequencies, -angles.sin() * frequencies], dim=1)

    def reach(self, f: Transfer, radius: float) -> float:
        """`pi K R / L`."""
        return math.pi * (len(f.amplitude) // 2) / f.span * radius

    def log_bound(self, j: int, reach: float, functions: int) -> float:
        """`|c_j| <= 2 |J_j(reach)| <= 2 (reach/2)^j / j!`."""
        return math.log(2) + j * math.log(reach / 2) - math.lgamma(j + 1)


class Sine(Fourier):
    """SineLoRA's `sin(omega u)`: one function with the constant amplitude 1."""

    def amplitudes(self, k: int) -> int:
        """One, which does not train."""
        return 1

    def functions(self, u: Tensor, f: Transfer) -> Tensor:
        """`sin(omega u)`."""
        return torch.sin(f.span * u)[:, None]

    def derivatives(self, u: Tensor, f: Transfer) -> Tensor:
        """`omega cos(omega u)`."""
        return f.span * torch.cos(f.span * u)[:, None]

    def reach(self, f: Transfer, radius: float) -> float:
        """`omega R`."""
        return abs(f.span) * radius


class Polynomial(Linear):
    """Chebyshev polynomials `T_m(u / L)` for m = 0..2K-1."""

    def functions(self, u: Tensor, f: Transfer) -> Tensor:
        """By the recurrence, which also holds outside `[-L, L]`."""
        return chebyshev_rows(u / f.span, len(f.amplitude)).T

    def derivatives(self, u: Tensor, f: Transfer) -> Tensor:
        """`m U_{m-1}(u / L) / L`, with the second kind by its recurrence."""
        x, count = u / f.span, len(f.amplitude)
        second = torch.empty(count, len(x), dtype=x.dtype, device=x.device)
        second[0] = 1
        second[1] = 2 * x
        for m in range(2, count):
            second[m] = 2 * x * second[m - 1] - second[m - 2]
        degrees = torch.arange(1, count, dtype=x.dtype, device=x.device)
        return torch.cat([torch.zeros_like(second[:1]), degrees[:, None] * second[:-1]]).T / f.span

    def reach(self, f: Transfer, radius: float) -> float:
        """`R / L`."""
        return radius / f.span

    def log_bound(self, j: int, reach: float, functions: int) -> float:
        """`|c_j| <= 2 max |T_m| rho^-j` on the best of some Bernstein ellipses; 0 beyond m.

        On the ellipse of `[-R, R]` with parameter rho, `|z / L| <= b = (R/L) (rho + 1/rho) / 2`
        and `|T_m(z/L)| <= (b + sqrt(b^2 + 1))^m`.
        """
        if j >= functions:
            return -math.inf
        return min(
            math.log(2)
            + (functions - 1) * math.asinh(reach * (rho + 1 / rho) / 2)
            - j * math.log(rho)
            for rho in _ELLIPSES
        )


_ELLIPSES = [1 + 2 ** (i / 4) for i in range(-20, 56)]

BASES: Mapping[BasisName, Basis] = {
    "sinc": Sinc(),
    "rbf": Gaussian(),
    "spline": Spline(),
    "fourier": Fourier(),
    "polynomial": Polynomial(),
    "sine": Sine(),
}


def chebyshev_rows(x: Float[Tensor, " n"], count: int) -> Float[Tensor, "m n"]:
    """`T_0(x), ..., T_{count-1}(x)`."""
    rows = torch.empty(max(count, 2), len(x), dtype=x.dtype, device=x.device)
    rows[0] = 1
    rows[1] = x
    for m in range(2, count):
        rows[m] = 2 * x * rows[m - 1] - rows[m - 2]
    return rows[:count]
