"""Where the basis functions of a transfer function stand.

K points on `[-L, L]`: `"uniform"` `g_k = -L + 2 L (k - 1) / (K - 1)` (LR-LoRA section 3.3),
`"chebyshev"` `g_k = L cos((2 k - 1) pi / (2 K))`, in rising order, `"random"` uniform draws from a
seed, in rising order. A learned grid starts uniform (LR-LoRA tables 14 and 16).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

GridKind = Literal["uniform", "chebyshev", "random", "learned"]


@lru_cache(maxsize=64)
def grid_points(
    kind: GridKind, k: int, span: float, *, seed: int = 0, shift: float = 0.0
) -> Float[Tensor, " k"]:
    """The K points in fp64 on the CPU, in rising order; not to be changed in place.

    Args:
        kind: See the module's text.
        k: Number of points K, at least 2.
        span: Half width L of the interval.
        seed: Of `"random"`.
        shift: Added to every point, in cells `2 L / (K - 1)` of the uniform grid.

    >>> grid_points("uniform", 3, 3.0)
    tensor([-3.,  0.,  3.], dtype=torch.float64)
    """
    if kind == "chebyshev":
        angles = (2 * torch.arange(k, 0, -1, dtype=torch.float64, device="cpu") - 1) * (
            math.pi / (2 * k)
        )
        points = span * torch.cos(angles)
    elif kind == "random":
        generator = torch.Generator(device="cpu").manual_seed(seed)
        uniform = torch.rand(k, dtype=torch.float64, device="cpu", generator=generator)
        points = span * (2 * uniform.sort().values - 1)
    else:
        points = torch.linspace(-span, span, k, dtype=torch.float64, device="cpu")
    return points + shift * 2 * span / (k - 1)
