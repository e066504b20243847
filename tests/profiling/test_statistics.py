"""Gram matrix, Fisher information, convergence and dropped batches, against autograd."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankwise.errors import FileError, ProfileError
from rankwise.profiling import BatchLoss, GradientProfile, model_loss, profile_gradients
from rankwise.profiling.loss import count_labels
from rankwise.profiling.profile import centred_gram
from rankwise.profiling.staging import prefixes
from rankwise.profiling.statistics import sample_square_norms
from rankwise.spectra import effective_rank, energy_rank, singular_values
from rankwise.targets import find_targets
from tiny_models import ARCHITECTURES, Batch, tiny_llama, token_batch

ALL = ("mean", "gram", "fisher", "convergence")
ROWS = [[9, 6], [5, 4, 7], [3], [8, 8], [2, 6, 6]]

architectures = pytest.mark.parametrize("architecture", list(ARCHITECTURES))
precisions = pytest.mark.parametrize(
    ("dtype", "rel"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"]
)


def gradient_of(module: nn.Module) -> Tensor:
    gradient = module.weight.grad
    return (gradient.T if isinstance(module, Conv1D) else gradient).clone()


def batch_gradients(model: nn.Module, batches: Sequence[Batch]) -> dict[str, list[Tensor]]:
    """Every target's `weight.grad` of each batch's own loss, in fp64."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    found: dict[str, list[Tensor]] = {name: [] for name in find_targets(model)}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, gradients in found.items():
            gradients.append(gradient_of(model.get_submodule(name)))
    return found


def exact_gram(gradients: Sequence[Tensor]) -> Tensor:
    flat = torch.stack([gradient.flatten() for gradient in gradients])
    return flat @ flat.T / len(gradients)


def model_and_batches(architecture: str) -> tuple[PreTrainedModel, list[Batch]]:
    make_model, make_batch = ARCHITECTURES[architecture]
    return make_model(), [make_batch(rows, seed=i) for i, rows in enumerate(ROWS)]


def measure(model: nn.Module, batches: Sequence[Batch], **options: Any) -> GradientProfile:
    settings: dict[str, Any] = {"batches": len(batches), "statistics": ALL, "engine": "hooks"}
    return profile_gradients(model, batches, **(settings | options))


def assert_close(found: Tensor, expected: Tensor, rel: float) -> None:
    assert float((found - expected).norm()) <= rel * float(expected.norm())


class TestGram:
    @precisions
    @architectures
    def test_against_autograd(self, architecture: str, dtype: torch.dtype, rel: float) -> None:
        model, batches = model_and_batches(architecture)
        expected = batch_gradients(model, batches)
        profile = measure(model.to(dtype), batches, keep_gradients=True)
        assert profile.gram is not None and profile.gradients is not None
        assert list(profile.gram) == list(profile.modules)
        items = torch.tensor(profile.provenance.batch_items, dtype=torch.float64)
        weights = items / items.sum()
        for name, gradients in expected.items():
            gram = profile.gram[name]
            assert gram.dtype == torch.float64
            assert_close(gram, exact_gram(gradients), rel)
            mean = sum(w * g for w, g in zip(weights.tolist(), gradients, strict=True))
            assert_close(profile.gradients[name], mean, rel)
            # the mean gradient's norm is in the Gram matrix too
            square = float(weights @ gram @ weights) * len(batches)
            assert profile.modules[name].gradient_norm ** 2 == pytest.approx(square, rel=1e-4)

    def test_the_mean_is_the_same_with_and_without(self) -> None:
        model, batches = model_and_batches("llama")
        with_gram = measure(model, batches, keep_gradients=True)
        plain = measure(model, batches, statistics=("mean",), keep_gradients=True)
        assert plain.gram is None and plain.convergence is None
        assert plain.gradients is not None and with_gram.gradients is not None
        for name, gradient in plain.gradients.items():
            assert_close(with_gram.gradients[name], gradient, 1e-5)
            assert plain.modules[name].fisher is None

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
    @precisions
    @architectures
    def test_against_one_sample_at_a_time(
        self, architecture: str, dtype: torch.dtype, rel: float
    ) -> None:
        model, batches = model_and_batches(architecture)
        samples = [
            {k: v[i : i + 1] for k, v in b.items()}
            for b in batches
            for i in range(len(b["input_ids"]))
        ]
        expected: dict[str, float] = dict.fromkeys(find_targets(model), 0.0)
        for sample, gradients in zip(
            samples, zip(*batch_gradients(model, samples).values(), strict=True), strict=True
        ):
            items = count_labels(model, sample["labels"])
            for name, gradient in zip(expected, gradients, strict=True):
                # of the loss summed over the sample's items
                expected[name] += float((gradient * items).square().mean()) / len(samples)
        profile = measure(model.to(dtype), batches, statistics=("fisher",))
        if architecture not in ("bert-mlm", "bert-classifier"):
            rel = max(rel, 1e-6)  # transformers computes these losses in fp32 whatever the model
        for name, value in expected.items():
            assert profile.modules[name].fisher == pytest.approx(value, rel=rel), name

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


def poisoned_loss(bad_batch: int, value: float, module: str) -> Callable[..., BatchLoss]:
    """The model's loss, with a NaN or an infinity in one module's output gradient on one batch."""
    seen = -1

    def poison(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        spoil = torch.ones_like(output)
        spoil[..., 0] = value
        output.register_hook(lambda gradient: gradient * spoil)
        return output

    def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
        nonlocal seen
        seen += 1
        if seen != bad_batch:
            return model_loss(model, batch)
        handle = model.get_submodule(module).register_forward_hook(poison)
        result = model_loss(model, batch)
        result.loss.register_hook(lambda _: handle.remove())
        return result

    return loss_fn


class TestDroppedBatches:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("statistics", [("mean",), ALL])
    @pytest.mark.parametrize("bad", [0, 5, 11])
    def test_batch_is_dropped_for_every_module(
        self, bad: int, statistics: Sequence[str], value: float, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = tiny_llama()
        batches = [token_batch([9, 3 + i % 4], seed=i) for i in range(12)]
        module = "model.layers.0.self_attn.o_proj"  # layer 1 is done when it is reached
        with caplog.at_level(logging.WARNING):
            profile = measure(
                model,
                batches,
                statistics=statistics,
                loss_fn=poisoned_loss(bad, value, "model.layers.0.mlp.up_proj"),
                keep_gradients=True,
            )
        good = batches[:bad] + batches[bad + 1 :]
        expected = measure(model, good, statistics=statistics, keep_gradients=True)
        assert f"batch {bad} is dropped: non-finite gradient in module {module}" in caplog.text
        assert profile.modules == expected.modules
        assert profile.gid == expected.gid
        for attribute in ("gram", "convergence", "gradients"):
            arrays, same = getattr(profile, attribute), getattr(expected, attribute)
            for name in arrays or ():
                assert torch.equal(arrays[name], same[name])
        provenance = profile.provenance
        assert provenance.dropped_batches == [bad]
        assert provenance.batches == 11
        assert provenance.batch_items == expected.provenance.batch_items
        assert provenance.data_fingerprint == expected.provenance.data_fingerprint
        assert "1 batches dropped" in str(profile)

    def test_more_than_a_tenth_is_an_error(self) -> None:
        batches = [token_batch([5], seed=i) for i in range(9)]
        loss_fn = poisoned_loss(3, math.nan, "model.layers.1.mlp.up_proj")
        with pytest.raises(
            ProfileError, match=r"module model\.layers\.1\.self_attn\.o_proj, batch 3:"
        ):
            measure(tiny_llama(), batches, loss_fn=loss_fn)

    def test_more_than_a_tenth_of_a_short_loader_is_an_error(self) -> None:
        batches = [token_batch([5], seed=i) for i in range(5)]
        loss_fn = poisoned_loss(3, math.nan, "model.layers.1.mlp.up_proj")
        with pytest.raises(ProfileError, match="more than 10% of the batches"):
            profile_gradients(tiny_llama(), batches, loss_fn=loss_fn, batches=64)

    def test_infinite_loss_with_a_finite_gradient(self) -> None:
        calls = iter(range(20))

        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            loss, items = model_loss(model, batch)
            return BatchLoss(loss + (math.inf if next(calls) == 4 else 0), items)

        batches = [token_batch([5], seed=i) for i in range(10)]
        profile = measure(tiny_llama(), batches, loss_fn=loss_fn)
        assert profile.provenance.dropped_batches == [4]

    def test_product_beyond_fp32(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3, bias=False))
        scales = iter([1.0] * 9 + [1e25])

        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            scale = next(scales)
            return BatchLoss((model(batch["x"] * scale) * scale).mean(), 2)

        batches = [{"x": torch.randn(2, 4)} for _ in range(10)]
        profile = measure(model, batches, loss_fn=loss_fn)
        assert profile.provenance.dropped_batches == [9]

    def test_unlabelled_batches_are_listed(self) -> None:
        empty = token_batch([6])
        empty["labels"] = torch.full_like(empty["labels"], -100)
        profile = measure(tiny_llama(), [token_batch([6]), empty, token_batch([4])])
        assert profile.provenance.unlabelled_batches == [1]
        assert profile.provenance.dropped_batches == []
        assert profile.provenance.batch_items == [5, 3]


class TestZeroGradients:
    def test_flagged(self, caplog: pytest.LogCaptureFixture) -> None:
        class Gated(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.gated, self.unused = (nn.Linear(4, 4) for _ in range(3))

            def forward(self, x: Tensor, labels: Tensor, gate: float) -> Any:
                h = self.first(x)
                h = h + gate * self.gated(h)
                return type("Output", (), {"loss": F.cross_entropy(h, labels)})

        generator = torch.Generator().manual_seed(0)
        batches = [
            {"x": torch.randn(3, 4, generator=generator), "labels": torch.arange(3), "gate": gate}
            for gate in (0.0, 1.0, 0.0)
        ]
        profile = measure(Gated(), batches)
        entries = profile.modules
        assert [entries[n].zero_batches for n in entries] == [0, 2, 0]
        assert [entries[n].batches for n in entries] == [3, 3, 0]
        assert [entries[n].has_gradient for n in entries] == [True, True, False]
        assert "unused: its gradient is zero on every batch" in caplog.text
        assert "1 modules without gradient" in str(profile)
        assert profile.gram is not None and profile.convergence is not None
        assert float(profile.gram["unused"].abs().max()) == 0
        assert profile.gram["gated"].count_nonzero() == 1
        assert profile.energy_ranks()["unused"] == 0
        assert entries["unused"].fisher == 0
        assert profile.convergence["unused"].tolist() == [0, 0, 0]
        assert profile.convergence["gated"][0] == 0


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
