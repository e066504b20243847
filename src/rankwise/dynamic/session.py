"""Ranks of one model that move while it trains: measuring, deciding and carrying out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rankwise.adapters.factors import HasState, LoraFactors, lora_factors
from rankwise.adapters.resize import (
    allocate_slots_,
    compact_,
    gradient_directions,
    grow_,
    plan_with,
    random_directions,
    shrink_,
)
from rankwise.dynamic import workers
from rankwise.dynamic.controller import (
    ControllerState,
    DynamicOptions,
    RankChange,
    RankController,
)
from rankwise.dynamic.estimates import default_method, estimate, limits_of, rule_of
from rankwise.dynamic.events import RankEvent, RankMove, reason
from rankwise.dynamic.refusals import (
    LossScaler,
    check_mode,
    check_parameters,
    plain_optimizer,
    scaler_of,
)
from rankwise.dynamic.saved import SavedRanks, digest, start_of
from rankwise.dynamic.window import Window
from rankwise.errors import DynamicError, PlanError, nearest
from rankwise.methods import LoraGid, Method
from rankwise.plan import RankPlan, check_is_plan
from rankwise.profiling import GradientProfile

logger = logging.getLogger(__name__)

Mode = Literal["masked", "resize"]


class DynamicRanks:
    """Moves LoRA ranks while a model trains, exactly on budget (dynamic GARD and its relatives).

    In a plain loop::

        model = rankwise.attach(model, plan)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        ranks = rankwise.DynamicRanks(model, plan, optimizer=optimizer)
        for batch in loader:
            with ranks.observe():
                model(**batch).loss.backward()
            optimizer.step()
            ranks.step()
            optimizer.zero_grad()
        ranks.compact()

    Args:
        model: Carries the plan's adapters, from `rankwise.attach`.
        plan: The ranks to start from; its budget is the run's.
        method: What is measured and how it becomes ranks; default `default_method(plan)`.
        options: When ranks may move and how far.
        optimizer: Of the adapters; may be given later to `watch`.
        mode: `"masked"` keeps every module's largest rank allocated and the unused slots at zero:
            parameters never change shape, so any wrapper goes on working. `"resize"` allocates what
            is used; one process only.
        adapter: Name of the adapter.

    Raises:
        PlanError: Method, plan and model do not fit together.
    """

    def __init__(
        self,
        model: PeftModel,
        plan: RankPlan,
        method: Method | None = None,
        options: DynamicOptions | None = None,
        *,
        optimizer: HasState | None = None,
        mode: Mode = "masked",
        adapter: str = "default",
    ) -> None:
        check_is_plan(plan)
        if mode not in get_args(Mode):
            raise PlanError(f"mode={mode!r}; {nearest(str(mode), get_args(Mode))}")
        self.model = model
        self.method = method or default_method(plan)
        check_mode(mode)
        check_parameters(lora_factors(model, adapter))
        self.options = options or DynamicOptions()
        self.mode = mode
        self.adapter = adapter
        self._start = plan
        shapes = {name: module.shape for name, module in plan.modules.items()}
        budget = plan.parameters if plan.budget is None else plan.budget
        rule = rule_of(self.method)
        limits = limits_of(self.method, plan, budget)
        least, most = zip(*limits.values(), strict=True)
        rule = replace(rule, bounds=(min(least), max(most)))
        self.controller = RankController(rule, shapes, budget, self.options, limits)
        self.state = self.controller.start(plan)
        self.events: list[RankEvent] = []
        self.steps = 0
        self.window = Window(model.get_base_model(), shapes, self.method.statistics)
        self._seen = 0
        self._batches_since_step = 0
        self._optimizer: torch.optim.Optimizer | None = None
        self._scaler: LossScaler | None = None
        self._hook: RemovableHandle | None = None
        self._allocate(self.state.ranks)
        if optimizer is not None:
            self.watch(optimizer)

    @property
    def plan(self) -> RankPlan:
        """The present ranks as a plan."""
        return plan_with(self._start, self.state.ranks, budget=self.controller.budget)

    @property
    def window_steps(self) -> int:
        """Optimizer steps before an event whose batches are measured."""
        asked = self.options.window
        return min(self.options.interval, self.method.profile_batches) if asked is None else asked

    def watch(self, optimizer: HasState, scaler: LossScaler | None = None) -> None:
        """Follow this optimizer's steps and state.

        A step that a loss scaler skips is no step, and moves no average. Called again, as after
        `accelerator.prepare`, it follows the new optimizer alone, and gives up a batch under way.

        Args:
            optimizer: Of the adapters.
            scaler: The `torch.amp.GradScaler` of a plain loop, so that gradients are measured
                without its scale; accelerate's optimizers bring theirs.

        Raises:
            DynamicError: It is no optimizer, or does not hold the adapter's parameters whole.
        """
        factors = lora_factors(self.model, self.adapter)
        check_parameters(factors)
        self._optimizer = plain_optimizer(optimizer, factors)
        self._scaler = scaler or scaler_of(optimizer)
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._optimizer.register_step_post_hook(self._on_optimizer_step)
        self._batches_since_step = 0
        self.window.close()

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Around one batch's forward and backward pass; measures only before an event."""
        self.begin_batch()
        try:
            yield
            self.end_batch()
        finally:
            self.window.close()

    def begin_batch(self) -> None:
        """A forward pass of a training batch is about to start."""
        self._batches_since_step += 1
        if self.options.is_measured(self.steps + 1, self.window_steps):
            self.window.begin_batch(1.0 if self._scaler is None else self._scaler.get_scale())

    def end_batch(self) -> None:
        """Its backward pass is over."""
        self.window.end_batch()

    def step(self) -> RankEvent | None:
        """Call after each `optimizer.step()`; moves ranks if an event is due.

        Nothing happens between optimizer steps or in the middle of gradient accumulation: an event
        that is due then waits for the end of the step under way.

        Returns:
            What was done, or None if no event was due.

        Raises:
            DynamicError: No optimizer is watched, or its state cannot follow.
        """
        if self._optimizer is None:
            raise DynamicError("no optimizer is watched; pass optimizer= or call watch(optimizer).")
        if self.steps == self._seen or self._batches_since_step:
            return None
        due = [s for s in range(self._seen + 1, self.steps + 1) if self.options.is_event(s)]
        self._seen = self.steps
        return self._event() if due else None

    def compact(self) -> PeftModel:
        """End as plain LoRA of the present ranks; see `rankwise.adapters.resize.compact_`."""
        self.window.close()
        return compact_(self.model, self.plan, adapter=self.adapter)

    def scalars(self) -> dict[str, float]:
        """Present ranks, averaged estimates and totals, by the names that logs use."""
        found: dict[str, float] = {}
        kind = "gid" if isinstance(self.method, LoraGid) else "estimate"
        for name, rank in self.state.ranks.items():
            found[f"rank/{name}"] = rank
            if name in self.state.averages:
                found[f"{kind}/{name}"] = self.state.averages[name][0]
        if self.events:
            last = self.events[-1]
            found["rank_event/moved"] = sum(move.before != move.after for move in last.moves)
            found["rank_event/discarded_energy"] = last.discarded
            found["rank_event/active_parameters"] = last.used
        return found

    def join(self) -> None:
        """Let every worker hold all of a window under way; call it on all before one saves."""
        self.window.join_()

    def saved(self) -> SavedRanks:
        """The state for a checkpoint, beside the arrays of `window.arrays()`.

        Raises:
            DynamicError: Other workers hold parts of the window: `join` was not called.
        """
        return SavedRanks(
            self._settings(),
            self.steps,
            self.state,
            list(self.events),
            digest(self.window.arrays()),
        )

    def restore(self, saved: SavedRanks, window: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint whose weights and optimizer state are already loaded.

        Args:
            saved: What `saved()` gave.
            window: What `window.arrays()` gave at the same moment.

        Raises:
            DynamicError: It was made with other settings, its weights do not have its ranks, or the
                window is another one's.
        """
        if digest(window) != saved.window:
            raise DynamicError(
                "the checkpoint was made while gradients were measured, and these arrays are not "
                "that window's; resume from another checkpoint."
            )
        saved.check_settings(self._settings())
        self.state = self.controller.in_order(saved.controller)
        self.events = list(saved.events)
        self.steps = self._seen = saved.steps
        self._batches_since_step = 0
        self.window.close()
        self.window.restore(window)
        self._allocate(self.state.ranks)
        self._check_empty(self._optimizer)

    def make_room(self, saved: SavedRanks) -> None:
        """Give the parameters the shapes of a checkpoint that is going to be loaded into them.

        The adapter is zero until then.
        """
        with torch.no_grad():
            for found in lora_factors(self.model, self.adapter).values():
                found.a.zero_()
                found.b.zero_()
        self._allocate(saved.controller.ranks)

    def use_ranks(self, ranks: Mapping[str, int]) -> None:
        """Take over the ranks of weights that were loaded from an earlier checkpoint."""
        self.state = ControllerState(dict(ranks), self.state.averages, self.state.events)
        self._check_empty(None)  # the optimizer's state is a later step's

    def _check_empty(self, optimizer: HasState | None) -> None:
        """Refuse weights, or optimizer state, of higher ranks than the present ones."""
        for name, found in lora_factors(self.model, self.adapter).items():
            found.check_empty(self.state.ranks[name], optimizer)

    def _on_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        skipped = getattr(optimizer, "found_inf", None)  # fused ones run their hooks all the same
        if skipped is not None and bool(skipped):
            return
        self.steps += 1
        self._batches_since_step = 0

    def _allocate(self, ranks: Mapping[str, int]) -> None:
        limits = self.controller.limits
        masked = self.mode == "masked"
        # PEFT knows no rank 0: such a module keeps one empty slot until the run is compacted
        slots = {name: limits[name][1] if masked else max(ranks[name], 1) for name in ranks}
        allocate_slots_(
            self.model, self._start, slots, adapter=self.adapter, optimizer=self._optimizer
        )

    def _event(self) -> RankEvent:
        workers.check_agreement(self._facts())  # first: what fails on one worker only would hang
        check_parameters(lora_factors(self.model, self.adapter))
        self._check_empty(self._optimizer)
        batches, dropped = self.window.batches, list(self.window.dropped)
        profile = self.window.finish(self._start.model)
        if profile is None:
            why = f"no batch of the window is finite ({', '.join(sorted(set(dropped)))})"
            why = why if dropped else "no batch was measured"
            moves = [RankMove(n, r, r, f"kept: {why}") for n, r in self.state.ranks.items()]
            used = sum(r * self.controller.costs[n] for n, r in self.state.ranks.items())
        else:
            moves, used = self._decide(profile)
        event = RankEvent(self.steps, moves, used, self.controller.budget, batches, len(dropped))
        self.events.append(event)
        logger.info("%s", event)
        return event

    def _decide(self, profile: GradientProfile) -> tuple[list[RankMove], int]:
        before = self.state.averages
        decision = workers.of_the_first(
            self.controller.decide(self.state, estimate(self.method, profile, self.controller.rule))
        )
        kept = [
            RankMove(name, self.state.ranks[name], self.state.ranks[name], f"kept: {why}")
            for name, why in decision.flagged.items()
        ]
        factors = lora_factors(self.model, self.adapter)
        moves = [
            self._carry_out(
                factors[change.module],
                change,
                reason(change.module, before, decision.state.averages),
                profile.gradients or {},
            )
            for change in decision.changes
        ]
        self.state = decision.state
        if self.mode == "resize" and moves:
            self._allocate(self.state.ranks)
        return moves + kept, decision.used

    def _carry_out(
        self,
        factors: LoraFactors,
        change: RankChange,
        reason: str,
        gradients: Mapping[str, Tensor],
    ) -> RankMove:
        name, before, after = change.module, change.before, change.after
        if after < before:
            lost = shrink_(factors, before, after, self.options.shrink_by, self._optimizer)
            return RankMove(name, before, after, reason, lost.discarded, lost.total, lost.moments)
        factors.allocate_(max(after, factors.slots), self._optimizer)
        if self.options.grow_along == "gradient":
            directions = gradient_directions(gradients[name], after - before)
        else:
            generator = torch.Generator().manual_seed(self._seed(name))
            directions = random_directions(after - before, factors.a.shape[1], generator)
        grow_(factors, before, after, directions, self._optimizer)
        return RankMove(name, before, after, reason)

    def _seed(self, module: str) -> int:
        """The same for every worker and after a resume, and another for each event and module."""
        text = f"{self.options.seed} {self.steps} {module}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

    def _facts(self) -> dict[str, str]:
        """Hashes of what all workers must share; not of their data, which is theirs alone."""
        weights = {
            f"{name}.{side}": getattr(found, side)
            for name, found in lora_factors(self.model, self.adapter).items()
            for side in "ab"
        }
        return (
            {
                "plan or option": json.dumps(self._settings(), sort_keys=True),
                "number of steps": str(self.steps),
                "rank or average": json.dumps(asdict(self.state), sort_keys=True),
                "adapter": str(digest(weights)),
            }
            if workers.count() > 1
            else {}
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "method": self.method.name,
            "method_options": asdict(self.method),
            "options": asdict(self.options),
            "mode": self.mode,
            "adapter": self.adapter,
            "plan": start_of(asdict(self._start)),
        }
