"""What is lost when a matrix is held by a low-rank matrix or by blocks (RaLoRA, App. C)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.errors import ProfileError


def block_energy(matrix: Float[Tensor, "rows cols"], n: int = 1) -> Float[Tensor, " ranks"]:
    """Part of `|M|^2` that the best n diagonal blocks of rank 1, 2, ... each can hold.

    With the blocks `M_pq` of M and the singular values `sigma_pi` of `M_pp`, entry r - 1 is
    `1 - E / |M|^2 = sum_p sum_{i <= r} sigma_pi^2 / |M|^2`, because the best approximation of every
    block is its truncated SVD (Eckart, Young). For n = 1 E is LoRA's error (RaLoRA Eq. 24), else
    that of the block-diagonal form of the same parameters `r (rows + cols)` (Eq. 28). The last
    entry is the energy on the diagonal blocks: 1 minus it is Eq. 28's truncation error, and it
    minus entry r - 1 is its approximation error.

    Args:
        matrix: M, a gradient or an update.
        n: Blocks; must divide both sides.

    Returns:
        `min(rows, cols) / n` parts in fp64 on the CPU, rising; zeros for a zero matrix.

    Raises:
        ProfileError: n does not divide the sides, or the matrix has a non-finite value.

    >>> block_energy(torch.diag(torch.tensor([2.0, 1.0, 1.0, 2.0]))).tolist()
    [0.4, 0.8, 0.9, 1.0]
    >>> block_energy(torch.diag(torch.tensor([2.0, 1.0, 1.0, 2.0])), n=2).tolist()
    [0.8, 1.0]
    """
    rows, cols = matrix.shape
    if n < 1 or rows % n or cols % n:
        raise ProfileError(f"n={n} must be at least 1 and divide both sides of {rows} x {cols}.")
    total = matrix.double().square().sum()
    if not torch.isfinite(total):
        raise ProfileError("the matrix has a NaN or an infinite value; leave it out.")
    parts = matrix.reshape(n, rows // n, n, cols // n)
    blocks = parts.diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
    if rows > cols:
        blocks = blocks.mT
    squares = torch.linalg.eigvalsh(blocks @ blocks.mT).clamp_min(0).flip(-1)
    held = squares.sum(0).cumsum(0).cpu()
    return held / total.cpu() if total else torch.zeros_like(held)
