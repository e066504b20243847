"""The reverse layer sweep measures what hooks measure; test_architectures.py has the models."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankwise.errors import ProfileError
from rankwise.profiling import BatchLoss, model_loss, profile_gradients
from rankwise.targets import find_targets
from sweep_reference import ALL, assert_same, measure, model_and_batches
from tiny_models import tiny_gpt2, tiny_llama, token_batch


class TestAgainstHooks:
    @pytest.mark.parametrize("targets", [r".*layers\.1\..*_proj", ["layers.0.mlp.up_proj"]])
    def test_some_targets(self, targets: Any) -> None:
        model, batches = model_and_batches("llama", num_hidden_layers=3)
        found = measure(model, batches, targets=targets)
        assert found.provenance.engine == "sweep"
        assert_same(found, measure(model, batches, targets=targets, engine="hooks"), 1e-5)

    def test_dropout_is_drawn_alike(self) -> None:
        model = tiny_gpt2(resid_pdrop=0.3, attn_pdrop=0.2)
        batches = [token_batch([9, 6], seed=i) for i in range(3)]
        torch.manual_seed(5)
        found = measure(model, batches, train_mode=True)
        torch.manual_seed(5)
        expected = measure(model, batches, train_mode=True, engine="hooks")
        assert found.provenance.engine == "sweep"
        assert_same(found, expected, 1e-5)

    def test_own_loss(self) -> None:
        def last_logit(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
            return BatchLoss(logits[:, -1, 0].mean(), len(logits))

        model, batches = model_and_batches("llama")
        found = measure(model, batches, loss_fn=last_logit)
        assert found.provenance.engine == "sweep"
        assert_same(found, measure(model, batches, loss_fn=last_logit, engine="hooks"), 1e-5)

    def test_half_precision(self) -> None:
        model, batches = model_and_batches("llama")
        model = model.to(torch.bfloat16)
        found = measure(model, batches)
        assert found.provenance.engine == "sweep"
        assert_same(found, measure(model, batches, engine="hooks"), 5e-2)

    @pytest.mark.parametrize("where", ["everything", "the first layer"])
    def test_autocast(self, where: str) -> None:
        """A layer is run again in the precision that it ran in."""

        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            with torch.autocast("cpu", torch.bfloat16, enabled=where == "everything"):
                return model_loss(model, batch)

        model, batches = model_and_batches("llama")
        if where == "the first layer":
            layer = model.model.layers[0]
            layer.forward = torch.autocast("cpu", torch.bfloat16)(layer.forward)
        found = measure(model, batches, loss_fn=loss_fn)
        assert found.provenance.engine == "sweep"
        assert found.gradients is not None
        assert {gradient.dtype for gradient in found.gradients.values()} == {torch.float32}
        assert_same(found, measure(model, batches, loss_fn=loss_fn, engine="hooks"), 1e-5)
        plain = measure(tiny_llama(), batches).gradients
        assert plain is not None
        for name, gradient in found.gradients.items():
            error = float((gradient - plain[name]).norm() / plain[name].norm())
            assert 1e-5 < error < 0.1, name

    def test_unlabelled_batches(self) -> None:
        model, batches = model_and_batches("llama")
        batches[0] = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
        found = measure(model, batches)
        assert found.provenance.unlabelled_batches == [0]
        assert_same(found, measure(model, batches, engine="hooks"), 1e-5)
        with pytest.raises(ProfileError, match="none of the 1 batches has a labelled item"):
            measure(model, batches[:1])
        with pytest.raises(ProfileError, match="gave no batch"):
            profile_gradients(model, [], engine="sweep")


class TestChoice:
    @pytest.mark.parametrize(
        ("statistics", "engine"), [(("mean",), "hooks"), (("gram",), "sweep"), (ALL, "sweep")]
    )
    def test_auto(self, statistics: Sequence[str], engine: str) -> None:
        model, batches = model_and_batches("llama")
        profile = measure(model, batches, statistics=statistics, engine="auto")
        assert profile.provenance.engine == engine

    def test_unknown(self) -> None:
        with pytest.raises(ProfileError, match="engine='sweeep'; did you mean 'sweep'"):
            measure(tiny_llama(), [token_batch([5])], engine="sweeep")


def spoil_gradient(model: nn.Module, module: str, value: float) -> None:
    """A NaN or an infinity in one module's output gradient wherever three rows are in a batch."""

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        if output.requires_grad and len(output) == 3:
            output.register_hook(lambda gradient: gradient * value)

    model.get_submodule(module).register_forward_hook(hook)


class TestDroppedBatches:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize(
        ("spoiled", "named"),
        [
            ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
            ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
            ("model.norm", "model.layers.1"),
            ("lm_head", "model.layers.1"),
        ],
    )
    @pytest.mark.parametrize("bad", [0, 7, 11])
    def test_batch_is_dropped_for_every_module(
        self, bad: int, spoiled: str, named: str, value: float, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = tiny_llama()
        rows = [[9, 4, 4] if i == bad else [9, 3 + i % 4] for i in range(12)]
        batches = [token_batch(lengths, seed=i) for i, lengths in enumerate(rows)]
        expected = measure(model, batches[:bad] + batches[bad + 1 :])
        spoil_gradient(model, spoiled, value)
        with caplog.at_level(logging.WARNING):
            profile = measure(model, batches)
        assert f"batch {bad} is dropped: non-finite gradient in module {named} " in caplog.text
        assert profile.provenance.engine == "sweep"
        assert profile.provenance.dropped_batches == [bad]
        object.__setattr__(profile.provenance, "dropped_batches", [])
        assert_same(profile, expected, 1e-12)

    def test_too_many(self) -> None:
        model = tiny_llama()
        spoil_gradient(model, "model.layers.0.mlp.up_proj", math.nan)
        batches = [token_batch([5] * (3 if i in (2, 11) else 2), seed=i) for i in range(12)]
        with pytest.raises(ProfileError, match=r"layers\.0\.mlp\.up_proj, batch 11: more than"):
            measure(model, batches)


def test_only_one_layers_gradients_live() -> None:
    """All batches of a layer are reduced before the layer below is run again."""
    model, batches = model_and_batches("llama", num_hidden_layers=3)
    order: list[str] = []
    for name in find_targets(model, ["down_proj"]):
        hook = lambda _m, _i, _o, name=name: order.append(name)  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    measure(model, batches)
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    n = len(batches)
    # by hooks, forward, and back through one batch to compare; then all batches
    assert order[:9] == names + names + names[::-1]
    assert order[9 : 9 + 3 * n] == names * n
    assert order[9 + 3 * n :] == [name for name in names[::-1] for _ in range(n)]


def test_the_comparison_with_hooks_takes_one_sample() -> None:
    model = tiny_llama()
    batch = token_batch([4, 9, 7])  # the second sample has the most labels
    seen: list[tuple[int, ...]] = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape))
    try:
        profile = profile_gradients(model, [batch], batches=1, engine="sweep", progress=False)
    finally:
        handle.remove()
    assert profile.provenance.engine == "sweep"
    assert {shape[0] for shape in seen[:-1]} == {1}
    assert seen[-1][0] == 3


def test_an_own_loss_is_compared_on_the_whole_batch() -> None:
    seen: list[int] = []

    def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
        seen.append(len(batch["input_ids"]))
        return model_loss(model, batch)

    batch = token_batch([4, 9, 7])
    profile_gradients(
        tiny_llama(), [batch], batches=1, engine="sweep", loss_fn=loss_fn, progress=False
    )
    assert set(seen) == {3}
