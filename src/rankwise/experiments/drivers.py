"""What some methods do beside gradient steps: AdaLoRA's allocation, ranks that move."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from peft import AdaLoraConfig, PeftModel
from torch.optim import Optimizer

from rankwise.dynamic import DynamicRanks


class Driver:
    """What a training loop calls around its steps; by default nothing happens.

    In order: `watch(optimizer)` once, then for every batch its forward and backward pass inside
    `observe()`, and after every `optimizer.step()`, while the gradients are still there,
    `after_step(step)` with steps counted from 1; `finish()` at the end.
    """

    def watch(self, optimizer: Optimizer) -> None:
        """The optimizer of the adapters was made."""

    def observe(self) -> AbstractContextManager[None]:
        """Around one batch's forward and backward pass."""
        return nullcontext()

    def after_step(self, step: int) -> None:
        """The optimizer has stepped."""

    def finish(self) -> None:
        """Training is over."""

    def notes(self) -> list[str]:
        """What happened, for the record."""
        return []

    def ranks(self) -> dict[str, int] | None:
        """Ranks at the end, if they moved."""
        return None


class AdaLoraDriver(Driver):
    """Calls AdaLoRA's `update_and_allocate` after each step, as its authors do."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    def after_step(self, step: int) -> None:
        """Let AdaLoRA average its importances and prune."""
        self._model.base_model.update_and_allocate(step)  # type: ignore[operator]

    def ranks(self) -> dict[str, int] | None:
        """How many triplets of each module are left; None before any was pruned.

        AdaLoRA's target is a number of triplets over all modules, whose sizes differ.
        """
        config = self._model.peft_config["default"]
        assert isinstance(config, AdaLoraConfig)
        left: dict[str, list[bool]] = config.rank_pattern or {}
        return {name.partition(".lora_E")[0]: sum(kept) for name, kept in left.items()} or None


class DynamicDriver(Driver):
    """Moves ranks as `rankwise.DynamicRanks` does in a plain loop."""

    def __init__(self, ranks: DynamicRanks) -> None:
        self._session = ranks

    def watch(self, optimizer: Optimizer) -> None:
        """Follow the optimizer's steps and state."""
        self._session.watch(optimizer)

    def observe(self) -> AbstractContextManager[None]:
        """Measure before an event."""
        return self._session.observe()

    def after_step(self, step: int) -> None:
        """Move ranks if an event is due."""
        self._session.step()

    def finish(self) -> None:
        """Leave plain LoRA of the present ranks."""
        self._session.compact()

    def notes(self) -> list[str]:
        """How often ranks moved."""
        events = self._session.events
        moved = sum(move.before != move.after for event in events for move in event.moves)
        return [f"{len(events)} rank events moved {moved} ranks"]

    def ranks(self) -> dict[str, int]:
        """The ranks of the last event."""
        return dict(self._session.state.ranks)
