"""From a matrix to its singular values and vectors, in fp64."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.errors import ProfileError

_PANEL = 192
"""Columns of a panel of a Gram matrix; only panels on and below the diagonal are computed."""
_PART = 2**18
"""Entries of the matrix that are widened to fp64 at a time: 2 MB, about a core's cache."""
_MIN_DEPTH = 512
_PRECISE = 1e-10
"""Eigenvalues of a Gram matrix below this part of the largest have lost half of their digits."""
_NOISE = 1e-14
"""Below this part they have lost nearly all of them."""
_ROUNDING = 2e-15
"""Error of an eigenvalue of a Gram matrix as a part of the largest: ten units of rounding."""
_ALLOWED = 1e-7
"""Relative error of the effective rank that the rounding of eigenvalues may cause."""
_ALLOWED_FROM_TOKENS = 1e-6
"""The same where a more exact way costs ten times as much."""
_SMALLEST = 1e-200
_FEW = 0.25
"""Tokens as a part of the smaller side below which their Gram matrices are cheaper than QR."""

logger = logging.getLogger(__name__)


def singular_values(matrix: Float[Tensor, "rows cols"]) -> Float[Tensor, " k"]:
    """All singular values, largest first, through the Gram matrix of the smaller side in fp64.

    `sigma_i = sqrt(lambda_i(M M'))`. Squaring halves the digits. fp64 has them to spare, except
    where values below `1e-5 sigma_1` carry weight or lie in the rounding; those are measured again
    on the matrix projected on their own eigenvectors, where they are the large ones. The effective
    rank agrees with an fp64 SVD to better than 1e-6. No fp64 copy of the matrix is made.

    Args:
        matrix: Any real floating-point matrix.

    Returns:
        `min(rows, cols)` values in fp64 on the CPU; zeros for a zero matrix.

    Raises:
        ProfileError: The matrix holds a non-finite value, or no driver converges.
    """
    tall, scale = _tall_and_scale(matrix, "singular_values")
    if not scale:
        return torch.zeros(min(matrix.shape), dtype=torch.float64)
    gram = _gram_lower(tall, scale)
    squares = _eigenvalues(gram)  # smallest first
    lost = int((squares < _PRECISE * squares[-1]).sum())
    if lost and _rounding_shows(squares):
        rest = _widened(tall, scale) @ _eigenvectors(gram)[:, :lost]
        squares[:lost] = _eigenvalues(rest.T @ rest)
        squares = squares.sort().values  # the two measurements may overlap by a rounding
    return (squares.clamp_min(0).sqrt() * scale).flip(0).cpu()


def token_singular_values(
    x: Float[Tensor, "t d_in"],
    g: Float[Tensor, "t d_out"],
    *,
    x_gram: Float[Tensor, "t t"] | None = None,
) -> Float[Tensor, " k"]:
    """Singular values of `G = g' x` without forming G, whose rank is T at most.

    With `x' = Q_x R_x` and `g' = Q_g R_g`, G has the singular values of `R_g R_x'`, in fp64. Below
    T = min(d_in, d_out) / 4 the two Gram matrices of the tokens do for less: with `g g' = L L'` the
    squares of the values are the eigenvalues of `L' (x x') L`, of T x T. A bound says what their
    rounding can do to the effective rank; where that is more than 1e-6, as with many tokens alike,
    they are not used. Worth it up to about T = 0.75 min(d_in, d_out), and right for any T.

    Args:
        x: Inputs of a layer, one row a token.
        g: Gradients of its outputs.
        x_gram: `token_gram(x)`, where several layers share x.

    Returns:
        `min(d_in, d_out)` values in fp64 on the CPU, largest first, zeros from T on.

    Raises:
        ProfileError: A factor holds a non-finite value, or no driver converges.

    Example:
        >>> x, g = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0]])
        >>> [round(value, 9) for value in token_singular_values(x, g).tolist()]
        [6.0, 0.0]
    """
    most = min(x.shape[1], g.shape[1])
    values = None
    if len(x) < _FEW * most:
        values = _from_token_grams(token_gram(x) if x_gram is None else x_gram, token_gram(g))
    if values is None:
        values = singular_values(_triangle(g) @ _triangle(x).T)
    return torch.nn.functional.pad(values[:most], (0, max(most - len(values), 0)))


def token_gram(x: Float[Tensor, "t d"]) -> Float[Tensor, "t t"]:
    """`x x'` in fp64: shared by all products of one x."""
    wide = _fp64(x)
    return wide @ wide.T


def _from_token_grams(x: Float[Tensor, "t t"], g: Float[Tensor, "t t"]) -> Tensor | None:
    """Singular values from the Gram matrices of the tokens; None where rounding could show."""
    largest_x, largest_g = (float(gram.diagonal().sum()) for gram in (x, g))
    if not (_SMALLEST < largest_x < 1 / _SMALLEST and _SMALLEST < largest_g < 1 / _SMALLEST):
        return None  # zero, not finite, or out of fp64's comfortable range
    try:
        root, failed = torch.linalg.cholesky_ex(g / largest_g)
        if int(failed):  # tokens that depend on each other, or have no gradient
            eigenvalues, vectors = torch.linalg.eigh(g / largest_g)
            root = vectors * eigenvalues.clamp_min(0).sqrt()
        product = root.T @ (x / largest_x) @ root
        squares = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0)
    except torch.linalg.LinAlgError:
        return None
    top = float(squares[-1])
    # the traces bound the largest eigenvalues, on which the rounding of the products depends
    if not top or _erank_error(squares / top, _ROUNDING / top) > _ALLOWED_FROM_TOKENS:
        return None
    return (squares.sqrt() * math.sqrt(largest_x) * math.sqrt(largest_g)).flip(0).cpu()


def _triangle(x: Float[Tensor, "t d"]) -> Float[Tensor, "k t"]:
    """The R of `x' = Q R` in fp64; a Cholesky factor of `x x'` would lose half the digits."""
    return torch.linalg.qr(_fp64(x).T, mode="r").R


def top_singular(
    matrix: Float[Tensor, "rows cols"], k: int
) -> tuple[Float[Tensor, "rows k"], Float[Tensor, " k"], Float[Tensor, "cols k"]]:
    """The k largest singular values with their vectors: `M ~ U diag(sigma) V'`.

    The eigenvectors of the smaller side's Gram matrix in fp64 span the space, and an SVD of the
    matrix projected on it gives vectors that are orthogonal to rounding. Where `sigma_k` is below
    `1e-5 sigma_1` an SVD of the whole matrix is taken instead. Signs are fixed: the entry of U
    that is largest in magnitude, the first of equals, is positive in every column.

    Args:
        matrix: Any real floating-point matrix.
        k: How many directions, from 1 to `min(rows, cols)`.

    Returns:
        `U (rows, k)`, the values largest first, and `V (cols, k)`, in fp64 on the CPU.

    Raises:
        ProfileError: k is out of range, the matrix holds a non-finite value, or nothing converges.

    Example:
        >>> u, sigma, v = top_singular(torch.tensor([[0.0, -2.0], [1.0, 0.0]]), 1)
        >>> float(u[0, 0]), float(sigma[0]), float(v[1, 0])
        (1.0, 2.0, -1.0)
    """
    if not 1 <= k <= min(matrix.shape):
        raise ProfileError(
            f"top_singular: k={k}; a matrix of shape {tuple(matrix.shape)} has 1 to "
            f"{min(matrix.shape)} directions."
        )
    tall, scale = _tall_and_scale(matrix, "top_singular")
    left, values, right = _thin_svd(_widened(tall, scale or 1.0), k)
    if matrix.shape[0] < matrix.shape[1]:
        left, right = right, left
    left, right = left[:, :k], right[:, :k]
    peaks = left.abs().argmax(0, keepdim=True)
    signs = torch.where(left.gather(0, peaks) < 0, -1.0, 1.0).to(left.dtype)
    return (left * signs).cpu(), (values[:k] * scale).cpu(), (right * signs).cpu()


def gram_eigenvalues(gram: Float[Tensor, "m m"]) -> Float[Tensor, " m"]:
    """Eigenvalues of a symmetric positive semidefinite matrix in fp64, largest first.

    Rounding may leave an eigenvalue of a singular matrix slightly below zero; it is returned as 0.

    Raises:
        ProfileError: The matrix holds a non-finite value, or no driver converges.
    """
    wide = gram.detach().cpu().to(torch.float64)
    scale = wide.abs().max() if wide.numel() else torch.zeros(())
    if not torch.isfinite(scale):
        raise ProfileError("gram_eigenvalues: the matrix holds a NaN or an infinity.")
    if scale == 0:
        return torch.zeros(len(wide), dtype=torch.float64)
    return (_eigenvalues(wide / scale).clamp_min(0) * scale).flip(0)


def _fp64(matrix: Tensor) -> Tensor:
    """The matrix in fp64, on the CPU where its device has none."""
    device = "cpu" if matrix.device.type == "mps" else matrix.device
    return matrix.detach().to(device).to(torch.float64)


def _tall_and_scale(matrix: Tensor, what: str) -> tuple[Tensor, float]:
    """The matrix with its longer side down, and what to divide it by; 0 for a zero matrix.

    Squares of what narrower types hold cannot underflow or overflow in fp64, so only fp64 scales.
    """
    matrix = matrix.detach()
    if matrix.device.type == "mps":  # it has no fp64
        matrix = matrix.cpu()
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    if not tall.numel():
        return tall, 0.0
    low, high = torch.aminmax(tall)
    peak = max(-float(low), float(high))
    if not math.isfinite(peak):
        raise ProfileError(f"{what}: the matrix holds a NaN or an infinity.")
    return tall, peak if peak == 0 or matrix.dtype == torch.float64 else 1.0


def _widened(part: Tensor, scale: float) -> Tensor:
    wide = part.to(torch.float64)
    return wide if scale == 1 else wide / scale


def _gram_lower(tall: Float[Tensor, "rows cols"], scale: float) -> Float[Tensor, "cols cols"]:
    """`(M / scale)' (M / scale)` in fp64 on and below the diagonal, which `eigh` reads."""
    rows, columns = tall.shape
    gram = torch.zeros(columns, columns, dtype=torch.float64, device=tall.device)
    depth = max(_PART // columns, _MIN_DEPTH)
    for top in range(0, rows, depth):
        part = _widened(tall[top : top + depth], scale)
        for start in range(0, columns, _PANEL):
            end = min(start + _PANEL, columns)
            gram[start:, start:end].addmm_(part[:, start:].T, part[:, start:end])
    return gram


def _rounding_shows(squares: Float[Tensor, " k"]) -> bool:
    """Whether the rounding of eigenvalues can be seen in the values or in the effective rank."""
    squares = squares / squares[-1]
    return float(squares[0]) < _NOISE or _erank_error(squares, _ROUNDING) > _ALLOWED


def _erank_error(squares: Float[Tensor, " k"], rounding: float) -> float:
    """Bound of the effective rank's relative error if each square is off by `rounding`.

    An error e of `sigma_i^2` moves `sigma_i` by `e / (2 sigma_i)`, at most `sqrt(e)`, and that the
    logarithm of the effective rank by `|log p_i + H| / sum_j sigma_j` times as much; all are taken
    to add up. The squares are parts of the largest.
    """
    values = squares.sqrt()
    moved = (rounding / (2 * values)).clamp_max(math.sqrt(rounding))
    p = values / values.sum()
    entropy = torch.special.entr(p).sum()
    steepness = (p.clamp_min(moved / values.sum()).log() + entropy).abs()
    return float((steepness * moved).sum() / values.sum())


def _eigenvalues(lower: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """Smallest first; by another driver where the usual one does not converge."""
    try:
        return torch.linalg.eigvalsh(lower)
    except torch.linalg.LinAlgError as error:
        logger.info("eigvalsh: %s; trying an SVD", error)
    with _divergence_explained(lower):
        return torch.linalg.svdvals(_symmetric(lower)).flip(0)


def _eigenvectors(lower: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """One a column, in the order of `_eigenvalues`."""
    try:
        return torch.linalg.eigh(lower).eigenvectors
    except torch.linalg.LinAlgError as error:
        logger.info("eigh: %s; trying an SVD", error)
    with _divergence_explained(lower):
        return torch.linalg.svd(_symmetric(lower)).U.flip(1)


def _thin_svd(
    tall: Float[Tensor, "rows cols"], k: int
) -> tuple[Float[Tensor, "rows _"], Float[Tensor, " _"], Float[Tensor, "cols _"]]:
    """At least the k largest singular triplets of a scaled matrix."""
    columns = tall.shape[1]
    gram = _gram_lower(tall, 1.0)
    squares = _eigenvalues(gram)
    basis = None
    if k < columns and float(squares[-k]) > _PRECISE * float(squares[-1]):
        basis = _eigenvectors(gram)[:, -k:]
        tall = tall @ basis
    with _divergence_explained(tall):
        left, values, right = torch.linalg.svd(tall, full_matrices=False)
    return left, values, right.T if basis is None else basis @ right.T


def _symmetric(lower: Tensor) -> Tensor:
    return lower.tril() + lower.tril(-1).T


@contextmanager
def _divergence_explained(matrix: Tensor) -> Iterator[None]:
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise ProfileError(
            f"the singular values of a matrix of shape {tuple(matrix.shape)} do not converge, "
            f"neither from its Gram matrix in fp64 nor by an SVD: {error}"
        ) from error
