"""A batch whose prompts get no logits: the same loss and gradients, fewer logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.profiling.loss import count_labels, without_prompt_logits
from tiny_models import (
    IGNORED,
    Batch,
    masked_batch,
    seq2seq_batch,
    tiny_bert_mlm,
    tiny_gpt2,
    tiny_llama,
    tiny_mamba,
    tiny_phi3,
    tiny_qwen3,
    tiny_t5,
    token_batch,
)

CAUSAL = [tiny_llama, tiny_gpt2, tiny_qwen3, tiny_phi3, tiny_mamba]
LENGTHS = [9, 5, 7]


def with_prompts(batch: Batch, lengths: list[int]) -> Batch:
    labels = batch["labels"].clone()
    for row, length in enumerate(lengths):
        labels[row, :length] = IGNORED
    return batch | {"labels": labels}


def loss_and_gradients(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    output = model(**batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    return output.loss, list(torch.autograd.grad(output.loss, trained, allow_unused=True))


def logits_made(model: nn.Module, batch: dict[str, Any]) -> int:
    with torch.no_grad():
        return model(**batch).logits.shape[1]


@pytest.mark.parametrize("make_model", CAUSAL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("prompts", [[6, 4, 5], [8, 4, 6], [2, 1, 3], [3, 5, 7]], ids=str)
def test_loss_and_gradients_are_those_of_the_whole_batch(
    make_model: Callable[[], PreTrainedModel], prompts: list[int]
) -> None:
    model = make_model().double()
    batch = with_prompts(token_batch(LENGTHS), prompts)
    cut = without_prompt_logits(model, batch)
    used = min(p for p, length in zip(prompts, LENGTHS, strict=True) if p < length)
    assert logits_made(model, cut) == 9 - used + 1
    expected, found = loss_and_gradients(model, batch), loss_and_gradients(model, cut)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # a loss in fp32
    assert count_labels(model, cut["labels"]) == count_labels(model, batch["labels"])


def test_it_sees_through_peft() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear", r=2))
    batch = with_prompts(token_batch(LENGTHS), [6, 4, 5])
    cut = without_prompt_logits(model, batch)
    assert logits_made(model, cut) == 6
    torch.testing.assert_close(model(**cut).loss, model(**batch).loss)


def test_rows_padded_at_the_left() -> None:
    model = tiny_llama().double()
    batch = with_prompts(token_batch([6, 6]), [4, 3])
    batch = {k: nn.functional.pad(v, (3, 0)) for k, v in batch.items()}
    batch["labels"][:, :3] = IGNORED
    cut = without_prompt_logits(model, batch)
    assert logits_made(model, cut) == 4
    torch.testing.assert_close(model(**cut).loss, model(**batch).loss)


class OwnLoss(type(tiny_llama())):  # type: ignore[misc]
    """A loss that may want all logits."""

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        return lambda logits, labels, **_: logits.square().mean()

    @loss_function.setter
    def loss_function(self, value: object) -> None:
        pass


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (tiny_llama(), token_batch(LENGTHS)),  # labels from the first token
        (tiny_llama(), with_prompts(token_batch(LENGTHS), [1, 4, 4])),
        (tiny_llama(), with_prompts(token_batch(LENGTHS), [9, 9, 9])),  # no labels at all
        (tiny_llama(), {k: v for k, v in token_batch(LENGTHS).items() if k != "labels"}),
        (tiny_llama(), with_prompts(token_batch(LENGTHS), [4, 4, 4]) | {"logits_to_keep": 0}),
        (tiny_t5(), seq2seq_batch(LENGTHS)),
        (tiny_bert_mlm(), with_prompts(masked_batch(LENGTHS), [4, 4, 4])),
        (OwnLoss(tiny_llama().config), with_prompts(token_batch(LENGTHS), [4, 4, 4])),
    ],
    ids=["all", "second", "none", "unlabelled", "asked", "t5", "mlm", "own-loss"],
)
def test_other_batches_are_left_as_they_are(model: nn.Module, batch: dict[str, Any]) -> None:
    left = without_prompt_logits(model, batch)
    assert left.keys() == batch.keys()
    assert all(left[key] is batch[key] for key in batch)
