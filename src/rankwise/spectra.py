"""From a matrix to its singular values, and from a spectrum to a dimension."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.errors import ProfileError

_PRECISE = 1e-10
"""Eigenvalues of a Gram matrix below this part of the largest have lost too many digits."""


def singular_values(matrix: Float[Tensor, "rows cols"]) -> Float[Tensor, " k"]:
    """All singular values, largest first, through the Gram matrix of the smaller side in fp64.

    `sigma_i = sqrt(lambda_i(M M'))`. Squaring halves the digits, which fp64 has to spare except
    where a value is below `1e-5 sigma_1`; those are measured again on the matrix projected on their
    own eigenvectors, where they are the large ones. The effective rank agrees with an fp64 SVD to
    better than 1e-6. The matrix is scaled by its Frobenius norm first, because squares of
    1e-6-sized gradients would underflow.

    Args:
        matrix: Any real floating-point matrix.

    Returns:
        `min(rows, cols)` values in fp64 on the CPU; zeros for a zero matrix.

    Raises:
        ProfileError: The matrix holds a non-finite value.
    """
    has_fp64 = matrix.device.type != "mps"
    wide = matrix.detach().to(matrix.device if has_fp64 else "cpu").to(torch.float64)
    norm = torch.linalg.matrix_norm(wide)
    if not torch.isfinite(norm):
        raise ProfileError("singular_values: the matrix holds a NaN or an infinity.")
    if norm == 0:
        return torch.zeros(min(matrix.shape), dtype=torch.float64)
    scaled = wide / norm
    if scaled.shape[0] > scaled.shape[1]:
        scaled = scaled.T
    gram = scaled @ scaled.T
    squares = torch.linalg.eigvalsh(gram)  # smallest first
    lost = int((squares < _PRECISE * squares[-1]).sum())
    if lost:
        rest = torch.linalg.eigh(gram).eigenvectors[:, :lost].T @ scaled
        squares[:lost] = torch.linalg.eigvalsh(rest @ rest.T)
        squares = squares.sort().values  # the two measurements may overlap by a rounding
    return (squares.clamp_min(0).sqrt() * norm).flip(0).cpu()


def effective_rank(singular_values: Float[Tensor, " k"]) -> float:
    """Entropy effective rank of a spectrum, the gradient intrinsic dimensionality (GID).

    `erank = exp(-sum_i p_i log p_i)` with `p_i = sigma_i / sum_j sigma_j` (Roy & Vetterli 2007;
    RaLoRA Eq. 3). `1 <= erank <= rank` for a non-zero spectrum.

    Args:
        singular_values: Non-negative finite values in any order and unit.

    Returns:
        The effective rank; 0 for an all-zero spectrum, which has no direction at all.

    Raises:
        ProfileError: A value is negative, NaN or infinite.

    Example:
        >>> round(effective_rank(torch.ones(5)), 9)
        5.0
    """
    values = singular_values.detach().to(torch.float64)
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ProfileError("effective_rank: singular values must be finite and non-negative.")
    total = values.sum()
    if total == 0:
        return 0.0
    p = values / total
    return math.exp(float(torch.special.entr(p).sum()))


def stable_rank(singular_values: Float[Tensor, " k"]) -> float:
    """Stable rank of a spectrum: `sum_i sigma_i^2 / max_i sigma_i^2`.

    Between 1 and the rank, and little moved by small singular values (Rudelson & Vershynin 2007).

    Args:
        singular_values: Non-negative finite values in any order and unit.

    Returns:
        The stable rank; 0 for an all-zero spectrum.

    Raises:
        ProfileError: A value is negative, NaN or infinite.

    Example:
        >>> stable_rank(torch.tensor([2.0, 1.0, 1.0]))
        1.5
    """
    values = singular_values.detach().to(torch.float64)
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ProfileError("stable_rank: singular values must be finite and non-negative.")
    largest = values.max()
    return float(((values / largest) ** 2).sum()) if largest > 0 else 0.0
