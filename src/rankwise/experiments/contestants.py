"""What a method of an experiment is made of: its cost at a budget, and how a model is given it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from rankwise.adapters import LrLoraConfig, attach
from rankwise.dynamic import DynamicOptions, DynamicRanks
from rankwise.errors import ConfigError
from rankwise.experiments.baselines import full_fine_tuning
from rankwise.experiments.drivers import DynamicDriver
from rankwise.experiments.ours import drawn_by, draws_grid, function_parameters, lr_lora_optimizer
from rankwise.experiments.sizing import Adapted, Baseline, Job, Size
from rankwise.methods import METHODS, Method
from rankwise.methods.budgeted import BudgetedMethod
from rankwise.profiling import GradientProfile, Statistic
from rankwise.targets import LinearShape
from rankwise.training.options import make_method

Shapes = Mapping[str, LinearShape]


class Contestant(ABC):
    """A method that can be run: what it costs at a budget, and how a model is given it."""

    ours: bool = False
    trains: bool = True
    """Whether there is anything to train, and so a learning rate to choose."""
    budgeted: bool = True
    """Whether the budget changes anything."""

    @property
    def revision(self) -> int:
        """As `Baseline.revision`."""
        return 1

    def profile_batches(self) -> int | None:
        """How many batches of gradients it wants measured; None if it needs no profile."""
        return None

    def statistics(self) -> tuple[Statistic, ...]:
        """What the profile must hold."""
        return ("mean",)

    @abstractmethod
    def solve(self, targets: Shapes, budget: int) -> Size | None:
        """Its size at a budget, or None where only a profile can tell."""

    @abstractmethod
    def adapt(self, job: Job, profile: GradientProfile | None) -> Adapted:
        """Give the job's model its adapters."""


@dataclass(frozen=True)
class Sized(Contestant):
    """A row of `BASELINES`, or one of ours that is sized like it."""

    baseline: Baseline
    options: Mapping[str, Any] = field(default_factory=dict)
    ours: bool = False

    @property
    def revision(self) -> int:
        """The baseline's."""
        return self.baseline.revision

    def solve(self, targets: Shapes, budget: int) -> Size:
        """By its cost."""
        return self.baseline.solve(targets, budget)

    def adapt(self, job: Job, profile: GradientProfile | None) -> Adapted:
        """Through PEFT."""
        return self.baseline.adapt(job, self.options)


@dataclass(frozen=True)
class Planned(Contestant):
    """A method of ours: a plan from a profile, at the budget, and an adapter that carries it.

    Attributes:
        name: Key of `METHODS`.
        options: Of the method, but for rank, alpha and budget.
        adapter: Another adapter than the method's own, with its options.
        dynamic: Options of ranks that move while training; None if they do not.
        early: Whether they stop moving after half of the steps.
        alpha_over_r: Scaling of every update, alpha over the reference rank.
    """

    name: str
    options: Mapping[str, Any]
    adapter: str | None = None
    adapter_options: Mapping[str, Any] = field(default_factory=dict)
    dynamic: Mapping[str, Any] | None = None
    early: bool = False
    alpha_over_r: float = 2.0
    ours: bool = True

    @property
    def revision(self) -> int:
        """Counts what changed: see `Baseline.revision`."""
        if self.dynamic is None:  # the first drew one random grid for every seed
            return 2 if draws_grid(self.adapter_options) else 1
        # the first let ranks move after the last step, and out of these options' bounds
        moved = 2 if not self.early else 1
        return moved + any(key in self.options for key in ("fixed", "around", "budget"))

    def profile_batches(self) -> int:
        """The method's own number."""
        return self.method(8, budget=1).profile_batches

    def statistics(self) -> tuple[Statistic, ...]:
        """The method's own."""
        return self.method(8, budget=1).statistics

    def method(self, rank: int, budget: int | None = None, seed: int = 0) -> Method:
        """The method at a reference rank and a budget in parameters.

        Raises:
            ConfigError: An option is unknown or its value not allowed.
        """
        options = {"r": rank, "alpha": self.alpha_over_r * rank} | dict(self.options)
        cls = METHODS[self.name]
        names = {field.name for field in fields(cls)}
        if budget is not None and "budget" in names:
            options.setdefault("budget", budget)
        if "seed" in names:
            options.setdefault("seed", seed)
        if self.dynamic is not None:
            # masked slots cost time whether they are used or not, so fewer than a plan may have
            options.setdefault("r_max", 2 * rank)
        return make_method(self.name, options)

    def solve(self, targets: Shapes, budget: int) -> Size | None:
        """Uniform ranks are known beforehand; others are solved from a profile."""
        if issubclass(METHODS[self.name], BudgetedMethod):
            return None
        rank = reference_rank(targets, budget)
        ranks = dict.fromkeys(targets, rank)
        cost = sum(shape.rank_cost for shape in targets.values())
        return Size(ranks, rank * cost + self._extra(len(targets)), budget)

    def adapt(self, job: Job, profile: GradientProfile | None) -> Adapted:
        """Plan and attach.

        Raises:
            PlanError: The plan cannot be made or does not fit.
        """
        assert profile is not None
        rank = reference_rank(job.targets, job.budget)
        method = self.method(rank, job.budget - self._extra(len(job.targets)), job.seed)
        plan = method.plan(profile)
        options = drawn_by(job, self.adapter_options)
        if job.task_type is not None:
            options["task_type"] = job.task_type
        if job.keep:
            options["modules_to_save"] = list(job.keep)
        model = attach(job.model, plan, adapter=self.adapter, **options)
        parameters = plan.parameters + self._extra(len(plan.modules))
        ranks = {name: module.rank for name, module in plan.modules.items()}
        blocks = {name: module.blocks for name, module in plan.modules.items()}
        if max(blocks.values()) == 1:
            blocks = {}
        adapted = Adapted(model, Size(ranks, parameters, job.budget, blocks))
        if self.adapter == "lr-lora" or plan.adapter == "lr-lora":
            return replace(adapted, make_optimizer=lr_lora_optimizer())
        if self.dynamic is not None:
            session = DynamicRanks(model, plan, method, self.dynamic_options(job.steps))
            return replace(adapted, driver=DynamicDriver(session))
        return adapted

    def dynamic_options(self, steps: int) -> DynamicOptions:
        """When ranks move: every 100 steps (GARD's tau), or every tenth of a shorter run.

        Never after the last step, as with `RankCallback`: nothing would train what moved.
        Early-dynamic ranks are fixed after half of the steps, as AdaLoRA's.
        """
        options: dict[str, Any] = {
            "interval": min(100, max(1, steps // 10)),
            "freeze_after": steps // 2 if self.early else steps - 1,
        }
        return DynamicOptions(**(options | dict(self.dynamic or {})))

    def _extra(self, modules: int) -> int:
        """Parameters of LR-LoRA's functions."""
        if self.adapter != "lr-lora":
            return 0
        own, shared = function_parameters(
            LrLoraConfig(target_modules=["x"], **self.adapter_options)
        )
        return own * modules + shared


@dataclass(frozen=True)
class Whole(Contestant):
    """Full fine-tuning of the targets, no training at all, or a new head alone."""

    name: str
    budgeted: bool = False

    @property
    def trains(self) -> bool:  # type: ignore[override]
        """All but zero-shot."""
        return self.name != "zero-shot"

    def solve(self, targets: Shapes, budget: int) -> Size | None:
        """No budget applies."""
        return None

    def adapt(self, job: Job, profile: GradientProfile | None) -> Adapted:
        """Choose what is trainable."""
        if self.name == "full":
            return full_fine_tuning(job)
        job.model.requires_grad_(False)
        if self.name == "head-only":
            _train_kept(job)
        return Adapted(job.model)


@dataclass(frozen=True)
class Unavailable(Contestant):
    """A method that cannot be run, with the reason."""

    reason: str
    trains: bool = False

    def solve(self, targets: Shapes, budget: int) -> Size | None:
        """There is none."""
        return None

    def adapt(self, job: Job, profile: GradientProfile | None) -> Adapted:
        """Refuse."""
        raise ConfigError(self.reason)


def _train_kept(job: Job) -> None:
    if not job.keep:
        raise ConfigError("head-only needs a task with a new head, such as classification.")
    kept = tuple(f"{name}." for name in job.keep)
    for name, parameter in job.model.named_parameters():
        parameter.requires_grad_(name.startswith(kept))


def reference_rank(targets: Shapes, budget: int) -> int:
    """The LoRA rank whose cost is nearest the budget."""
    return max(1, round(budget / sum(shape.rank_cost for shape in targets.values())))
