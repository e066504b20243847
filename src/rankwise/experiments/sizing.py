"""The size of an adapter that costs a given number of trainable parameters.

A comparison is fair at equal trainable parameters, so every method says what it costs as a
function of its size (a rank, a number of frequencies) and the size is solved for. Where ranks may
differ between modules, the remainder is spread evenly over them, one unit each, so that the budget
is met to one unit; elsewhere the nearest size is taken and the caller sees how near it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim import Optimizer

from rankwise.errors import ConfigError, nearest
from rankwise.experiments.drivers import Driver
from rankwise.profiling.loss import LossFunction, model_loss
from rankwise.targets import LinearShape, Targets

TOLERANCE = 0.02
"""How far from the budget a baseline's parameters may lie, as a part of it, to count as matched."""

Batch = Mapping[str, Any]
OptimizerFactory = Callable[[nn.Module, float, float], Optimizer]
"""`(model, learning_rate, weight_decay) -> optimizer`."""


@dataclass(frozen=True)
class Job:
    """What a baseline is to adapt.

    Attributes:
        model: The base model; PEFT modifies it in place.
        targets: Modules that get an adapter.
        budget: Trainable parameters of the adapters, without `keep`.
        batches: Labelled batches for initialisations that look at data (EVA, LoRA-GA); they are
            iterated anew for each.
        steps: Optimizer steps of the run, for AdaLoRA's schedule.
        keep: Further modules to train and save whole, such as a classification head.
        task_type: As in PEFT.
        loss_fn: As in `profile_gradients`.
        seed: Of the run, for what is drawn at random and is no parameter.
    """

    model: nn.Module
    targets: Targets
    budget: int
    batches: Iterable[Batch]
    steps: int
    keep: tuple[str, ...] = ()
    task_type: str | None = None
    loss_fn: LossFunction = model_loss
    seed: int = 0


@dataclass(frozen=True)
class Size:
    """The solved size of a baseline and what it costs.

    Attributes:
        values: Size per module: a rank, or whatever the method's unit is.
        parameters: Trainable parameters of the adapters.
        budget: What was asked for.
        blocks: Diagonal blocks per module, where a profile decided them.
    """

    values: Mapping[str, int]
    parameters: int
    budget: int
    blocks: Mapping[str, int] = field(default_factory=dict)

    @property
    def common(self) -> int:
        """The most frequent size, the smaller of two as frequent."""
        values = list(self.values.values())
        return max(set(values), key=lambda value: (values.count(value), -value))

    @property
    def matched(self) -> bool:
        """Whether the parameters lie within `TOLERANCE` of the budget."""
        return abs(self.parameters - self.budget) <= TOLERANCE * self.budget

    def __str__(self) -> str:
        values = sorted(set(self.values.values()))
        size = f"{values[0]}" if len(values) == 1 else f"{values[0]}-{values[-1]}"
        off = self.parameters / self.budget - 1
        return f"size {size}, {self.parameters:,} parameters ({off:+.1%} of the budget)"


CostFunction = Callable[[LinearShape, int], int]
"""`(shape, size) -> trainable parameters` of one module."""


def lora_cost(shape: LinearShape, size: int) -> int:
    """`r (d_in + d_out)`."""
    return size * shape.rank_cost


@dataclass(frozen=True)
class Adapted:
    """A model ready to be trained.

    Attributes:
        model: With the adapters in place.
        size: What was solved for; None for full fine-tuning and zero-shot.
        make_optimizer: In place of AdamW over all trainable parameters, if the method has its own.
        driver: What it does beside gradient steps.
        cost: Of a module at a size, where the driver changes sizes.
    """

    model: nn.Module
    size: Size | None = None
    make_optimizer: OptimizerFactory | None = None
    driver: Driver = field(default_factory=Driver)
    cost: CostFunction = lora_cost


ConfigFactory = Callable[[Job, Size], PeftConfig]


def _max_rank(shape: LinearShape) -> int:
    return shape.max_rank


@dataclass(frozen=True)
class Baseline:
    """One method: its cost, its PEFT configuration, and what it needs besides.

    Attributes:
        name: As configuration files name it.
        source: Paper.
        cost: Trainable parameters of a module at a size.
        config: The PEFT configuration for a solved size.
        per_module: Whether each module may have its own size.
        sizes: Smallest and largest size that is tried.
        prepare: Runs before PEFT, on the base model.
        finish: Runs after PEFT.
        optimizer: Its own optimizer, if it has one.
        driver: What it does beside gradient steps.
        allocated: Parameters of a module that the optimizer holds, where they are more than `cost`.
        limit: Largest size that a module can have.
        shared: Parameters that all modules have in common.
        revision: Counts up when the same settings begin to mean something else, so that old records
            of this method do not fit.
        redistributes: Whether it moves ranks between modules by itself, so that the parameters are
            known only afterwards.
    """

    name: str
    source: str
    cost: CostFunction
    config: ConfigFactory
    per_module: bool = False
    sizes: tuple[int, int] = (1, 512)
    prepare: Callable[[Job, Any], None] | None = None
    finish: Callable[[Job, PeftModel], None] | None = None
    optimizer: OptimizerFactory | None = None
    driver: Callable[[PeftModel], Driver] | None = None
    allocated: CostFunction | None = None
    redistributes: bool = False
    limit: Callable[[LinearShape], int] = _max_rank
    shared: int = 0
    revision: int = 1

    def solve(self, targets: Mapping[str, LinearShape], budget: int) -> Size:
        """The size whose cost is nearest the budget.

        Raises:
            ConfigError: The budget is not positive.
        """
        if budget < 1:
            raise ConfigError(f"budget={budget}: the number of parameters must be positive.")
        if self.per_module:
            return self._spread(targets, budget)
        low, high = self.sizes
        high = min(high, *(self.limit(shape) for shape in targets.values()))
        totals = {
            size: self.shared + sum(self.cost(shape, size) for shape in targets.values())
            for size in range(low, high + 1)
        }
        size = min(totals, key=lambda size: (abs(totals[size] - budget), size))
        return Size(dict.fromkeys(targets, size), totals[size], budget)

    def _spread(self, targets: Mapping[str, LinearShape], budget: int) -> Size:
        """A common size, and one unit more for modules spread evenly over the model."""
        low, high = self.sizes
        limits = {name: min(high, self.limit(shape)) for name, shape in targets.items()}

        def sizes(common: int) -> dict[str, int]:
            return {name: min(common, limit) for name, limit in limits.items()}

        def total(values: Mapping[str, int]) -> int:
            costs = (self.cost(targets[name], value) for name, value in values.items())
            return self.shared + sum(costs)

        common = low
        while common < max(limits.values()) and total(sizes(common + 1)) <= budget:
            common += 1
        values = sizes(common)
        spent = total(values)
        for name in _evenly_spread(list(targets)):
            value = values[name]
            more = self.cost(targets[name], value + 1) - self.cost(targets[name], value)
            if value < limits[name] and spent + more <= budget:
                values[name] += 1
                spent += more
        return Size(values, spent, budget)

    def adapt(self, job: Job, options: Mapping[str, Any] | None = None) -> Adapted:
        """Attach the adapters, initialise them, and check that they cost what was solved for.

        Args:
            job: What to adapt.
            options: Attributes of the PEFT configuration to set otherwise.

        Raises:
            ConfigError: An option is unknown, or PEFT's adapters have another number of parameters
                than the formula says.
        """
        size = self.solve(job.targets, job.budget)
        config = self.config(job, size)
        for key, value in (options or {}).items():
            set_option(config, key, value, where=self.name)
        if self.prepare is not None:
            self.prepare(job, config)
        model = get_peft_model(job.model, config)
        if self.finish is not None:
            self.finish(job, model)
        driver = Driver() if self.driver is None else self.driver(model)
        size = self._check(job, size, model)
        return Adapted(model, size, self.optimizer, driver, self.cost)

    def _check(self, job: Job, size: Size, model: PeftModel) -> Size:
        """The size as PEFT carried it out."""
        found = sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and ".modules_to_save." not in name
        )
        if self.redistributes:
            return replace(size, values=_ranks_of(model, job.targets), parameters=found)
        cost = self.allocated or self.cost
        costs = (cost(job.targets[name], value) for name, value in size.values.items())
        expected = self.shared + sum(costs)
        if found != expected:
            raise ConfigError(
                f"{self.name}: PEFT made {found:,} trainable parameters where {expected:,} were "
                "expected; the formula is not for this version of PEFT."
            )
        return size


def set_option(config: Any, key: str, value: Any, *, where: str) -> None:
    """Set an attribute of a configuration; a mapping changes options of one that lies within it.

    Raises:
        ConfigError: There is no such option.
    """
    if not hasattr(config, key):
        raise ConfigError(f"{where}.{key}: no such option; {nearest(key, vars(config))}")
    inner = getattr(config, key)
    if is_dataclass(inner) and isinstance(value, Mapping):
        changed = copy(inner)
        for name, option in value.items():
            set_option(changed, str(name), option, where=f"{where}.{key}")
        value = changed
    setattr(config, key, value)


def _ranks_of(model: PeftModel, targets: Iterable[str]) -> dict[str, int]:
    """Ranks of PEFT's LoRA layers; 0 for modules that have none."""
    layers = dict(model.get_base_model().named_modules())
    ranks = {name: getattr(layers[name], "r", {}) for name in targets}
    return {name: int(rank.get("default", 0)) for name, rank in ranks.items()}


def _evenly_spread(names: Sequence[str]) -> list[str]:
    """An order whose every beginning is spread over the whole sequence (van der Corput)."""

    def radical_inverse(index: int) -> float:
        value, base = 0.0, 0.5
        while index:
            value += base * (index & 1)
            index >>= 1
            base /= 2
        return value

    places = sorted(range(len(names)), key=radical_inverse)
    return [names[i] for i in places]
