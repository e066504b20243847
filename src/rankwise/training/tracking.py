"""Following the gradients' dimensions while a model trains (RaLoRA, Appendix E.3)."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.profiling.capture import capture_gradients
from rankwise.profiling.staging import dense
from rankwise.profiling.statistics import StreamingStatistics
from rankwise.run_files import TrackedModule, TrackedStep, Tracking
from rankwise.spectra import effective_rank, energy_rank, singular_values, stable_rank
from rankwise.targets import LinearShape, find_targets, layer_position

ENERGY = 0.9
"""Part of a gradient's energy that its energy rank holds."""

logger = logging.getLogger(__name__)


def tracked_modules(
    model: nn.Module, targets: str | Sequence[str], modules: str | Sequence[str] | None
) -> dict[str, LinearShape]:
    """The modules to follow: those named, or the first and last layer's of the targets.

    The paper tracks the first and the last layer. Each stack of layers counts on its own; a model
    without numbered layers has all its targets followed.

    Args:
        model: Without adapters.
        targets: What trains, as for `find_targets`.
        modules: What to follow, likewise; None for the default.

    Raises:
        TargetError: Nothing matches.
    """
    if modules is not None:
        return dict(find_targets(model, modules))
    found = find_targets(model, targets)
    layers: dict[str, list[int]] = {}
    for name in found:
        place = layer_position(name)
        if place.index is not None:
            layers.setdefault(place.stack, []).append(place.index)
    ends = {(stack, end(indices)) for stack, indices in layers.items() for end in (min, max)}
    return {
        name: shape
        for name, shape in found.items()
        if not ends or ((place := layer_position(name)).stack, place.index) in ends
    }


class GradientTracker(TrainerCallback):
    """Measures `dL/dW` of some layers on the training batches of every k-th optimizer step.

    The gradient is that of the layer's own weight W, whatever trains: `sum_t g_t x_t'` with x the
    input and g the gradient of the output of the layer, adapter included, which is the gradient
    that full fine-tuning would follow from here. It is read off the backward pass that training
    does anyway. Nothing is run twice, and the result of training is the same to the bit.

    Args:
        model: The base model; an adapter may wrap its layers.
        shapes: Modules to follow, by name in the base model.
        every: Optimizer steps from one measurement to the next; the first is before any step.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, LinearShape], every: int) -> None:
        self._model = model
        self._shapes = dict(shapes)
        self._every = every
        self._hooks = ExitStack()
        self._statistics: StreamingStatistics | None = None
        self._batches = 0
        self._steps: list[TrackedStep] = []
        self.seconds = 0.0

    @property
    def tracking(self) -> Tracking:
        """What was measured so far."""
        return Tracking(self._every, list(self._steps))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The first batch of an optimizer step comes."""
        if state.global_step % self._every:
            return
        self._statistics = StreamingStatistics(self._shapes)
        self._batches = 0
        # the adapted layers as wholes: a hook inside would take adapters off their faster path
        self._hooks.enter_context(
            capture_gradients(
                self._model,
                self._shapes,
                self._consume,
                flat=False,
                from_embeddings=False,
                freeze=False,
            )
        )
        self._statistics.begin_batch(items=1, rows=1)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """One batch of several is over, and the next comes."""
        if self._statistics is not None:
            self._end_batch(self._statistics)
            self._statistics.begin_batch(items=1, rows=1)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The last batch is over."""
        if self._statistics is None:
            return
        started = time.perf_counter()
        self._end_batch(self._statistics)
        self._hooks.close()
        if self._batches:
            modules = {name: self._measure(self._statistics, name) for name in self._shapes}
            self._steps.append(TrackedStep(state.global_step, modules))
        else:
            logger.warning("step %d is not tracked: no batch is finite", state.global_step)
        self._statistics = None
        self.seconds += time.perf_counter() - started

    def _consume(self, name: str, x: Tensor, g: Tensor) -> None:
        if self._statistics is not None:
            self._statistics.consume(name, x, g)

    def _end_batch(self, statistics: StreamingStatistics) -> None:
        self._batches += statistics.end_batch() is None

    def _measure(self, statistics: StreamingStatistics, name: str) -> TrackedModule:
        mean = statistics.pop(name).gradient
        if mean is None:
            return TrackedModule(0.0, 0.0, 0, 0.0)
        # each batch's loss is its share of the step's already, so the step's gradient is the sum
        values = singular_values(dense(mean)) * self._batches
        return TrackedModule(
            gid=effective_rank(values),
            stable_rank=stable_rank(values),
            energy_rank=energy_rank(values**2, ENERGY),
            gradient_norm=float(torch.linalg.vector_norm(values)),
        )
