"""What a report knows of a run's training: plain numbers, which `report.json` holds."""

from __future__ import annotations

from dataclasses import dataclass

EACH = 16
"""Most modules whose curves are shown one by one; of more, only the means by kind are kept."""


@dataclass(frozen=True)
class EventView:
    """One event at which ranks moved, see `rankwise.dynamic.RankEvent`."""

    step: int
    grew: int
    shrank: int
    used: int
    budget: int
    discarded: float
    batches: int
    dropped: int


@dataclass(frozen=True)
class RankHistory:
    """Ranks over training.

    Attributes:
        steps: 0, then the steps of the events, then the last step.
        modules: By module, its rank after each of these steps.
        mean_by_kind: By kind of module, the mean over its modules.
    """

    steps: list[int]
    modules: dict[str, list[int]]
    mean_by_kind: dict[str, list[float | None]]


@dataclass(frozen=True)
class TrackingView:
    """Gradients followed over training, see `rankwise.run_files.Tracking`.

    Attributes:
        every: Optimizer steps between two measurements.
        steps: Steps after which they were made.
        count: How many modules were followed.
        modules: By module and measure, the value at each of the steps; empty above `EACH` modules.
        mean_by_kind: By measure and kind of module, the mean over its modules.
    """

    every: int
    steps: list[int]
    count: int
    modules: dict[str, dict[str, list[float]]]
    mean_by_kind: dict[str, dict[str, list[float | None]]]


@dataclass(frozen=True)
class FunctionView:
    """LR-LoRA's f of one module at one step, and the histogram of the entries of U.

    Attributes:
        module: Its name.
        step: Optimizer steps taken.
        u: Where f was evaluated.
        f: Its values there, None where not finite.
        f0: `f(0)`; None where it was not recorded.
        bends: `f(u) - f(0)`; empty where `f0` is None.
        edges: Of the histogram.
        counts: Between neighbouring edges.
    """

    module: str
    step: int
    u: list[float]
    f: list[float | None]
    f0: float | None
    bends: list[float | None]
    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class LearnedView:
    """What a run recorded of its updates, see `rankwise.run_files.Analysis`.

    Attributes:
        steps: Steps at which it was recorded.
        count: How many modules were recorded.
        modules: By module and measure, the value at each of the steps, None where there is none;
            empty above `EACH` modules.
        mean_by_kind: By measure and kind of module, the mean over its modules that have a value.
        functions: Functions of some modules.
        factorised: Part of all modules and steps whose update went through factors.
    """

    steps: list[int]
    count: int
    modules: dict[str, dict[str, list[float | None]]]
    mean_by_kind: dict[str, dict[str, list[float | None]]]
    functions: list[FunctionView]
    factorised: float | None


@dataclass(frozen=True)
class LandscapeView:
    """The loss on a plane through a solution, see `rankwise.run_files.Landscape`.

    `loss[i][j]` belongs to `at[j]` along the first and `at[i]` along the second direction.
    """

    at: list[float]
    loss: list[list[float | None]]
    solution: float | None
    lowest: float
    normalisation: str
    seed: int
    parameters: int
    parameter_norm: float
    cosine: float
    batches: int
    batch_size: int
    tokens: int
    data_fingerprint: str
