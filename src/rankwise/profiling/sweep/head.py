"""The loss of a causal language model, differentiated in chunks of tokens.

The logits of a batch are a vocabulary wide, often larger than all else that is alive; the loss is a
mean over tokens, so its gradient at the head's input is made a few tokens at a time. Tokens without
a label are passed over: their gradient is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from rankwise.profiling.batches import Batch, Job, on_device
from rankwise.profiling.loss import IGNORED_LABEL, model_arguments, model_loss, shifts_labels
from rankwise.profiling.precision import loss_scale
from rankwise.profiling.sweep.recording import Autocast
from rankwise.profiling.sweep.structure import UnsuitableError

CHUNK = 128
"""Tokens whose logits live at once."""

_PLAIN_KEYS = {
    "input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds", "labels",
}  # fmt: skip
"""What a batch may hold; anything else, as `num_items_in_batch`, may change the loss."""


class _ReachedError(Exception):
    """Leaves a forward pass where the head begins."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden
        self.autocast = Autocast(hidden.device)


@dataclass
class Chunks:
    """A loss whose gradient at the head's input is known already, times `loss_scale`."""

    loss: Tensor
    items: int
    hidden: Tensor
    gradient: Tensor

    def backward(self) -> None:
        """Take the gradient on, from the head's input."""
        torch.autograd.backward(self.hidden, self.gradient)


@dataclass(frozen=True)
class ChunkedLoss:
    """A model's own causal loss, through its head; `find` says whether it may fit."""

    head: nn.Module

    @classmethod
    def find(cls, job: Job) -> ChunkedLoss | None:
        """The loss of a model whose head is found and whose loss is transformers' causal one.

        What else a model may do to its logits shows when the result is held against hooks.
        """
        getter = getattr(job.model, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        if not isinstance(head, nn.Module) or job.loss_fn is not model_loss:
            return None
        if getattr(job.model, "loss_function", None) is not ForCausalLMLoss:
            return None
        if not shifts_labels(job.model):
            return None
        seen_whole = [head._forward_hooks, head._forward_pre_hooks]  # by the user
        if any(seen_whole) or any(job.model.get_submodule(name) is head for name in job.selected):
            return None
        return cls(head)

    def forward(self, job: Job, batch: Batch) -> Chunks | None:
        """Run a batch up to the head and differentiate the rest; None for an unusual batch.

        Raises:
            UnsuitableError: The head does not come where it should.
        """
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or labels.ndim != 2 or not set(batch) <= _PLAIN_KEYS:
            return None
        arguments = on_device(job.model, model_arguments(job.model, batch))
        used = F.pad(arguments["labels"][:, 1:], (0, 1), value=IGNORED_LABEL)
        if not bool((used != IGNORED_LABEL).any()):
            return None
        reached = self._run_up_to_head(job.model, arguments)
        hidden = reached.hidden
        if hidden.shape[:-1] != used.shape or not hidden.requires_grad:
            raise UnsuitableError("the output head does not see every token")
        with reached.autocast.again():
            return self._differentiated(job.model, hidden, used)

    def _run_up_to_head(self, model: nn.Module, arguments: Batch) -> _ReachedError:
        def stop(_head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _ReachedError(inputs[0])

        handle = self.head.register_forward_pre_hook(stop)
        try:
            model(**arguments)
        except _ReachedError as reached:
            return reached.with_traceback(None)  # which would keep the pass's tensors alive
        finally:
            handle.remove()
        raise UnsuitableError("the output head is not called")

    def _differentiated(self, model: nn.Module, hidden: Tensor, labels: Tensor) -> Chunks:
        rows = hidden.detach().flatten(0, -2)
        flat = labels.flatten()
        places = (flat != IGNORED_LABEL).nonzero()[:, 0]
        scale = loss_scale(model, len(places))
        gradient = torch.zeros_like(rows)
        total = torch.zeros((), device=rows.device)
        for chunk in places.split(CHUNK):
            leaf = rows[chunk].requires_grad_(True)
            logits = self.head(leaf).float()  # as transformers does
            loss = F.cross_entropy(logits, flat[chunk], reduction="sum") / len(places)
            (gradient[chunk],) = torch.autograd.grad(loss * scale, leaf)
            total += loss.detach()
        return Chunks(total, len(places), hidden, gradient.view_as(hidden))
