"""What a method is worth to a user: the parameters it needs for the reference's result.

Between the budgets that were run, the metric is taken to be linear in the logarithm of the
parameters. The interval is that of a bootstrap over the seeds, which the methods have in common;
of five seeds it is a coarse one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import ConfigError

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Curve:
    """A method's metric against its parameters.

    Attributes:
        parameters: Of each budget, growing.
        values: Seed -> metric at each budget.
    """

    parameters: Sequence[int]
    values: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Trade:
    """How many parameters a method needs for a result.

    Attributes:
        task: Name of the task.
        label: Of the method.
        reference: Label of the method whose result is to be reached.
        reference_rank: At this budget.
        reference_parameters: Its parameters there.
        target: Its metric there, the mean over the seeds in common.
        needed: Parameters at which the method is as good. The smallest that was run if it is as
            good there already; None if it is not at the largest.
        low: Lower end of the 95 % interval of `needed`; likewise.
        high: Upper end; likewise None beyond the largest.
        smallest: Parameters of the smallest budget that was run.
        largest: Of the largest.
        seeds: How many seeds there are in common.
    """

    task: str
    label: str
    reference: str
    reference_rank: int
    reference_parameters: int
    target: float
    needed: float | None
    low: float | None
    high: float | None
    smallest: int
    largest: int
    seeds: int


def parameters_needed(
    parameters: Sequence[int], values: Sequence[float], target: float, *, lower_is_better: bool
) -> float:
    """The fewest parameters at which a curve reaches a target.

    Args:
        parameters: Growing.
        values: The metric at each.
        target: To be reached.
        lower_is_better: Whether a smaller metric is better.

    Returns:
        The first crossing, linear in log parameters; the smallest if the target is reached there;
        infinity if it is reached nowhere.

    Example:
        >>> parameters_needed([100, 400], [3.0, 1.0], 2.0, lower_is_better=True)
        200.0
    """
    sign = 1.0 if lower_is_better else -1.0
    gaps = [sign * (value - target) for value in values]
    if gaps[0] <= 0:
        return float(parameters[0])
    for i in range(1, len(gaps)):
        if gaps[i] <= 0:
            share = gaps[i - 1] / (gaps[i - 1] - gaps[i])
            start, end = math.log(parameters[i - 1]), math.log(parameters[i])
            return round(math.exp(start + share * (end - start)), 6)
    return math.inf


def trade(
    task: str,
    label: str,
    curve: Curve,
    reference: tuple[str, int, int, Mapping[str, float]],
    *,
    lower_is_better: bool,
) -> Trade:
    """How many parameters a method needs for the reference's result, with its interval.

    Args:
        task: Name of the task.
        label: Of the method.
        curve: Its metric against its parameters.
        reference: Label, budget rank and parameters of the reference, and its metric by seed.
        lower_is_better: Whether a smaller metric is better.

    Raises:
        ConfigError: The two share no seed, or the parameters do not grow.
    """
    name, rank, cost, results = reference
    seeds = sorted(curve.values.keys() & results.keys())
    if not seeds:
        raise ConfigError(f"{label} and {name} share no seed on {task}.")
    if any(b <= a for a, b in zip(curve.parameters, curve.parameters[1:], strict=False)):
        raise ConfigError(f"{label}: its parameters {list(curve.parameters)} do not grow.")
    values = np.array([curve.values[seed] for seed in seeds])
    targets = np.array([results[seed] for seed in seeds])

    def needed(chosen: NDArray[np.int64]) -> float:
        means = values[chosen].mean(0).tolist()
        target = float(targets[chosen].mean())
        return parameters_needed(curve.parameters, means, target, lower_is_better=lower_is_better)

    generator = np.random.default_rng(0)
    draws = generator.integers(len(seeds), size=(RESAMPLES, len(seeds)))
    resampled = sorted(needed(draw) for draw in draws)
    tail = round((1 - CONFIDENCE) / 2 * RESAMPLES)
    enough = len(seeds) > 1
    return Trade(
        task,
        label,
        name,
        rank,
        cost,
        float(targets.mean()),
        _finite(needed(np.arange(len(seeds)))),
        _finite(resampled[tail]) if enough else None,
        _finite(resampled[-1 - tail]) if enough else None,
        curve.parameters[0],
        curve.parameters[-1],
        len(seeds),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def describe(found: Trade) -> str:
    """One line for a reader.

    Example:
        >>> found = Trade("t", "ours", "lora", 8, 1000, 2.0, 500.0, 400.0, None, 250, 2000, 5)
        >>> print(describe(found))
        ours needs 500 parameters (95 % interval 400 to more than 2,000), 0.50 times those of lora
    """
    if found.needed is None:
        return f"{found.label} does not get there with {found.largest:,} parameters"
    ratio = found.needed / found.reference_parameters
    interval = ""
    if found.seeds > 1:
        interval = f" (95 % interval {_amount(found.low, found)} to {_amount(found.high, found)})"
    needed = f"{found.label} needs {_amount(found.needed, found)} parameters{interval}"
    return f"{needed}, {ratio:.2f} times those of {found.reference}"


def _amount(value: float | None, found: Trade) -> str:
    if value is None:
        return f"more than {found.largest:,}"
    return f"at most {found.smallest:,}" if value <= found.smallest else f"{value:,.0f}"
