from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from transformers import PreTrainedModel

from gradient_reference import (
    assert_gradients,
    autograd_gradients,
    measure,
)
from rankwise.errors import ProfileError, TargetError
from rankwise.profiling import BatchLoss, model_loss, profile_gradients
from rankwise.provenance import model_fingerprint
from tiny_models import (
    Batch,
    class_batch,
    tiny_gpt2,
    tiny_llama,
    token_batch,
)


def hooks(model: nn.Module) -> list[tuple[int, ...]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [tuple(len(getattr(module, kind)) for kind in kinds) for module in model.modules()]


class Snapshot:
    """Everything about a model and the process that profiling must give back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.requires_grad = [p.requires_grad for p in model.parameters()]
        self.modes = [module.training for module in model.modules()]
        self.hooks = hooks(model)
        self.random = torch.get_rng_state()
        self.python_random = random.getstate()

    def assert_unchanged(self) -> None:
        model = self.model
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, self.weights[name]), name
            assert parameter.grad is None, name
        assert [p.requires_grad for p in model.parameters()] == self.requires_grad
        assert [module.training for module in model.modules()] == self.modes
        assert hooks(model) == self.hooks
        assert torch.equal(torch.get_rng_state(), self.random)
        assert random.getstate() == self.python_random


@pytest.fixture
def uneven_model() -> PreTrainedModel:
    """A model in a state that no blanket reset would restore."""
    model = tiny_gpt2(resid_pdrop=0.2)
    model.train()
    model.transformer.h[0].mlp.eval()
    model.transformer.wte.weight.requires_grad_(False)
    model.transformer.h[1].attn.c_attn.weight.requires_grad_(False)
    model.transformer.h[1].register_forward_hook(lambda *_: None)
    return model


class TestEverythingIsGivenBack:
    @pytest.mark.parametrize("train_mode", [False, True])
    def test_after_success(self, uneven_model: PreTrainedModel, train_mode: bool) -> None:
        before = Snapshot(uneven_model)
        profile = profile_gradients(uneven_model, [token_batch([6])] * 2, train_mode=train_mode)
        before.assert_unchanged()
        assert profile.provenance.train_mode is train_mode

    @pytest.mark.parametrize("engine", ["hooks", "sweep"])
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_after_an_error_in_the_loader(
        self, uneven_model: PreTrainedModel, error: type[BaseException], engine: str
    ) -> None:
        def loader() -> Iterator[Batch]:
            yield token_batch([6])
            torch.rand(3)
            raise error("from the loader")

        before = Snapshot(uneven_model)
        with pytest.raises(error, match="from the loader"):
            profile_gradients(uneven_model, loader(), train_mode=True, engine=engine)
        before.assert_unchanged()

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_after_an_error_in_the_loss(
        self, uneven_model: PreTrainedModel, error: type[BaseException], when: str
    ) -> None:
        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            if when == "after":
                model_loss(model, batch)
            raise error("from the loss")

        before = Snapshot(uneven_model)
        with pytest.raises(error, match="from the loss"):
            profile_gradients(uneven_model, [token_batch([6])], loss_fn=loss_fn, train_mode=True)
        before.assert_unchanged()

    def test_after_an_interrupt_in_the_backward_pass(self, uneven_model: PreTrainedModel) -> None:
        def stop(_gradient: Tensor) -> None:
            raise KeyboardInterrupt

        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            loss, count = model_loss(model, batch)
            loss.register_hook(stop)
            return BatchLoss(loss, count)

        before = Snapshot(uneven_model)
        with pytest.raises(KeyboardInterrupt):
            profile_gradients(uneven_model, [token_batch([6])], loss_fn=loss_fn)
        before.assert_unchanged()

    def test_progress_bar_stops_with_the_error(
        self,
        tiny_llama: PreTrainedModel,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
        hide_cursor, show_cursor = "\x1b[?25l", "\x1b[?25h"

        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            raise ValueError("from the loss")

        with pytest.raises(ValueError, match="from the loss") as info:
            profile_gradients(tiny_llama, [token_batch([6])], loss_fn=loss_fn)
        shown = capsys.readouterr().err
        assert hide_cursor in shown, "the bar was shown"
        assert show_cursor in shown.rpartition(hide_cursor)[2]
        assert info.tb is not None, "still held, and with it every frame"

    def test_after_our_own_errors(self, uneven_model: PreTrainedModel) -> None:
        before = Snapshot(uneven_model)
        with pytest.raises(ProfileError):
            profile_gradients(uneven_model, [])
        with pytest.raises(TargetError):
            profile_gradients(uneven_model, [token_batch([6])], ["lm_head"])
        before.assert_unchanged()

    def test_the_random_state_that_a_collator_draws_from(self, tiny_llama: PreTrainedModel) -> None:
        def collated(samples: list[Batch]) -> Batch:
            np.random.rand()
            random.random()
            return samples[0]

        python = random.getstate()
        before = np.random.get_state()[1].tolist(), np.random.get_state()[2]
        profile_gradients(tiny_llama, DataLoader([token_batch([6])], collate_fn=collated))
        assert (np.random.get_state()[1].tolist(), np.random.get_state()[2]) == before
        assert random.getstate() == python

    @pytest.mark.parametrize("owner", ["loader", "sampler", "batch_sampler"])
    def test_the_generators_of_a_loader(self, tiny_llama: PreTrainedModel, owner: str) -> None:
        batches = [token_batch([6], seed=i) for i in range(3)]
        generator = torch.Generator().manual_seed(5)
        sampler = RandomSampler(batches, generator=generator)
        options = {
            "loader": {"shuffle": True, "generator": generator},
            "sampler": {"sampler": sampler},
            "batch_sampler": {"batch_sampler": BatchSampler(sampler, 1, drop_last=False)},
        }
        loader = DataLoader(batches, collate_fn=lambda samples: samples[0], **options[owner])
        before = generator.get_state()
        profile_gradients(tiny_llama, loader, batches=2)
        assert torch.equal(generator.get_state(), before)

    def test_running_statistics(self) -> None:
        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            return BatchLoss(model(batch["x"]).square().mean(), 5)

        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        buffers = dict(model.named_buffers())
        before = {name: buffer.clone() for name, buffer in buffers.items()}
        batch = {"x": torch.randn(5, 4)}
        profile_gradients(model, [batch], loss_fn=loss_fn, train_mode=True)
        for name, buffer in model.named_buffers():
            assert buffer is buffers[name] and torch.equal(buffer, before[name]), name

    def test_an_earlier_gradient_is_left_alone(self, tiny_llama: PreTrainedModel) -> None:
        weight = tiny_llama.model.layers[0].mlp.up_proj.weight
        weight.grad = torch.ones_like(weight)
        profile_gradients(tiny_llama, [token_batch([6])])
        assert torch.equal(weight.grad, torch.ones_like(weight))


class TestModes:
    def test_dropout_is_off_by_default(self) -> None:
        model = tiny_gpt2(resid_pdrop=0.5).train()
        batches = [token_batch([6])]
        expected = autograd_gradients(model.eval(), batches)
        model.train()
        assert_gradients(measure(model, batches), expected, 1e-5)

    def test_dropout_can_be_on(self) -> None:
        model, batches = tiny_gpt2(resid_pdrop=0.5).eval(), [token_batch([6])]
        off, on = measure(model, batches), measure(model, batches, train_mode=True)
        assert off.gradients is not None and on.gradients is not None
        assert any(not torch.allclose(off.gradients[n], on.gradients[n]) for n in off.gradients)

    def test_same_call_same_numbers(self, tiny_llama: PreTrainedModel) -> None:
        batches = [token_batch([6, 4], seed=i) for i in range(2)]
        first, second = measure(tiny_llama, batches), measure(tiny_llama, batches)
        assert first.modules == second.modules
        assert first.gid == second.gid

    def test_works_where_gradients_are_switched_off(self, tiny_llama: PreTrainedModel) -> None:
        batches = [token_batch([6])]
        expected = autograd_gradients(tiny_llama, batches)
        with torch.no_grad():
            assert_gradients(measure(tiny_llama, batches), expected, 1e-5)


halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


class TestHalfPrecision:
    @halves
    def test_half_model_gives_fp32_statistics(self, dtype: torch.dtype) -> None:
        model, batches = tiny_llama().to(dtype), [token_batch([9, 6])]
        profile = measure(model, batches)
        assert f"torch.{profile.provenance.dtype}" == str(dtype)
        assert profile.gradients is not None
        for name, gradient in profile.gradients.items():
            assert gradient.dtype == torch.float32
            # more digits than a half holds: the sums were not rounded on the way
            assert not torch.equal(gradient, gradient.to(dtype).float()), name
            assert profile.singular_values[name].dtype == torch.float64

    @halves
    @pytest.mark.parametrize("engine", ["hooks", "sweep"])
    def test_gid_is_close_to_fp32(self, dtype: torch.dtype, engine: str) -> None:
        model = tiny_llama(initializer_range=0.1).to(dtype)
        batches = [token_batch([12, 12, 12, 12], seed=i) for i in range(4)]
        half = measure(model, batches, engine=engine)
        full = measure(model.float(), batches, engine=engine)
        assert half.provenance.engine == engine
        for name, gid in full.gid.items():
            assert half.gid[name] == pytest.approx(gid, rel=0.05), name

    @pytest.mark.parametrize("engine", ["hooks", "sweep"])
    def test_fp16_does_not_underflow_in_the_mean_over_many_tokens(self, engine: str) -> None:
        """dL/dlogit is (p - y) / 4096 here; unscaled, GIDs are 17 % and norms 53 % off."""
        model = tiny_llama(initializer_range=0.02, max_position_embeddings=512).half()
        batches = [token_batch([512] * 8, seed=i) for i in range(2)]
        statistics = ("mean", "gram", "fisher")
        half = measure(model, batches, engine=engine, statistics=statistics)
        full = measure(model.float(), batches, engine=engine, statistics=statistics)
        assert half.provenance.engine == engine
        for name, exact in full.modules.items():
            found = half.modules[name]
            assert half.gid[name] == pytest.approx(full.gid[name], rel=0.01), name
            assert found.gradient_norm == pytest.approx(exact.gradient_norm, rel=0.01)
            assert found.sensitivity == pytest.approx(exact.sensitivity, rel=0.01)
            assert found.fisher == pytest.approx(exact.fisher, rel=0.02)
            assert half.gram and full.gram
            off = (half.gram[name] - full.gram[name]).norm()
            assert full.gram[name].norm() > 0 and off < 0.02 * full.gram[name].norm()


class TestProvenance:
    def test_says_what_was_measured(self, llama_batches: list[Batch]) -> None:
        model = tiny_llama()
        profile = profile_gradients(model, llama_batches, batches=3)
        provenance = profile.provenance
        assert provenance.model == "LlamaForCausalLM"
        assert provenance.model_fingerprint == model_fingerprint(model)
        assert provenance.batches == 3
        assert provenance.batch_sizes == [2, 3, 1]
        assert provenance.tokens == 34 - 6
        assert provenance.dtype == "float32"
        assert provenance.train_mode is False
        assert provenance.seconds > 0
        assert {"python", "torch", "transformers"} <= set(provenance.versions)
        assert {entry.rows for entry in profile.modules.values()} == {2 * 9 + 3 * 7 + 3}
        assert profile.gradients is None

    def test_data_fingerprint_tells_data_apart(self, tiny_llama: PreTrainedModel) -> None:
        def fingerprint(*seeds: int) -> str:
            batches = [token_batch([5], seed=seed) for seed in seeds]
            return measure(tiny_llama, batches).provenance.data_fingerprint

        assert fingerprint(1, 2) == fingerprint(1, 2)
        assert len({fingerprint(1, 2), fingerprint(2, 1), fingerprint(1), fingerprint(1, 3)}) == 4

    @pytest.mark.parametrize(
        ("path", "name"),
        [("org/model-1B", "org/model-1B"), ("/home/someone/models/mine", "mine")],
    )
    def test_model_name_is_no_local_path(
        self, tiny_llama: PreTrainedModel, path: str, name: str
    ) -> None:
        tiny_llama.config._name_or_path = path
        assert measure(tiny_llama, [token_batch([5])]).provenance.model == name

    def test_text_shows_n_and_tokens(self, llama_batches: list[Batch]) -> None:
        text = str(profile_gradients(tiny_llama(), llama_batches, batches=3))
        assert "N = 3 batches, 28 tokens, float32" in text
        assert "self_attn.q_proj" in text


def test_classifier_batches_carry_classes() -> None:
    assert class_batch([3, 4])["labels"].shape == (2,)
