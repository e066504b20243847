"""Held-out loss, weighted by token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.errors import DataError, DivergenceError
from rankwise.profiling import model_loss
from rankwise.profiling.loss import without_prompt_logits
from rankwise.records import HeldOutLoss


def held_out_loss(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, step: int
) -> HeldOutLoss:
    """Mean negative log-likelihood over all labelled tokens of all batches.

    Batches are weighted by their labelled tokens, so the result does not depend on the batch size.

    Args:
        model: A model whose output has a loss; its mode is as before afterwards.
        batches: Keyword arguments of its forward, with labels.
        step: The optimizer step to note down.

    Raises:
        DataError: No token carries a label.
        DivergenceError: The loss is not finite.
    """
    total, tokens = summed_loss(model, batches)
    if not math.isfinite(total):
        raise DivergenceError(
            f"the held-out loss at step {step} is {total / tokens}: training diverged or the data "
            "is broken; lower training.learning_rate."
        )
    return HeldOutLoss(step=step, loss=total / tokens, tokens=tokens)


def summed_loss(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[float, int]:
    """Negative log-likelihood summed over all labelled tokens, which may overflow, and their count.

    Raises:
        DataError: No token carries a label.
    """
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                loss, count = model_loss(model, without_prompt_logits(model, moved))
                if count:
                    total += float(loss) * count
                    tokens += count
    finally:
        model.train(training)
    if tokens == 0:
        raise DataError("the held-out data has no labelled token.")
    return total, tokens


class HeldOutCallback(TrainerCallback):
    """Evaluates every so many steps and keeps the time that takes apart from training."""

    def __init__(
        self, evaluate: Callable[[int], HeldOutLoss], every: int, say: Callable[[str], None]
    ) -> None:
        self._evaluate = evaluate
        self._every = every
        self._say = say
        self.curve: list[HeldOutLoss] = []
        self.seconds = 0.0

    def _point(self, state: TrainerState) -> None:
        started = time.perf_counter()
        self.curve.append(self._evaluate(state.global_step))
        self.seconds += time.perf_counter() - started
        self._say(
            f"step {state.global_step} of {state.max_steps}: "
            f"held-out loss {self.curve[-1].loss:.4f}"
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The loss before training."""
        self._point(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The loss now, if it is time."""
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._point(state)
