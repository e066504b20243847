"""The loss whose gradient is measured, and how many items it is a mean over."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from peft import PeftModel
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from rankwise.errors import ProfileError

IGNORED_LABEL = -100
_UNSHIFTED_LOSSES = (
    "ForMaskedLM",
    "ForTokenClassification",
    "ForSequenceClassification",
    "ForImageClassification",
    "ForVideoClassification",
    "ForAudioClassification",
)


class BatchLoss(NamedTuple):
    """A mean loss and the number of items it is the mean of.

    Batches are weighted by `items`, so that a profile is the gradient of the mean loss over all
    items seen. With a token-mean loss, `items` is the number of tokens that carry a label.
    """

    loss: Tensor
    items: int


LossFunction = Callable[[nn.Module, Mapping[str, Any]], BatchLoss]


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
    """The loss a transformers model computes from a batch that holds labels.

    Args:
        model: A module whose output has a `loss` that is the mean over labelled items.
        batch: Keyword arguments of its forward, `labels` among them.

    Raises:
        ProfileError: There are no labels, or the model returns no loss.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise ProfileError(
            "the batch holds no 'labels' tensor, so the model computes no loss; add labels (for "
            "causal language models a copy of input_ids) or pass loss_fn=."
        )
    loss = getattr(model(**model_arguments(model, batch)), "loss", None)
    if not isinstance(loss, Tensor):
        raise ProfileError(
            f"{type(model).__name__} returned no loss for a batch with labels; pass loss_fn=, a "
            "function (model, batch) -> rankwise.BatchLoss(loss, items)."
        )
    return BatchLoss(loss, count_labels(model, labels))


def model_arguments(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as arguments of the model's forward, which is to keep no cache."""
    arguments = dict(batch)
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments.setdefault("use_cache", False)
    return arguments


def without_prompt_logits(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch for which no logits are made of the tokens before the first that is to be predicted.

    The loss is the same. A prompt has no labels, and a vocabulary of logits for each of its tokens
    may cost more than the rest of a small model. Left as it is: a batch whose first labels are in
    use, and one for a model that takes no `logits_to_keep` or has a loss of its own.

    Args:
        model: A transformers model, PEFT's around it or not.
        batch: Keyword arguments of its forward.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    arguments = dict(batch)
    labels = arguments.get("labels")
    if (
        not isinstance(labels, Tensor)
        or labels.ndim != 2
        or "logits_to_keep" in arguments
        or "logits_to_keep" not in inspect.signature(inner.forward).parameters
        or getattr(inner, "loss_function", None) is not ForCausalLMLoss
        or not shifts_labels(inner)
    ):
        return arguments
    used = (labels != IGNORED_LABEL).any(0).nonzero()
    first = int(used[0]) - 1 if len(used) else 0  # the token before predicts it
    if first > 0:
        arguments["labels"] = labels[:, first:]
        arguments["logits_to_keep"] = labels.shape[1] - first
    return arguments


def count_labels(model: nn.Module, labels: Tensor) -> int:
    """How many labels the model's mean loss is over.

    Causal language models predict the next token, so the first label of each row is never used;
    encoder-decoders, masked models and token classifiers use every label that is not -100.
    """
    used = labels
    if labels.ndim == 2 and shifts_labels(model):
        used = labels[:, 1:]
    return int((used != IGNORED_LABEL).sum())


def shifts_labels(model: nn.Module) -> bool:
    """Whether the label of a token is what the token before it is to predict."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    return not str(getattr(model, "loss_type", None)).startswith(_UNSHIFTED_LOSSES)
