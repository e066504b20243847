"""Effective rank: cost and error against a full SVD, the released RaLoRA code's way."""

from __future__ import annotations

import torch

from benchmarks.timing import Row, at_most, interleaved
from rankwise.spectra import effective_rank, singular_values, token_singular_values

# (d_out, d_in), runs, largest allowed share of the full SVD's time
SIZES = [((576, 576), 9, 0.55), ((1536, 576), 9, 0.30), ((4096, 4096), 1, 0.30)]
# side, tokens, runs, the same; the target is for up to a quarter as many tokens as the side has
TOKENS = [(576, 128, 9, 0.07), (2048, 128, 3, 0.01), (2048, 512, 3, None)]


def _gradient_like(rows: int, columns: int) -> torch.Tensor:
    """A spectrum that falls like a gradient's: singular values ~ 1/i, times 1e-6."""
    k = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, k, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, k, dtype=torch.float64)).Q
    values = 1e-6 / torch.arange(1, k + 1, dtype=torch.float64)
    return ((left * values) @ right.T).float()


def measure(*, quick: bool) -> list[Row]:
    """From matrices and from few tokens."""
    return _from_matrices(quick=quick) + _from_tokens(quick=quick)


def _from_matrices(*, quick: bool) -> list[Row]:
    """Time ratio at each size, and the worst relative error of the effective rank."""
    rows = []
    worst = 0.0
    for (d_out, d_in), runs, limit in SIZES[: 2 if quick else None]:
        gradient = _gradient_like(d_out, d_in)
        seconds = interleaved(
            3 if quick else runs,
            ours=lambda g=gradient: singular_values(g),
            svd=lambda g=gradient: torch.linalg.svd(g),
        )
        name = f"erank of {d_out} x {d_in}, time"
        rows.append(at_most(name, seconds["ours"] / seconds["svd"], limit, "of full fp32 SVD"))
        exact = effective_rank(torch.linalg.svdvals(gradient.double()))
        worst = max(worst, abs(effective_rank(singular_values(gradient)) / exact - 1))
    rows.append(at_most("erank, worst relative error", worst, 1e-6, "against fp64 SVD"))
    return rows


def _from_tokens(*, quick: bool) -> list[Row]:
    """The same from inputs and output gradients, against the SVD of their product."""
    rows = []
    worst = 0.0
    for side, tokens, runs, limit in TOKENS[: 1 if quick else None]:
        # tokens of a text share directions, and few of them have most of the gradient
        x = torch.randn(tokens, side) @ _gradient_like(side, side) * 1e6
        g = torch.logspace(-6, -9, tokens)[:, None] * torch.randn(tokens, side)
        gradient = g.T @ x
        seconds = interleaved(
            runs,
            ours=lambda x=x, g=g: token_singular_values(x, g),
            svd=lambda gradient=gradient: torch.linalg.svd(gradient),
        )
        name = f"erank of {side} x {side} from {tokens} tokens, time"
        ratio = seconds["ours"] / seconds["svd"]
        if limit is None:
            rows.append(Row(name, ratio, "of full fp32 SVD"))
        else:
            rows.append(at_most(name, ratio, limit, "of full fp32 SVD"))
        exact = effective_rank(torch.linalg.svdvals(g.double().T @ x.double()))
        worst = max(worst, abs(effective_rank(token_singular_values(x, g)) / exact - 1))
    rows.append(at_most("erank from tokens, worst relative error", worst, 2e-6, "of fp64 SVD"))
    return rows
