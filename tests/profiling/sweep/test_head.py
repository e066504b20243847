"""The loss of a causal model, differentiated in chunks of tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import GraniteConfig, GraniteForCausalLM

import rankwise.profiling.sweep.head as head_module
from sweep_reference import assert_same, measure, model_and_batches, precisions
from tiny_models import IGNORED, PAD, VOCABULARY, Batch, build, tiny_llama, token_batch


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK", 4)


def shapes_seen_by_head(model: nn.Module) -> list[tuple[int, ...]]:
    """Filled as the head is called; a hook on the head would switch the chunks off."""
    seen: list[tuple[int, ...]] = []
    plain = model.lm_head.forward

    def forward(hidden: Tensor) -> Tensor:
        seen.append(tuple(hidden.shape))
        return plain(hidden)

    model.lm_head.forward = forward
    return seen


@precisions
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "mamba"])
def test_same_gradient(architecture: str, dtype: torch.dtype, rel: float) -> None:
    model, batches = model_and_batches(architecture)
    model = model.to(dtype)
    expected = measure(model, batches, engine="hooks")
    seen = shapes_seen_by_head(model)
    found = measure(model, batches)
    assert found.provenance.engine == "sweep"
    assert_same(found, expected, max(rel, 1e-9))  # the loss itself is in fp32
    whole, *chunks = seen
    assert len(whole) == 3  # hooks, to compare with
    assert max(shape[0] for shape in chunks) == 4 and {len(shape) for shape in chunks} == {2}


def test_tokens_without_label_never_meet_the_head() -> None:
    model, batch = tiny_llama(), token_batch([9, 6])
    batch["labels"][:, :4] = IGNORED
    seen = shapes_seen_by_head(model)
    measure(model, [batch])
    assert seen[:3] == [(1, 9, 16), (4, 16), (1, 16)]  # one sample compared
    assert seen[3:] == [(4, 16), (3, 16)]  # all measured


def plain_sweep(model: nn.Module, batches: Sequence[Batch], rows: int) -> None:
    """Swept with all logits at once in the last `rows` calls of the head."""
    seen = shapes_seen_by_head(model)
    found = measure(model, batches)
    assert found.provenance.engine == "sweep"
    assert [len(shape) for shape in seen[-rows:]] == [3] * rows
    assert_same(found, measure(model, batches, engine="hooks"), 1e-5)


def test_model_that_scales_its_logits(caplog: pytest.LogCaptureFixture) -> None:
    config = GraniteConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=4.0,
        initializer_range=0.3,
        pad_token_id=PAD,
    )
    batches = model_and_batches("llama")[1]
    with caplog.at_level(logging.DEBUG, logger="rankwise"):
        plain_sweep(build(GraniteForCausalLM, config, 0), batches, len(batches))
    assert "the loss is not differentiated in chunks" in caplog.text


def test_batch_that_says_what_the_loss_is_a_mean_over() -> None:
    batches = model_and_batches("llama")[1]
    batches[-1]["num_items_in_batch"] = torch.tensor(40)
    plain_sweep(tiny_llama(), batches, 1)


def test_hooks_on_the_head_see_whole_batches() -> None:
    model, batches = tiny_llama(), model_and_batches("llama")[1]
    model.lm_head.register_forward_hook(lambda _head, _inputs, logits: logits / 2)
    plain_sweep(model, batches, len(batches))


def test_own_loss_of_the_model() -> None:
    model, batches = tiny_llama(), model_and_batches("llama")[1]
    model.loss_function = lambda logits, labels, **_: logits[labels > 20].square().mean()
    plain_sweep(model, batches, len(batches))
