"""Stable rank: closed forms, and agreement with a matrix's norms."""

from __future__ import annotations

import pytest
import torch

from rankwise.errors import ProfileError
from rankwise.spectra import singular_values, stable_rank


def test_closed_forms() -> None:
    assert stable_rank(torch.full((5,), 3.0)) == pytest.approx(5)
    assert stable_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(1.5)
    assert stable_rank(torch.tensor([1e-200, 0.0], dtype=torch.float64)) == 1
    assert stable_rank(torch.zeros(4)) == 0


def test_agrees_with_the_norms_of_the_matrix() -> None:
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (torch.linalg.matrix_norm(matrix) / torch.linalg.matrix_norm(matrix, ord=2)) ** 2
    assert stable_rank(singular_values(matrix)) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_refuses_what_is_no_spectrum(bad: float) -> None:
    with pytest.raises(ProfileError, match="stable_rank"):
        stable_rank(torch.tensor([1.0, bad]))
