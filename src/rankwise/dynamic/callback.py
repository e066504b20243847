"""Dynamic ranks as one callback of transformers' Trainer and TRL's SFTTrainer."""

from __future__ import annotations

import inspect
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from rankwise.dynamic.checkpoint import (
    SAVED,
    TRAINER_STATE_NAME,
    restore,
    saved_in,
    saved_of,
    write_window,
)
from rankwise.dynamic.controller import DynamicOptions
from rankwise.dynamic.refusals import check_trainer
from rankwise.dynamic.session import DynamicRanks, Mode
from rankwise.errors import DynamicError
from rankwise.methods import Method
from rankwise.plan import RankPlan, check_is_plan

logger = logging.getLogger(__name__)


class RankCallback(TrainerCallback, ExportableState):
    """Moves LoRA ranks while a Trainer trains: `Trainer(..., callbacks=[RankCallback(plan)])`.

    Pass it to the Trainer's constructor, because slots must be there before the optimizer is. What
    it does, step by step: before an event it measures the gradients of the batches that train
    anyway; after the event's optimizer step it moves ranks, but not after the last step, because
    no step would train them; into every checkpoint it puts its state; at the end it leaves plain
    LoRA.

    Scalars (`rank/MODULE`, `estimate/MODULE` or `gid/MODULE`, and totals) go at every event to the
    Trainer's log history and to its other callbacks, and so to the tools that `report_to` names,
    but not to the console.

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

    Raises:
        PlanError: `plan` is no plan.
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
        check_is_plan(plan)
        self._plan = plan
        self._make = lambda model: DynamicRanks(
            model, plan, method, options, mode=mode, adapter=adapter
        )
        self._compact = compact
        self._resume_from = None if resume_from is None else Path(resume_from)
        self._session: DynamicRanks | None = None
        self._handler: CallbackHandler | None = None

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
        check_trainer(args)
        self._handler = _calling_handler()
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
        if state.max_steps > 0 and state.global_step >= state.max_steps:
            logger.warning(
                "resumed from the checkpoint of a finished run: in the middle of an epoch, Trainer "
                "takes one step more than the %d asked for; resume from an earlier checkpoint",
                state.max_steps,
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
        """Move ranks if it is time; let one worker have all if it is going to save."""
        if 0 < state.max_steps <= state.global_step:
            # what grows now would never train, and what shrinks would never be made up for
            self.ranks.window.clear()
        elif self.ranks.step() is not None:
            self._report(args, state, control)
        if control.should_save:
            self.ranks.join()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let one worker have all if it is going to save."""
        if control.should_save:
            self.ranks.join()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let one worker have all: it saves if this evaluation turns out best."""
        if args.save_strategy == SaveStrategy.BEST:
            self.ranks.join()

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

    def _report(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        """What `Trainer.log` does, but for the console, where hundreds of numbers help nobody."""
        scalars = self.ranks.scalars()
        if state.epoch is not None:
            scalars["epoch"] = state.epoch
        state.log_history.append({**scalars, "step": state.global_step})
        for callback in () if self._handler is None else self._handler.callbacks:
            if not isinstance(callback, PrinterCallback | ProgressCallback):
                callback.on_log(args, state, control, model=self.ranks.model, logs=dict(scalars))

    def _checkpoints(self, args: TrainingArguments, state: TrainerState) -> list[Path]:
        """Where the checkpoint of a resume may lie: Trainer does not tell."""
        named = [self._resume_from, args.resume_from_checkpoint]
        found = [Path(folder) for folder in named if isinstance(folder, str | Path)]
        return [*found, _own_checkpoint(args, state)]


def _own_checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _calling_handler() -> CallbackHandler | None:
    """Who called the callback: transformers passes neither its Trainer nor the other callbacks."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    logger.warning("no transformers Trainer calls this RankCallback: its scalars are not reported")
    return None
