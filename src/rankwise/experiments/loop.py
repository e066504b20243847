"""The training loop: one for every method, and every step the same."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from rankwise.errors import DivergenceError
from rankwise.experiments.cell_records import EvaluationRecord
from rankwise.experiments.settings import TrainingSettings
from rankwise.experiments.sizing import Adapted
from rankwise.profiling.loss import count_labels, without_prompt_logits

COSINE_FLOOR = 0.1
TRAIN_LOSS_POINTS = 20


Evaluate = Callable[[nn.Module], dict[str, float] | None]
"""Metrics of a model, or None where its weights are not finite."""


@dataclass
class Curves:
    """What training leaves behind."""

    validation: list[EvaluationRecord] = field(default_factory=list)
    train_loss: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    diverged_at: int | None = None


@dataclass
class Loop:
    """Trains one model.

    Attributes:
        adapted: The model with its method's optimizer and driver.
        settings: The same for every method.
        steps: Optimizer steps.
        learning_rate: Largest of the schedule.
        keep: Modules that are trained whole.
        evaluate: Metrics on the validation part.
        curves: What came out so far.
    """

    adapted: Adapted
    settings: TrainingSettings
    steps: int
    learning_rate: float
    keep: tuple[str, ...]
    evaluate: Evaluate
    curves: Curves = field(default_factory=Curves)

    def run(self, batches: Iterator[dict[str, Any]]) -> None:
        """Optimizer steps and evaluations; stops where the loss is no longer finite."""
        points = evaluation_points(self.steps, self.settings.evaluations)
        report = max(1, self.steps // TRAIN_LOSS_POINTS)
        step_once = self._stepper(batches)
        losses: list[float] = []
        self.adapted.model.train()
        for step in range(1, self.steps + 1):
            started = time.perf_counter()
            losses.append(step_once(step))
            if not math.isfinite(losses[-1]):
                self.curves.diverged_at = step
                return
            if step % report == 0 or step == self.steps:
                self.curves.train_loss.append((step, sum(losses) / len(losses)))
                losses = []
            if step == self.steps:
                self.adapted.driver.finish()
            self.curves.train_seconds += time.perf_counter() - started
            if step in points and not self.evaluate_at(step):
                return

    def evaluate_at(self, step: int) -> bool:
        """Note the metrics down; False if there are none because training diverged."""
        metrics = self.timed(self.evaluate)
        if metrics is None:
            self.curves.diverged_at = step
            return False
        self.curves.validation.append(EvaluationRecord(step, metrics))
        return True

    def timed(self, evaluate: Evaluate) -> dict[str, float] | None:
        """An evaluation, its time counted; None if a weight or a metric is not finite.

        The model inside the `PeftModel` is evaluated, because AdaLoRA's wrapper adds its penalty to
        every loss.
        """
        started = time.perf_counter()
        trained = (p for p in self.adapted.model.parameters() if p.requires_grad)
        metrics = None
        if all(bool(torch.isfinite(p).all()) for p in trained):
            with suppress(DivergenceError), self._precision():
                metrics = evaluate(inner_model(self.adapted.model))
        self.curves.evaluate_seconds += time.perf_counter() - started
        finite = metrics is not None and all(map(math.isfinite, metrics.values()))
        return metrics if finite else None

    def _precision(self) -> AbstractContextManager[None]:
        """Autocast to bf16 where the settings say so."""
        device = next(self.adapted.model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _stepper(self, batches: Iterator[dict[str, Any]]) -> Callable[[int], float]:
        """One optimizer step: what it needs each time is looked up once."""
        optimizers = make_optimizers(self.adapted, self.learning_rate, self.settings, self.keep)
        rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
        extra = _extra_arguments(self.adapted.model)

        def step_once(step: int) -> float:
            factor = rate_factor(step, self.steps, self.settings)
            for optimizer, initial in zip(optimizers, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, initial, strict=True):
                    group["lr"] = rate * factor
            taken = [next(batches) for _ in range(self.settings.gradient_accumulation)]
            loss = self._backward(taken, extra)
            if math.isfinite(loss):
                _step(optimizers, self.settings.max_grad_norm)
                self.adapted.driver.after_step(step)
                self.curves.tokens += sum(_size_of(batch) for batch in taken)
            for optimizer in optimizers:
                optimizer.zero_grad()
            return loss

        return step_once

    def _backward(self, batches: list[dict[str, Any]], extra: dict[str, Any]) -> float:
        """Gradients of the mean loss over all labelled items of the step."""
        adapted = self.adapted
        base = inner_model(adapted.model)
        items = [count_labels(base, batch["labels"]) for batch in batches]
        total = 0.0
        for batch, count in zip(batches, items, strict=True):
            share = count / sum(items)
            with adapted.driver.observe():
                with self._precision():
                    loss = adapted.model(**without_prompt_logits(base, batch), **extra).loss
                (loss * share if len(batches) > 1 else loss).backward()
            total += float(loss.detach()) * share
        return total


def _step(optimizers: list[Optimizer], max_norm: float) -> None:
    """Clip all gradients together, and step."""
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, max_norm)
    for optimizer in optimizers:
        optimizer.step()


def make_optimizers(
    adapted: Adapted, learning_rate: float, settings: TrainingSettings, keep: tuple[str, ...]
) -> list[Optimizer]:
    """The method's optimizer, and AdamW of its own for a head, the same for every method."""
    head = {id(p): p for name, p in adapted.model.named_parameters() if is_head(name, keep)}
    head = {key: p for key, p in head.items() if p.requires_grad}
    others = [p for p in adapted.model.parameters() if p.requires_grad and id(p) not in head]
    optimizers: list[Optimizer] = []
    decay = settings.weight_decay
    if others:
        if adapted.make_optimizer is None:
            optimizer: Optimizer = AdamW(others, lr=learning_rate, weight_decay=decay)
        else:
            optimizer = adapted.make_optimizer(adapted.model, learning_rate, decay)
            _take_out(optimizer, head)
        adapted.driver.watch(optimizer)
        optimizers.append(optimizer)
    if head:
        rate = settings.head_learning_rate or learning_rate
        optimizers.append(AdamW(head.values(), lr=rate, weight_decay=decay))
    return optimizers


def _take_out(optimizer: Optimizer, parameters: dict[int, nn.Parameter]) -> None:
    """Leave parameters to another optimizer, with what LoRA-FA keeps of each beside them."""
    for group in optimizer.param_groups:
        kept = [i for i, p in enumerate(group["params"]) if id(p) not in parameters]
        for key in ("names", "scaling_factors"):
            if key in group:
                group[key] = [group[key][i] for i in kept]
        group["params"] = [group["params"][i] for i in kept]


def is_head(name: str, keep: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to a module that is trained whole beside the adapters."""
    return ".modules_to_save." in name or name.startswith(tuple(f"{part}." for part in keep))


def rate_factor(step: int, steps: int, settings: TrainingSettings) -> float:
    """The learning rate of a step, counted from 1, in units of its largest value."""
    warmup = round(settings.warmup * steps)
    if step <= warmup:
        return step / (warmup + 1)
    done = (step - 1 - warmup) / max(1, steps - warmup)
    if settings.scheduler == "cosine":
        return COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if settings.scheduler == "linear" else 1.0


def evaluation_points(steps: int, count: int) -> set[int]:
    """Steps after which the validation part is evaluated: evenly spread, the last among them."""
    return {max(1, round(steps * (i + 1) / count)) for i in range(count)} if steps else set()


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model, with the adapters in its layers."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, nn.Module)
    return inner


def _extra_arguments(model: nn.Module) -> dict[str, Any]:
    """A decoder is to keep no cache of keys and values."""
    takes_cache = "use_cache" in inspect.signature(inner_model(model).forward).parameters
    return {"use_cache": False} if takes_cache else {}


def _size_of(batch: dict[str, Any]) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if isinstance(mask, Tensor) else len(batch["labels"])
