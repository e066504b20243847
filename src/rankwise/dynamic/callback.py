"""Dynamic ranks as one callback of transformers' Trainer and TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rankwise.dynamic.checkpoint import (
    SAVED,
    TRAINER_STATE_NAME,
    restore,
    saved_in,
    saved_of,
    write_window,
)
from rankwise.dynamic.controller import DynamicOptions
from rankwise.dynamic.session import DynamicRanks, Mode
from rankwise.errors import DynamicError
from rankwise.methods import Method
from rankwise.plan import RankPlan


class RankCallback(TrainerCallback, ExportableState):
    """Moves LoRA ranks while a Trainer trains: `Trainer(..., callbacks=[RankCallback(plan)])`.

    Pass it to the Trainer's constructor, because slots must be there before the optimizer is. What
    it does, step by step: before an event it measures the gradients of the batches that train
    anyway; after the event's optimizer step it moves ranks; into every checkpoint it puts its
    state; at the end it leaves plain LoRA.

    Scalars (`rank/MODULE`, `estimate/MODULE` and totals) go to the Trainer's log history at every
    event, and to the tools that `report_to` names once `log_with(trainer)` was called: a callback
    is not told which Trainer runs it.

    Args:
        plan: The plan that the model was attached with.
        method: See `DynamicRanks`.
        options: See `DynamicOptions`.
        mode: See `DynamicRanks`.
        adapter: Name of the adapter.
        compact: Leave plain LoRA of the present ranks when training ends.
        resume_from: The checkpoint folder that `trainer.train(resume_from_checkpoint=...)` will be
            given; needed for `mode="resize"`, whose parameters must have the checkpoint's shapes
            before Trainer loads them.
    """

    def __init__(
        self,
        plan: RankPlan,
        method: Method | None = None,
        options: DynamicOptions | None = None,
        *,
        mode: Mode = "masked",
        adapter: str = "default",
        compact: bool = True,
        resume_from: str | Path | None = None,
    ) -> None:
        self._plan = plan
        self._make = lambda model: DynamicRanks(
            model, plan, method, options, mode=mode, adapter=adapter
        )
        self._compact = compact
        self._resume_from = None if resume_from is None else Path(resume_from)
        self._session: DynamicRanks | None = None
        self._log: Callable[[dict[str, float]], None] | None = None

    @property
    def ranks(self) -> DynamicRanks:
        """The ranks, their events and their plan.

        Raises:
            DynamicError: No Trainer was made with this callback yet.
        """
        if self._session is None:
            raise DynamicError(
                "this RankCallback has no model yet; pass it to the constructor, "
                "Trainer(..., callbacks=[RankCallback(plan)]), not to add_callback."
            )
        return self._session

    def log_with(self, trainer: Any) -> None:
        """Send events' scalars through `trainer.log`, and so to what `report_to` names."""
        self._log = trainer.log

    def state(self) -> dict[str, Any]:
        """What Trainer writes to `trainer_state.json`."""
        saved = None if self._session is None else asdict(self._session.saved())
        return {"args": {}, "attributes": {SAVED: saved}}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Allocate slots, before an optimizer is made."""
        model = kwargs["model"]
        if not isinstance(model, PeftModel):
            raise DynamicError(
                f"the Trainer's model is a {type(model).__name__} without adapters; pass "
                "rankwise.attach(model, plan)."
            )
        if args.restore_callback_states_from_checkpoint:
            raise DynamicError(
                "restore_callback_states_from_checkpoint=True replaces callbacks by new ones; "
                "leave it off, RankCallback restores itself."
            )
        self._session = self._make(model)
        if self._resume_from is not None:
            self._session.make_room(saved_in(self._resume_from))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Follow the optimizer; after a resume, take over the checkpoint's state."""
        ranks = self.ranks
        if args.load_best_model_at_end and ranks.mode == "resize":
            raise DynamicError(
                "load_best_model_at_end loads weights of earlier ranks into a model of the present "
                "ones, which mode='resize' cannot; use mode='masked'."
            )
        if state.global_step:
            restore(
                ranks,
                saved_of(state.stateful_callbacks, Path(TRAINER_STATE_NAME)),
                self._checkpoints(args, state),
            )
        elif ranks.steps:
            raise DynamicError(
                "this RankCallback has trained before; make a new one, and a new Trainer, for "
                "another run."
            )
        ranks.watch(kwargs["optimizer"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The first batch of an optimizer step comes."""
        self.ranks.begin_batch()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """One batch of several is over, and the next comes."""
        self.ranks.end_batch()
        self.ranks.begin_batch()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The last batch is over."""
        self.ranks.end_batch()
        self.ranks.window.close()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move ranks if it is time."""
        if self.ranks.step() is None:
            return
        scalars = self.ranks.scalars()
        if self._log is not None:
            self._log(scalars)
        else:
            state.log_history.append({**scalars, "step": state.global_step})

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Put a window under way into the checkpoint."""
        if args.should_save:
            write_window(_own_checkpoint(args, state), self.ranks.window.arrays())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take over the ranks of the best model if that was loaded; leave plain LoRA."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = saved_in(Path(state.best_model_checkpoint))
            self.ranks.use_ranks(best.controller.ranks)
        if self._compact:
            self.ranks.compact()

    def _checkpoints(self, args: TrainingArguments, state: TrainerState) -> list[Path]:
        """Where the checkpoint of a resume may lie: Trainer does not tell."""
        named = [self._resume_from, args.resume_from_checkpoint]
        found = [Path(folder) for folder in named if isinstance(folder, str | Path)]
        return [*found, _own_checkpoint(args, state)]


def _own_checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
