"""The factor s in front of an update: by which rank it is divided, and what blocks do to it."""

from __future__ import annotations

import math

from rankwise.plan.block_options import BlockOptions, BlockScaling, RankScaling


def update_scaling(
    alpha: float,
    *,
    rank: int,
    r_ref: int,
    blocks: int,
    by: RankScaling = BlockOptions.rank_scaling,
    scaling: BlockScaling = BlockOptions.scaling,
) -> float:
    """The factor s of `delta_W = s blockdiag(B_1 A_1, ..., B_n A_n)`.

    `by` chooses the denominator under alpha: `r_ref`, the same for every layer (RaLoRA's released
    code); `r`, the layer's own rank (LoRA, Hu et al. 2022); `sqrt_r`, its root (rank-stabilised
    LoRA, Kalajdzievski 2023).

    `scaling="function"` multiplies s by sqrt(n). Derivation: an output of block i sees only the
    d_in / n inputs of its block. With B = 0 and A of variance v, `z = A_i x_i` has variance
    `v |x_i|^2`, on average 1/n of LoRA's `v |x|^2`. A first step of Adam moves every entry of B by
    the learning rate, so it moves the output by `s lr sum |z|`: sqrt(n) times less than LoRA's, and
    `s sqrt(n)` makes up for it. A first step of plain gradient descent moves B by `lr s g z'` and
    the output by `lr s^2 |z|^2 g`: n times less, and again `s sqrt(n)` makes up for it. So the
    function moves as far as LoRA's at the same alpha, rank and learning rate, at first. Drawing A
    with `init_fan_in="block"`, which multiplies its standard deviation by sqrt(n), does the same
    to the first step of B, but not to those of A that follow. `"paper"` leaves s as it is. Measured
    in `docs/results/block_scaling.md`.

    Args:
        alpha: LoRA's alpha.
        rank: Rank r of each block of the layer.
        r_ref: Reference rank, that of LoRA with the same budget.
        blocks: Diagonal blocks n.
        by: What alpha is divided by.
        scaling: What blocks make of it.

    >>> update_scaling(16, rank=2, r_ref=8, blocks=4)
    4.0
    >>> update_scaling(16, rank=2, r_ref=8, blocks=4, by="r", scaling="paper")
    8.0
    """
    denominator = {"r_ref": float(r_ref), "r": float(rank), "sqrt_r": math.sqrt(rank)}[by]
    return alpha / denominator * (math.sqrt(blocks) if scaling == "function" else 1.0)
