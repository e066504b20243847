"""Which matrices lose less in diagonal blocks than in LoRA of the same size (RaLoRA, App. C)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.errors import ProfileError
from rankwise.spectra import block_energy


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d: int, seed: int) -> Tensor:
    """An orthogonal matrix without a preferred direction."""
    q, r = torch.linalg.qr(draw(d, d, seed=seed))
    return q * r.diagonal().sign()


def with_spectrum(sigma: Tensor, seed: int = 0) -> Tensor:
    """A square matrix of these singular values and random singular vectors."""
    d = len(sigma)
    return rotation(d, 2 * seed) * sigma @ rotation(d, 2 * seed + 1)


@settings(max_examples=30)
@given(
    n=st.sampled_from([1, 2, 4]),
    rows=st.integers(1, 6),
    cols=st.integers(1, 6),
    r=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_the_error_is_that_of_the_best_blocks(
    n: int, rows: int, cols: int, r: int, seed: int
) -> None:
    """Eq. 28 word for word, with the blocks cut out one by one."""
    matrix = draw(n * rows, n * cols, seed=seed)
    r = min(r, rows, cols)
    best = torch.zeros_like(matrix)
    for p in range(n):
        part = slice(p * rows, (p + 1) * rows), slice(p * cols, (p + 1) * cols)
        u, s, v = torch.linalg.svd(matrix[part], full_matrices=False)
        best[part] = u[:, :r] * s[:r] @ v[:r]
    error = (matrix - best).square().sum() / matrix.square().sum()
    held = block_energy(matrix, n)
    assert len(held) == min(rows, cols)
    assert float(1 - held[r - 1]) == pytest.approx(float(error), abs=1e-12)
    outside = matrix - torch.block_diag(
        *(matrix[p * rows : (p + 1) * rows, p * cols : (p + 1) * cols] for p in range(n))
    )
    truncated = outside.square().sum() / matrix.square().sum()
    assert float(1 - held[-1]) == pytest.approx(float(truncated), abs=1e-12)


class TestClosedForms:
    @pytest.mark.parametrize("n", [2, 4, 8])
    def test_aligned_blocks_hold_n_times_as_much(self, n: int) -> None:
        """The case that the paper argues from: the energy is in the blocks, and flat."""
        matrix = torch.block_diag(*(rotation(16, seed) for seed in range(n)))
        for r in (1, 4, 16):
            assert float(block_energy(matrix, n)[r - 1]) == pytest.approx(r / 16)
            assert float(block_energy(matrix)[r - 1]) == pytest.approx(r / 16 / n)

    @pytest.mark.parametrize("n", [2, 8])
    def test_one_direction_is_held_by_lora_and_mostly_lost_by_blocks(self, n: int) -> None:
        u, v = draw(64, seed=1), draw(32, seed=2)
        matrix = torch.outer(u, v)
        assert float(block_energy(matrix)[0]) == pytest.approx(1)
        parts = u.reshape(n, -1).square().sum(1) * v.reshape(n, -1).square().sum(1)
        expected = float(parts.sum() / (u.square().sum() * v.square().sum()))
        assert float(block_energy(matrix, n)[0]) == pytest.approx(expected)
        assert expected < 2 / n

    @pytest.mark.parametrize("n", [2, 4, 16])
    def test_a_flat_spectrum_gains_4_parts_less_4_nths(self, n: int) -> None:
        """LoRA holds r / d of an orthogonal matrix.

        A block is a corner of it, whose squared singular values reach up to 4 (1/n) (1 - 1/n) (the
        edge of the Jacobi ensemble), so n blocks of small rank r hold up to 4 (1 - 1/n) r / d.
        """
        d, r = 512, 1
        matrix = with_spectrum(torch.ones(d, dtype=torch.float64))
        assert float(block_energy(matrix)[r - 1]) == pytest.approx(r / d)
        gain = float(block_energy(matrix, n)[r - 1]) / (r / d)
        assert gain == pytest.approx(4 * (1 - 1 / n), rel=0.1)
        assert float(block_energy(matrix, n)[-1]) == pytest.approx(1 / n, rel=0.05)

    @pytest.mark.parametrize("n", [2, 4, 16])
    def test_noise_gains_nothing(self, n: int) -> None:
        """The edge of d x d noise is 2 sqrt(d) (Marchenko, Pastur), so both hold up to 4 r / d."""
        d, r = 512, 2
        matrix = draw(d, d)
        lora, blocks = float(block_energy(matrix)[r - 1]), float(block_energy(matrix, n)[r - 1])
        assert lora == pytest.approx(4 * r / d, rel=0.1)
        assert 0.6 * lora < blocks < lora

    @pytest.mark.parametrize("n", [2, 4, 16])
    def test_a_decaying_spectrum_loses(self, n: int) -> None:
        """`sigma_i = 1 / i`: LoRA's 8 directions hold 93 % of the energy, blocks at most 1/n."""
        matrix = with_spectrum(1 / torch.arange(1, 257, dtype=torch.float64))
        assert float(block_energy(matrix)[7]) > 0.92
        assert float(block_energy(matrix, n)[7]) < 1.2 / n

    def test_at_full_rank_of_the_blocks_a_flat_spectrum_is_a_draw(self) -> None:
        d, n = 256, 8
        matrix = with_spectrum(torch.ones(d, dtype=torch.float64))
        lora, blocks = block_energy(matrix)[d // n - 1], block_energy(matrix, n)[-1]
        assert float(blocks) == pytest.approx(float(lora), rel=0.05)


def test_wide_tall_and_half_precision() -> None:
    matrix = draw(8, 24).bfloat16()
    wide = block_energy(matrix, 4)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, block_energy(matrix.T, 4))
    torch.testing.assert_close(wide, block_energy(matrix.double(), 4))


def test_zero_is_nothing_held() -> None:
    assert block_energy(torch.zeros(4, 6), 2).tolist() == [0, 0]


@pytest.mark.parametrize("n", [0, 3, -1])
def test_blocks_that_do_not_divide(n: int) -> None:
    with pytest.raises(ProfileError, match=f"n={n} must be at least 1 and divide both sides of 4"):
        block_energy(torch.zeros(4, 8), n)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite(value: float) -> None:
    with pytest.raises(ProfileError, match="NaN or an infinite"):
        block_energy(torch.full((4, 4), value))
