"""Token space, top directions and drivers that do not converge, against an fp64 SVD."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rankwise.errors import ProfileError
from rankwise.spectra import (
    effective_rank,
    gram_eigenvalues,
    singular_values,
    token_gram,
    token_singular_values,
    top_singular,
)


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def decaying(rows: int, columns: int, decades: float, seed: int = 0) -> Tensor:
    """Rows like a layer's inputs: directions of very different weight."""
    mixing = gaussian(columns, columns, seed + 1) * torch.logspace(0, -decades, columns).double()
    return gaussian(rows, columns, seed) @ mixing.T


class TestTokenSpace:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
    @pytest.mark.parametrize("tokens", [1, 5, 30, 31, 40, 90])
    def test_against_svd(self, tokens: int, scale: float, dtype: torch.dtype) -> None:
        x = decaying(tokens, 30, 4).to(dtype)
        g = (decaying(tokens, 40, 2, seed=7) * scale).to(dtype)
        expected = torch.linalg.svdvals(g.double().T @ x.double())
        values = token_singular_values(x, g)
        assert values.shape == (30,) and values.dtype == torch.float64
        assert float((values - expected).abs().max()) <= 1e-8 * float(expected[0])
        assert effective_rank(values) == pytest.approx(effective_rank(expected), rel=1e-6)
        assert not values[tokens:].any()

    @pytest.mark.parametrize("d", [(64, 64), (48, 96), (96, 48)])
    def test_agrees_with_the_dense_path(self, d: tuple[int, int]) -> None:
        x, g = decaying(16, d[0], 5).float(), decaying(16, d[1], 3).float() * 1e-6
        dense = singular_values(g.double().T @ x.double())
        values = token_singular_values(x, g)
        assert effective_rank(values) == pytest.approx(effective_rank(dense), rel=2e-6)
        assert float((values - dense).abs().max()) <= 1e-8 * float(dense[0])

    def test_repeated_tokens_have_the_rank_of_the_different_ones(self) -> None:
        x, g = gaussian(3, 20).repeat(4, 1), gaussian(12, 20, seed=1)
        values = token_singular_values(x, g)
        assert int((values > 1e-12 * values[0]).sum()) == 3

    def test_shared_gram(self) -> None:
        x, g = gaussian(6, 40).float(), gaussian(6, 29, seed=1).float()
        gram = token_gram(x)
        assert torch.equal(token_singular_values(x, g, x_gram=gram), token_singular_values(x, g))
        assert not torch.equal(
            token_singular_values(x, g, x_gram=2 * gram), token_singular_values(x, g)
        )

    @pytest.mark.parametrize("alike", [0, 1, 4, 30])
    @pytest.mark.parametrize("decades", [1, 4, 8, 14])
    def test_erank_within_the_promise_whatever_the_tokens(self, alike: int, decades: int) -> None:
        x, g = decaying(60, 300, decades), decaying(60, 280, 3, seed=5)
        x[:alike] = x[-1]
        g[: alike // 2] = 0
        exact = effective_rank(torch.linalg.svdvals(g.T @ x))
        assert effective_rank(token_singular_values(x, g)) == pytest.approx(exact, rel=2e-6)

    def test_tokens_that_are_mostly_alike_are_decomposed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[int] = []
        qr = torch.linalg.qr
        monkeypatch.setattr(torch.linalg, "qr", lambda *a, **k: asked.append(1) or qr(*a, **k))
        token_singular_values(gaussian(12, 60), gaussian(12, 50, seed=2))
        assert not asked
        token_singular_values(gaussian(1, 60).repeat(12, 1), gaussian(12, 50, seed=2))
        assert len(asked) == 2
        token_singular_values(gaussian(12, 60), gaussian(12, 48, seed=2))
        assert len(asked) == 4

    def test_zero(self) -> None:
        assert token_singular_values(gaussian(3, 8), torch.zeros(3, 5)).tolist() == [0.0] * 5

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("which", [0, 1])
    def test_factor_that_is_not_finite_is_refused(self, which: int, bad: float) -> None:
        factors = [gaussian(4, 8), gaussian(4, 6)]
        factors[which][2, 3] = bad
        with pytest.raises(ProfileError, match="NaN or an infinity"):
            token_singular_values(*factors)


class TestTopDirections:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("decades", [1, 9])
    @pytest.mark.parametrize("shape", [(20, 30), (30, 20), (25, 25), (200, 7)])
    @pytest.mark.parametrize("k", [1, 4, 7])
    def test_against_svd(
        self, k: int, shape: tuple[int, int], decades: float, dtype: torch.dtype
    ) -> None:
        matrix = (decaying(*shape, decades) * 1e-6).to(dtype)
        expected = torch.linalg.svd(matrix.double(), full_matrices=False)
        u, values, v = top_singular(matrix, k)
        assert u.shape == (shape[0], k) and v.shape == (shape[1], k)
        assert torch.equal(values, values.sort(descending=True).values)
        first = float(expected.S[0])
        assert float((values - expected.S[:k]).abs().max()) <= 1e-12 * first
        for side in (u, v):
            assert float((side.T @ side - torch.eye(k, dtype=side.dtype)).abs().max()) < 1e-12
        assert float((matrix.double() @ v - u * values).abs().max()) <= 1e-11 * first
        best = (expected.U[:, :k] * expected.S[:k]) @ expected.Vh[:k]
        assert float((u * values @ v.T - best).abs().max()) <= 1e-8 * first

    @pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
    def test_signs_are_fixed(self, shape: tuple[int, int]) -> None:
        matrix = gaussian(*shape)
        u, _, v = top_singular(matrix, 5)
        assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())
        same_u, _, minus_v = top_singular(-matrix, 5)
        assert float((same_u - u).abs().max()) < 1e-10
        assert float((minus_v + v).abs().max()) < 1e-10

    def test_more_directions_than_the_rank(self) -> None:
        matrix = gaussian(12, 2) @ gaussian(2, 9, seed=1)
        u, values, v = top_singular(matrix, 9)
        assert float(values[2]) < 1e-12 * float(values[0])
        assert float((u * values @ v.T - matrix).abs().max()) < 1e-12
        assert float((u.T @ u - torch.eye(9)).abs().max()) < 1e-12

    def test_zero_matrix_has_orthogonal_directions(self) -> None:
        u, values, v = top_singular(torch.zeros(5, 3), 2)
        assert values.tolist() == [0.0, 0.0]
        for side in (u, v):
            assert torch.equal(side.T @ side, torch.eye(2, dtype=torch.float64))

    @pytest.mark.parametrize("k", [0, -1, 4])
    def test_impossible_number_is_refused(self, k: int) -> None:
        with pytest.raises(ProfileError, match=rf"k={k}; .*\(3, 5\) has 1 to 3"):
            top_singular(gaussian(3, 5), k)

    def test_matrix_that_is_not_finite_is_refused(self) -> None:
        with pytest.raises(ProfileError, match="top_singular: the matrix holds a NaN"):
            top_singular(torch.tensor([[1.0, math.nan]]), 1)


def failing(function: Callable[..., Any], times: float) -> Callable[..., Any]:
    left = times

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise torch.linalg.LinAlgError("failed to converge")
        return function(*args, **options)

    return wrapped


class TestDivergence:
    @pytest.mark.parametrize("times", [1, math.inf])
    @pytest.mark.parametrize("driver", ["eigvalsh", "eigh"])
    def test_another_driver_takes_over(
        self, driver: str, times: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        matrix = decaying(30, 20, 9)  # wide enough a range for both drivers to be used
        expected = torch.linalg.svd(matrix, full_matrices=False)
        original = getattr(torch.linalg, driver)
        monkeypatch.setattr(torch.linalg, driver, failing(original, times))
        values = singular_values(matrix)
        assert float((values - expected.S).abs().max()) <= 1e-12 * float(values[0])
        u, _, _ = top_singular(matrix, 2)
        overlap = (u.T @ expected.U[:, :2]).abs()
        assert float((overlap - torch.eye(2)).abs().max()) < 1e-10
        gram = matrix.T @ matrix
        assert float((gram_eigenvalues(gram) - expected.S**2).abs().max()) < 1e-10

    def test_when_no_driver_converges(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for driver in ("eigvalsh", "svdvals", "svd"):
            original = getattr(torch.linalg, driver)
            monkeypatch.setattr(torch.linalg, driver, failing(original, math.inf))
        for function in (singular_values, lambda m: top_singular(m, 1)):
            with pytest.raises(ProfileError, match=r"shape \(4, 4\) do not converge"):
                function(gaussian(6, 4))

    @pytest.mark.parametrize("weight", [1e-5, 3e-7, 1e-9])
    def test_many_small_values_are_seen(self, weight: float) -> None:
        """A spectrum whose effective rank hangs on values that a Gram matrix blurs."""
        spectrum = torch.full((200,), weight, dtype=torch.float64)
        spectrum[0] = 1
        left, right = (torch.linalg.qr(gaussian(200, 200, seed)).Q for seed in (1, 2))
        found = effective_rank(singular_values(left * spectrum @ right))
        assert found == pytest.approx(effective_rank(spectrum), rel=1e-7)
