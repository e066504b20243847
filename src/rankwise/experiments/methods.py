"""The methods of an experiment by name: baselines, ours, and those that are not available."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from peft import LoraConfig
from torch import nn

from rankwise.adapters import LrLoraConfig, RaLoraConfig, attach
from rankwise.dynamic import DynamicOptions, DynamicRanks, rule_of
from rankwise.errors import ConfigError, PlanError, nearest
from rankwise.experiments.baselines import (
    BASELINES,
    NOT_AVAILABLE,
    SIZE_OPTIONS,
    full_fine_tuning,
)
from rankwise.experiments.drivers import DynamicDriver
from rankwise.experiments.ours import function_parameters, lr_lora, lr_lora_optimizer, melora
from rankwise.experiments.sizing import Adapted, Baseline, Job, Size
from rankwise.methods import METHODS, Method
from rankwise.methods.budgeted import BudgetedMethod
from rankwise.profiling import GradientProfile, Statistic
from rankwise.targets import LinearShape
from rankwise.training.config import make_method

Shapes = Mapping[str, LinearShape]
_DYNAMIC, _EARLY = "-dynamic", "-early-dynamic"
_OWN_KEYS = ("name", "label", "learning_rate", "alpha_over_r")

CONTROLS: Mapping[str, Mapping[str, str]] = {
    "gradient-norm": {"estimator": "gradient-norm"},
    "depth": {"estimator": "depth"},
    "random": {"estimator": "random"},
}
"""Names for the controls of rank allocation among `Compose`'s settings."""


class Contestant(ABC):
    """A method that can be run: what it costs at a budget, and how a model is given it."""

    ours: bool = False
    trains: bool = True
    """Whether there is anything to train, and so a learning rate to choose."""
    budgeted: bool = True
    """Whether the budget changes anything."""

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

    def profile_batches(self) -> int:
        """The method's own number."""
        return self.method(8).profile_batches

    def statistics(self) -> tuple[Statistic, ...]:
        """The method's own."""
        return self.method(8).statistics

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
        options: dict[str, Any] = dict(self.adapter_options)
        if job.task_type is not None:
            options["task_type"] = job.task_type
        if job.keep:
            options["modules_to_save"] = list(job.keep)
        model = attach(job.model, plan, adapter=self.adapter, **options)
        parameters = plan.parameters + self._extra(len(plan.modules))
        ranks = {name: module.rank for name, module in plan.modules.items()}
        adapted = Adapted(model, Size(ranks, parameters, job.budget))
        if self.adapter == "lr-lora" or plan.adapter == "lr-lora":
            return replace(adapted, make_optimizer=lr_lora_optimizer())
        if self.dynamic is not None:
            session = DynamicRanks(model, plan, method, self.dynamic_options(job.steps))
            return replace(adapted, driver=DynamicDriver(session))
        return adapted

    def dynamic_options(self, steps: int) -> DynamicOptions:
        """When ranks move: every 100 steps (GARD's tau), or ten times in a shorter run.

        Early-dynamic ranks are fixed after half of the steps, as AdaLoRA's.
        """
        options: dict[str, Any] = {"interval": min(100, max(1, steps // 10))}
        if self.early:
            options["freeze_after"] = steps // 2
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


@dataclass(frozen=True)
class Entry:
    """A method as an experiment names it.

    Attributes:
        name: Of the method.
        label: As tables call it.
        options: As the file gives them, without name and label.
        contestant: What runs.
        learning_rate: Fixed by the file; None to choose it on the grid.
    """

    name: str
    label: str
    options: Mapping[str, Any]
    contestant: Contestant
    learning_rate: float | None = None

    @property
    def slug(self) -> str:
        """The label as file names have it."""
        return re.sub(r"[^a-z0-9.+=]+", "-", self.label.lower()).strip("-")

    @property
    def reason(self) -> str | None:
        """Why it cannot be run, if it cannot."""
        return self.contestant.reason if isinstance(self.contestant, Unavailable) else None


def make_entry(method: str | Mapping[str, Any]) -> Entry:
    """A method from its name, or from a mapping with `name`, options and perhaps a `label`.

    Raises:
        ConfigError: The name or an option is unknown, or a value is not allowed.
    """
    options = {"name": method} if isinstance(method, str) else dict(method)
    given = {key: options.pop(key, None) for key in _OWN_KEYS}
    name, label, rate = given["name"], given["label"], given["learning_rate"]
    if not isinstance(name, str) or name not in known_methods():
        raise ConfigError(f"{name!r} is not a method; {nearest(str(name), known_methods())}")
    if rate is not None and not (isinstance(rate, int | float) and rate > 0):
        raise ConfigError(f"{name}.learning_rate={rate!r} must be a positive number.")
    scale = 2.0 if given["alpha_over_r"] is None else given["alpha_over_r"]
    if not isinstance(scale, int | float) or isinstance(scale, bool) or scale <= 0:
        raise ConfigError(f"{name}.alpha_over_r={scale!r} must be a positive number.")
    contestant = _contestant(name, dict(options), float(scale))
    if label is None:
        shown = ", ".join(f"{key}={value}" for key, value in options.items())
        label = f"{name} ({shown})" if options else name
    if not isinstance(label, str) or not label.strip():
        raise ConfigError(f"{name}.label={label!r} must be text.")
    kept = options | ({} if scale == 2.0 else {"alpha_over_r": scale})
    return Entry(name, label, kept, contestant, rate)


def known_methods() -> list[str]:
    """Every name that an experiment may use."""
    ours = [name for name in METHODS if name != "lora"]
    moving = [name for name in (*ours, *CONTROLS) if _can_move(name)]
    return [
        *BASELINES,
        *("full", "zero-shot", "head-only", "lr-lora", "sinelora", "melora"),
        *ours,
        *CONTROLS,
        *(name + suffix for name in moving for suffix in (_DYNAMIC, _EARLY)),
        *NOT_AVAILABLE,
    ]


def _can_move(name: str) -> bool:
    try:
        rule_of(make_method("compose" if name in CONTROLS else name, {}))
    except PlanError:
        return False
    return True


def _contestant(name: str, options: dict[str, Any], scale: float) -> Contestant:
    if name in NOT_AVAILABLE:
        return Unavailable(NOT_AVAILABLE[name])
    if name in ("full", "zero-shot", "head-only"):
        _refuse_options(name, options)
        return Whole(name)
    if name in BASELINES:
        return _sized(BASELINES[name], options, scale)
    if name in ("lr-lora", "sinelora"):
        settings = {"basis": "sine"} | options if name == "sinelora" else options
        return Sized(lr_lora(name, settings, scale), ours=name == "lr-lora")
    if name == "melora":
        return Sized(melora(name, options, scale))
    return _planned(name, options, scale)


def _sized(baseline: Baseline, options: dict[str, Any], scale: float) -> Sized:
    """A baseline, its options checked against the configuration they will be set on."""
    job = Job(nn.Identity(), {"x": LinearShape(64, 64)}, 1024, [], 100)  # type: ignore[arg-type]
    config = baseline.config(job, baseline.solve(job.targets, job.budget))
    known = sorted(set(vars(config)) - SIZE_OPTIONS)
    for key in options:
        if key not in known:
            raise ConfigError(f"{baseline.name}.{key}: no such option; {nearest(key, known)}")
    if scale != 2.0:
        if not isinstance(config, LoraConfig):
            raise ConfigError(f"{baseline.name}.alpha_over_r: it has no alpha.")
        baseline = replace(baseline, config=_rescaled(baseline, scale / 2.0))
    return Sized(baseline, options)


def _rescaled(baseline: Baseline, factor: float) -> Any:
    def config(job: Job, size: Size) -> Any:
        made: Any = baseline.config(job, size)
        made.lora_alpha *= factor
        made.alpha_pattern = {k: value * factor for k, value in made.alpha_pattern.items()}
        return made

    return config


def _planned(name: str, options: dict[str, Any], scale: float) -> Planned:
    """One of `METHODS`, with what its name and options say of adapter and movement."""
    base = name.removesuffix(_EARLY).removesuffix(_DYNAMIC)
    dynamic = options.pop("dynamic", None)
    if base != name:
        dynamic = dynamic or {}
    elif dynamic is not None:
        raise ConfigError(f"{name}.dynamic: name the method {name}-dynamic.")
    settings = dict(options)
    if base in CONTROLS:
        base, settings = "compose", dict(CONTROLS[base]) | settings
    adapter = settings.pop("adapter", None)
    if adapter == "ralora" and base == "water-fill":
        base, settings = "compose", {"rule": "water-fill", "r_min": 0} | settings
    method_fields = {field.name for field in fields(METHODS[base])}
    if "adapter" in method_fields and adapter is not None:
        settings["adapter"] = adapter
    elif adapter not in (None, METHODS[base].adapter, "lr-lora"):
        raise ConfigError(f"{name}.adapter={adapter!r} must be 'lr-lora' or left out.")
    kind = (
        adapter or METHODS[base].adapter if base != "compose" else settings.get("adapter", "lora")
    )
    carried = {key: settings.pop(key) for key in list(settings) if key not in method_fields}
    _check_adapter_options(name, kind, carried, method_fields)
    if "r" in settings or "alpha" in settings:
        raise ConfigError(f"{name}: the budget sets r and alpha; use budgets and alpha_over_r.")
    made = Planned(
        base,
        settings,
        adapter=adapter if adapter == "lr-lora" else None,
        adapter_options=carried,
        dynamic=dynamic,
        early=name.endswith(_EARLY),
        alpha_over_r=scale,
    )
    made.method(8)
    _check_dynamic(made, name)
    return made


def _check_adapter_options(
    name: str, kind: str, options: Mapping[str, Any], method_fields: set[str]
) -> None:
    cls: Any = {"ralora": RaLoraConfig, "lr-lora": LrLoraConfig}.get(kind)
    allowed = set() if cls is None else {f.name for f in fields(cls)} - SIZE_OPTIONS
    for key in options:
        if key not in allowed:
            known = (method_fields | allowed | {"adapter", "dynamic"}) - {"r", "alpha"}
            raise ConfigError(f"{name}.{key}: no such option; {nearest(key, known)}")
    if cls is not None:
        try:
            cls(target_modules=["x"], **options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{name}: {error}") from error


def _check_dynamic(made: Planned, name: str) -> None:
    if made.dynamic is None:
        return
    known = [field.name for field in fields(DynamicOptions)]
    for key in made.dynamic:
        if key not in known:
            raise ConfigError(f"{name}.dynamic.{key}: no such option; {nearest(key, known)}")
    try:
        made.dynamic_options(1000)
        rule_of(made.method(8))
    except PlanError as error:
        raise ConfigError(f"{name}: {error}") from error


def _refuse_options(name: str, options: Mapping[str, Any]) -> None:
    if options:
        raise ConfigError(f"{name} has no options, but {', '.join(options)} was given.")
