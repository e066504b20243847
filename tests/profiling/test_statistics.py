"""Gram matrix, Fisher information and convergence; test_architectures.py has the real models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from batch_reference import (
    assert_close,
    batch_gradients,
    exact_gram,
    measure,
    model_and_batches,
)
from rankwise.errors import FileError, ProfileError
from rankwise.profiling import BatchLoss, GradientProfile, model_loss, profile_gradients
from rankwise.profiling.profile import centred_gram
from rankwise.profiling.staging import prefixes
from rankwise.profiling.statistics import sample_square_norms
from rankwise.spectra import effective_rank, energy_rank, singular_values
from tiny_models import tiny_llama, token_batch


class TestGram:
    def test_the_mean_is_the_same_with_and_without(self) -> None:
        model, batches = model_and_batches("llama")
        with_gram = measure(model, batches, keep_gradients=True)
        plain = measure(model, batches, statistics=("mean",), keep_gradients=True)
        assert plain.gram is None and plain.convergence is None
        assert plain.gradients is not None and with_gram.gradients is not None
        for name, gradient in plain.gradients.items():
            assert_close(with_gram.gradients[name], gradient, 1e-5)
            assert plain.modules[name].fisher is None

    def test_rows_in_pieces_are_the_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, batches = model_and_batches("llama")
        whole = measure(model, batches, keep_gradients=True)
        assert whole.gram is not None and whole.gradients is not None
        # three rows of the narrowest layers at a time, one of the others
        monkeypatch.setattr("rankwise.profiling.staging._BLOCK", 3 * len(batches) * 16)
        pieces = measure(model, batches, keep_gradients=True)
        assert pieces.gram is not None and pieces.gradients is not None
        for name in whole.modules:
            assert_close(pieces.gram[name], whole.gram[name], 1e-6)
            assert_close(pieces.gradients[name], whole.gradients[name], 1e-6)

    @pytest.mark.parametrize("scale", [1e-25, 1e10])
    def test_scale(self, scale: float) -> None:
        def scaled(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            loss, items = model_loss(model, batch)
            return BatchLoss(loss * scale, items)

        model, batches = model_and_batches("llama")
        one, other = measure(model, batches), measure(model, batches, loss_fn=scaled)
        assert one.gram is not None and other.gram is not None
        assert one.energy_crossings() == pytest.approx(other.energy_crossings(), rel=1e-4)
        for name, gram in one.gram.items():
            assert_close(other.gram[name] / scale**2, gram, 1e-4)

    def test_energy_rank_counts_distinct_batches(self) -> None:
        model = tiny_llama()
        first, second = token_batch([9, 8], seed=1), token_batch([9, 8], seed=2)
        profile = measure(model, [first, second, first, second, first])
        assert profile.gram is not None
        for name in profile.modules:
            values = torch.linalg.eigvalsh(profile.gram[name]).flip(0)
            assert float(values[2]) < 1e-6 * float(values[0])
        assert max(profile.energy_ranks(1 - 1e-6).values()) == 2
        assert set(profile.energy_ranks(0.1).values()) == {1}
        same = measure(model, [first] * 3)
        assert set(same.energy_ranks(0.999).values()) == {1}

    def test_centred(self) -> None:
        model, batches = model_and_batches("llama")
        profile = measure(model, batches)
        assert profile.gram is not None
        for name, gradients in batch_gradients(model, batches).items():
            mean = torch.stack(gradients).mean(0)
            expected = exact_gram([gradient - mean for gradient in gradients])
            assert_close(centred_gram(profile.gram[name]), expected, 1e-5)
            rank = profile.energy_ranks(0.9, centred=True)[name]
            assert rank == energy_rank(torch.linalg.eigvalsh(expected).clamp_min(0))

    def test_profile_without_says_so(self) -> None:
        profile = measure(tiny_llama(), [token_batch([5])], statistics=("mean",))
        with pytest.raises(ProfileError, match=r"statistics=\('mean', 'gram'\)"):
            profile.energy_ranks()


class TestFisher:
    @pytest.mark.parametrize(("tokens", "d_in", "d_out"), [(3, 8, 12), (40, 8, 12), (1, 1, 1)])
    def test_short_and_long_samples(self, tokens: int, d_in: int, d_out: int) -> None:
        uses = [(torch.randn(4, tokens, d_in), torch.randn(4, tokens, d_out)) for _ in range(2)]
        uses = [(x.double() * 1e-30, g.double() * 1e-20) for x, g in uses]
        expected = [float(sum(g[i].T @ x[i] for x, g in uses).norm()) ** 2 for i in range(4)]
        assert sample_square_norms(uses).tolist() == pytest.approx(expected, rel=1e-10)

    def test_module_called_twice(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(6, 6)

            def forward(self, x: Tensor, labels: Tensor) -> Any:
                logits = self.layer(torch.tanh(self.layer(x)))
                return type("Output", (), {"loss": F.cross_entropy(logits, labels)})

        model = Twice().double()
        batch = {"x": torch.randn(5, 6).double(), "labels": torch.randint(0, 6, (5,))}
        profile = profile_gradients(model, [batch], batches=1, statistics=("gram", "fisher"))
        expected, mean = 0.0, torch.zeros(6, 6).double()
        for i in range(5):
            model.zero_grad()
            model(batch["x"][i : i + 1], batch["labels"][i : i + 1]).loss.backward()
            expected += float(model.layer.weight.grad.square().mean()) / 5
            mean += model.layer.weight.grad / 5
        assert profile.modules["layer"].fisher == pytest.approx(expected, rel=1e-10)
        assert profile.gram is not None
        assert float(profile.gram["layer"]) == pytest.approx(float(mean.square().sum()), rel=1e-10)

    def test_samples_must_come_first(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3))

        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            return BatchLoss(model(batch["x"].transpose(0, 1)).square().mean(), 2)

        with pytest.raises(ProfileError, match=r"module 0 has shape \(5, 2, 4\).*2 samples"):
            measure(model, [{"x": torch.randn(2, 5, 4)}], loss_fn=loss_fn)


class TestConvergence:
    @pytest.mark.parametrize("statistics", [("convergence",), ("gram", "convergence")])
    def test_gid_of_every_prefix(self, statistics: Sequence[str]) -> None:
        model, batches = model_and_batches("llama")
        profile = measure(model, batches, statistics=statistics)
        assert profile.convergence is not None
        assert profile.convergence_batches == [1, 2, 4, 5]
        for column, n in enumerate(profile.convergence_batches):
            shorter = measure(model, batches[:n], statistics=())
            for name, gid in shorter.gid.items():
                assert float(profile.convergence[name][column]) == pytest.approx(gid, rel=1e-4)

    @pytest.mark.parametrize(
        ("n", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8])]
    )
    def test_prefixes(self, n: int, expected: list[int]) -> None:
        assert prefixes(n) == expected
        profile = measure(tiny_llama(), [token_batch([5], seed=i) for i in range(n)])
        assert profile.convergence is not None
        assert {len(curve) for curve in profile.convergence.values()} == {len(expected)}


@pytest.mark.parametrize("statistics", [("everything",), "gramm", ("mean", "garm")])
def test_unknown_statistic(statistics: Any) -> None:
    with pytest.raises(ProfileError, match="statistics: "):
        measure(tiny_llama(), [token_batch([5])], statistics=statistics)


class TestFiles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        model, batches = model_and_batches("llama")
        profile = measure(model, batches)
        profile.save(tmp_path / "profile")
        again = GradientProfile.load(tmp_path / "profile")
        assert again.modules == profile.modules
        assert again.provenance == profile.provenance
        assert again.energy_crossings() == profile.energy_crossings()
        for attribute in ("gram", "convergence"):
            before, after = getattr(profile, attribute), getattr(again, attribute)
            assert list(before) == list(after)
            assert all(torch.equal(before[name], after[name]) for name in before)
        return tmp_path / "profile"

    def test_roundtrip(self, folder: Path) -> None:
        assert sorted(path.name for path in folder.iterdir()) == [
            "convergence.safetensors", "gram.safetensors", "profile.json", "spectra.safetensors",
        ]  # fmt: skip

    @pytest.mark.parametrize("file", ["gram.safetensors", "convergence.safetensors"])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda a: a[:-1], "has shape"),
            (lambda a: a * math.nan, "is not finite"),
            (
                lambda a: a.clone().view(-1).index_fill_(0, torch.tensor([0]), -1.0).view(a.shape),
                "neg",
            ),
        ],
    )
    def test_bad_arrays(
        self, folder: Path, file: str, change: Callable[[Tensor], Tensor], message: str
    ) -> None:
        arrays = load_file(folder / file)
        name = next(iter(arrays))
        arrays[name] = change(arrays[name]).contiguous()
        save_file(arrays, folder / file)
        with pytest.raises(FileError, match=message) as info:
            GradientProfile.load(folder)
        assert name in str(info.value) and str(folder / file) in str(info.value)

    def test_gram_matrix_is_symmetric(self, folder: Path) -> None:
        arrays = load_file(folder / "gram.safetensors")
        next(iter(arrays.values()))[0, 1] *= 2
        save_file(arrays, folder / "gram.safetensors")
        with pytest.raises(FileError, match="not symmetric"):
            GradientProfile.load(folder)


def test_staged_products_and_factors_agree() -> None:
    """Batches of few tokens are held as factors, long ones as products; both add up."""
    model = tiny_llama().double()
    batches = [token_batch([2], seed=1), token_batch([40, 40], seed=2), token_batch([3], seed=3)]
    profile = measure(model, batches, keep_gradients=True)
    assert profile.gradients is not None and profile.gram is not None
    for name, gradients in batch_gradients(model, batches).items():
        weights = [n / sum(profile.provenance.batch_items) for n in profile.provenance.batch_items]
        mean = sum(w * g for w, g in zip(weights, gradients, strict=True))
        assert_close(profile.gradients[name], mean, 1e-10)
        assert_close(profile.gram[name], exact_gram(gradients), 1e-10)
        assert profile.gid[name] == pytest.approx(effective_rank(singular_values(mean)), rel=1e-9)
