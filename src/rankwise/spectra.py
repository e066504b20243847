"""From a matrix to its singular values, and from a spectrum to a dimension."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.errors import ProfileError

_PANEL = 512
"""Rows of a panel of a Gram matrix; only panels on and below the diagonal are computed."""
_ROUNDING = 1e-12
"""Part of the total energy that the rounding of a cumulative sum may hide."""
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
    gram = _gram_lower(scaled)
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
    values = _checked(singular_values, "effective_rank: singular values")
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
    values = _checked(singular_values, "stable_rank: singular values")
    if not float(values.sum()):
        return 0.0
    return float(((values / values.max()) ** 2).sum())


def participation_ratio(singular_values: Float[Tensor, " k"]) -> float:
    """Participation ratio of a spectrum: `(sum_i sigma_i^2)^2 / sum_i sigma_i^4`.

    How many directions share the energy; between 1 and the rank, at most the effective rank of
    the squared values.

    Args:
        singular_values: Non-negative finite values in any order and unit.

    Returns:
        The ratio; 0 for an all-zero spectrum.

    Raises:
        ProfileError: A value is negative, NaN or infinite.

    Example:
        >>> round(participation_ratio(torch.tensor([1.0, 1.0, 0.0])), 9)
        2.0
    """
    values = _checked(singular_values, "participation_ratio: singular values")
    if not float(values.sum()):
        return 0.0
    squares = (values / values.max()) ** 2
    return float(squares.sum() ** 2 / (squares**2).sum())


def threshold_rank(
    singular_values: Float[Tensor, " k"], threshold: float, *, relative: bool = False
) -> int:
    """How many singular values exceed a threshold: `#{sigma_i > eps}` (RaLoRA Table 7).

    The fragile baseline: an absolute threshold depends on the scale of the loss.

    Args:
        singular_values: Non-negative finite values in any order and unit.
        threshold: eps, in the unit of the values; the paper tries 1e-1, 1e-3 and 1e-5.
        relative: Count `sigma_i > eps * sigma_1` instead, which no scale changes.

    Raises:
        ProfileError: A value or the threshold is negative, NaN or infinite.

    Example:
        >>> threshold_rank(torch.tensor([2.0, 0.5, 0.1]), 0.1, relative=True)
        2
    """
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ProfileError(f"threshold_rank: threshold={threshold} must be finite and at least 0.")
    values = _checked(singular_values, "threshold_rank: singular values")
    if relative and len(values):
        threshold *= float(values.max())
    return int((values > threshold).sum())


def gram_eigenvalues(gram: Float[Tensor, "m m"]) -> Float[Tensor, " m"]:
    """Eigenvalues of a symmetric positive semidefinite matrix in fp64, largest first.

    Rounding may leave an eigenvalue of a singular matrix slightly below zero; it is returned as 0.

    Raises:
        ProfileError: The matrix holds a non-finite value.
    """
    wide = gram.detach().cpu().to(torch.float64)
    scale = wide.abs().max() if wide.numel() else torch.zeros(())
    if not torch.isfinite(scale):
        raise ProfileError("gram_eigenvalues: the matrix holds a NaN or an infinity.")
    if scale == 0:
        return torch.zeros(len(wide), dtype=torch.float64)
    return (torch.linalg.eigvalsh(wide / scale).clamp_min(0) * scale).flip(0)


def energy_rank(eigenvalues: Float[Tensor, " m"], energy: float = 0.9) -> int:
    """Energy rank: the fewest eigenvalues that hold a part `energy` of the total (GARD 3.2).

    The smallest k with `sum_{i<=k} lambda_i >= energy * sum_i lambda_i`, largest first. On the Gram
    matrix of M mini-batch gradients it counts independent *gradients*, at most M; on the squared
    singular values of one gradient it counts that matrix's directions. The two are different
    quantities.

    Args:
        eigenvalues: Non-negative finite values in any order and unit, such as `gram_eigenvalues`.
        energy: Part of the total to be held, in (0, 1]; GARD names none, 0.9 is rankwise's choice.

    Returns:
        The rank; 0 if every eigenvalue is zero.

    Raises:
        ProfileError: A value is negative, NaN or infinite, or `energy` is out of range.

    Example:
        >>> energy_rank(torch.tensor([8.0, 1.0, 1.0]))
        2
    """
    return math.ceil(energy_crossing(eigenvalues, energy))


def energy_crossing(eigenvalues: Float[Tensor, " m"], energy: float = 0.9) -> float:
    """Where the cumulative energy crosses the wanted part, as a fraction of the last eigenvalue.

    With k the energy rank, `(k - 1) + (energy * S_m - S_{k-1}) / lambda_k` and `S_j` the sum of
    the j largest eigenvalues: in `(k - 1, k]`, so that it orders modules of equal energy rank. For
    arguments and errors see `energy_rank`.

    Example:
        >>> energy_crossing(torch.tensor([8.0, 1.0, 1.0]), 0.85)
        1.5
    """
    if not 0 < energy <= 1:
        raise ProfileError(f"energy={energy}: the part of the energy must be in (0, 1].")
    values = _checked(eigenvalues, "energy_rank: eigenvalues").sort(descending=True).values
    if not float(values.sum()):
        return 0.0
    values = values / values[0]
    cumulative = values.cumsum(0)
    wanted = energy * float(cumulative[-1])
    # a sum that is the wanted one but for rounding has crossed
    slack = _ROUNDING * float(cumulative[-1])
    k = int(torch.searchsorted(cumulative, wanted - slack))
    before = float(cumulative[k - 1]) if k else 0.0
    fraction = (wanted - before) / float(values[k])
    return k + min(max(fraction, 2.0**-20), 1.0)


def _gram_lower(matrix: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows rows"]:
    """`M M'` on and below the diagonal, which is what `eigvalsh` and `eigh` read."""
    rows = matrix.shape[0]
    gram = matrix.new_empty(rows, rows)
    for start in range(0, rows, _PANEL):
        end = min(start + _PANEL, rows)
        torch.mm(matrix[start:], matrix[start:end].T, out=gram[start:, start:end])
        gram[start:end, end:] = 0
    return gram


def _checked(values: Tensor, what: str) -> Tensor:
    """The values in fp64, if they can be a spectrum."""
    wide = values.detach().to(torch.float64)
    if not bool(torch.isfinite(wide).all()) or bool((wide < 0).any()):
        raise ProfileError(f"{what} must be finite and non-negative.")
    return wide
