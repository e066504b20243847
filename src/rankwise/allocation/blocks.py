"""How many diagonal blocks an adapter gets."""

from __future__ import annotations

import math

_ROUNDING = 1 + 1e-12
"""Keeps a ratio that is a power of two on paper from being floored to the one below."""


def block_count(erank: float, rank: int, n_max: int) -> int:
    """How many diagonal blocks align an adapter of rank r with a GID.

    `n = 2^clip(floor(log2(erank / r)), 0, log2 n_max)` (RaLoRA Eq. 4, with the floor of its text
    and released code, which also keeps `n r <= erank`).

    Args:
        erank: Effective rank of the layer's gradient; 0 for a zero gradient gives one block.
        rank: Rank r of each block.
        n_max: Largest block count, a power of two.
    """
    ratio = erank / rank * _ROUNDING
    return min(2 ** math.floor(math.log2(ratio)), n_max) if ratio >= 1 else 1


def dividing_blocks(blocks: int, d_in: int, d_out: int) -> int:
    """The largest power of two that is at most `blocks` and divides both dimensions."""
    common = math.gcd(d_in, d_out)
    power = common & -common  # the largest power of two in gcd(d_in, d_out)
    return min(power, 2 ** math.floor(math.log2(blocks)))
