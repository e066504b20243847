"""From a spectrum to a dimension."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.errors import ProfileError

_ROUNDING = 1e-12
"""Part of the total energy that the rounding of a cumulative sum may hide."""


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


def _checked(values: Tensor, what: str) -> Tensor:
    """The values in fp64, if they can be a spectrum."""
    wide = values.detach().to(torch.float64)
    if not bool(torch.isfinite(wide).all()) or bool((wide < 0).any()):
        raise ProfileError(f"{what} must be finite and non-negative.")
    return wide
