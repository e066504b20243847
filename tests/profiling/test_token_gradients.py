"""Gradients of few tokens, kept as factors: equal to the dense ones, and never formed unasked."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from batch_reference import measure
from rankwise.errors import ProfileError
from rankwise.profiling import BatchLoss, GradientProfile, reduce
from rankwise.profiling.staging import TOKEN_SPACE, GradientSum, TokenGradient, Use, dense
from rankwise.profiling.statistics import StreamingStatistics, sensitivity
from rankwise.spectra import effective_rank, token_gram

D_IN, D_OUT = 16, 20
uses_of_a_batch = st.lists(st.integers(1, 7), max_size=3)


class Branching(nn.Module):
    """Two layers that share their input, and one above."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D_IN, D_OUT), nn.Linear(D_IN, D_OUT)
        self.above = nn.Linear(D_OUT, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.above(torch.tanh(self.first(x)) * self.second(x))


def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
    return BatchLoss(model(batch["x"]).square().sum(-1).mean(), len(batch["x"]))


def profile_of(model: nn.Module, sizes: list[int], **options: Any) -> GradientProfile:
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    batches = [{"x": torch.randn(n, D_IN, generator=generator).to(dtype)} for n in sizes]
    settings = {"loss_fn": loss_fn, "statistics": ("convergence",)}
    return measure(model, batches, **(settings | options))


def autograd_mean(model: nn.Module, sizes: list[int]) -> dict[str, Tensor]:
    model = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(1)
    for n in sizes:
        x = torch.randn(n, D_IN, generator=generator).double()
        (loss_fn(model, {"x": x}).loss * n / sum(sizes)).backward()
    return {name: m.weight.grad for name, m in model.named_children()}


def assert_close(found: Tensor, expected: Tensor, rel: float) -> None:
    assert float((found - expected).norm()) <= rel * float(expected.norm())


@settings(max_examples=40)
@given(
    batches=st.lists(st.tuples(uses_of_a_batch, st.integers(1, 9), st.booleans()), max_size=6),
    convergence=st.booleans(),
)
def test_any_sequence_of_batches(
    batches: list[tuple[list[int], int, bool]], convergence: bool
) -> None:
    """Uses of any length, batches kept and dropped, before and after the sum is formed."""
    generator = torch.Generator().manual_seed(0)
    stream = GradientSum(convergence=convergence)
    expected = torch.zeros(D_OUT, D_IN).double()
    tokens = total = 0
    for sizes, items, kept in batches:
        for n in sizes:
            x, g = (torch.randn(n, d, generator=generator).double() for d in (D_IN, D_OUT))
            stream.add(x, g, items)
            if kept:
                expected += items * g.T @ x
                tokens += n
        if kept:
            stream.keep(items)
            total += items
        else:
            stream.drop()
    gradient, _, gids = stream.finish()
    if not tokens:
        assert gradient is None
        return
    assert gradient is not None
    assert isinstance(gradient, TokenGradient) == (tokens <= TOKEN_SPACE * D_IN)
    assert_close(dense(gradient), expected / total, 1e-12)
    if convergence:
        exact = effective_rank(torch.linalg.svdvals(expected))
        assert gids[-1] == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
@pytest.mark.parametrize("sizes", [[1], [4, 3], [4, 3, 5], [4, 3, 5, 2], [13], [3, 40, 2]])
def test_profile_against_autograd(sizes: list[int], dtype: torch.dtype, rel: float) -> None:
    """Twelve tokens are few for every layer, more are not."""
    model = Branching().to(dtype)
    expected = autograd_mean(model, sizes)
    profile = profile_of(model, sizes, keep_gradients=True)
    assert profile.gradients is not None and profile.convergence is not None
    for name, gradient in expected.items():
        spectrum = torch.linalg.svdvals(gradient)
        assert_close(profile.gradients[name], gradient, rel)
        assert_close(profile.singular_values[name], spectrum, rel)
        assert profile.gid[name] == pytest.approx(effective_rank(spectrum), rel=rel)
        assert float(profile.convergence[name][-1]) == pytest.approx(profile.gid[name], rel=1e-5)
        weight = model.get_submodule(name).weight.detach().double()
        entry = profile.modules[name]
        assert entry.gradient_norm == pytest.approx(float(gradient.norm()), rel=rel)
        assert entry.sensitivity == pytest.approx(float((weight * gradient).abs().mean()), rel=rel)


def test_gradient_is_formed_only_where_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    formed: list[str] = []
    form = TokenGradient.dense
    monkeypatch.setattr(TokenGradient, "dense", lambda self: formed.append("") or form(self))
    model = Branching()
    profile_of(model, [6, 6])
    assert not formed
    profile_of(model, [6, 6], keep_gradients=True)
    assert len(formed) == 3


def test_shared_input_is_factored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(x: Tensor) -> Tensor:
        calls.append(x.shape[1])
        return token_gram(x)

    monkeypatch.setattr(reduce, "token_gram", counted)
    profile_of(Branching(), [4, 5])
    assert calls == [D_IN, D_OUT]


def test_sensitivity_looks_at_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.profiling.statistics._ENTRIES", 3 * 7)  # three rows at a time
    weight, gradient = torch.randn(10, 7), torch.randn(10, 7)
    expected = float((weight * gradient).double().abs().mean())
    assert sensitivity(weight, gradient) == pytest.approx(expected, rel=1e-6)
    few = TokenGradient((Use(torch.randn(3, 7), torch.randn(3, 10), 0.5),))
    assert sensitivity(weight, few) == pytest.approx(sensitivity(weight, few.dense()), rel=1e-6)


def test_input_changed_in_place_is_looked_at_again() -> None:
    statistics = StreamingStatistics(["a", "b"])
    statistics.begin_batch(1, 3)
    x, g = torch.randn(3, 8), torch.randn(3, 8)
    statistics.consume("a", x, g)
    statistics.consume("b", x.detach(), g)
    assert statistics.end_batch() is None
    statistics.begin_batch(1, 3)
    statistics.consume("a", x, g)
    x[1, 1] = math.nan
    statistics.consume("b", x.detach(), g)
    assert statistics.end_batch() == "b"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sizes", [[4], [40]])
def test_spectrum_that_does_not_converge_names_the_module(
    sizes: list[int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(matrix: Tensor) -> Tensor:
        raise torch.linalg.LinAlgError("failed to converge")

    model, before = Branching(), torch.get_num_threads()
    expected = profile_of(model, sizes)
    monkeypatch.setattr(torch.linalg, "eigvalsh", diverge)
    again = profile_of(model, sizes)  # another driver takes over
    for name, values in expected.singular_values.items():
        assert_close(again.singular_values[name], values, 1e-9)
    monkeypatch.setattr(torch.linalg, "svdvals", diverge)
    torch.set_num_threads(threads)
    try:
        with pytest.raises(ProfileError, match=r"module first: .*do not converge"):
            profile_of(model, sizes, statistics=())
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
