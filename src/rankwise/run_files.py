"""What a run folder may hold beside its record: tracked gradients, analyses, a loss landscape."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from pydantic import ConfigDict, FiniteFloat, NonNegativeInt, PositiveInt

from rankwise.errors import FileError
from rankwise.files import parse_json, read_text, write_text

TRACKING_FILE = "tracking.json"
LANDSCAPE_FILE = "landscape.json"
ANALYSIS_FILE = "analysis.json"
_FORBID = ConfigDict(extra="forbid")
_IGNORE = ConfigDict(extra="ignore")


@dataclass(frozen=True)
class TrackedModule:
    """One module's gradient at one optimizer step.

    Attributes:
        gid: Gradient intrinsic dimensionality, the entropy effective rank.
        stable_rank: Squared singular values summed, over the largest.
        energy_rank: Fewest singular directions that hold 90 % of its energy.
        gradient_norm: Frobenius norm of the gradient of the step's loss, before clipping.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    gid: FiniteFloat
    stable_rank: FiniteFloat
    energy_rank: NonNegativeInt
    gradient_norm: FiniteFloat


@dataclass(frozen=True)
class TrackedStep:
    """The tracked modules at the weights after `step` optimizer steps."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    step: NonNegativeInt
    modules: dict[str, TrackedModule]


@dataclass(frozen=True)
class Tracking:
    """`tracking.json`: gradients followed every so many optimizer steps."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    every: PositiveInt
    steps: list[TrackedStep]
    schema: Literal[1] = 1


@dataclass(frozen=True)
class Landscape:
    """`landscape.json`: held-out loss on a plane through a solution.

    `loss[i][j]` is that of `theta + at[j] d1 + at[i] d2`, theta being the trained parameters.

    Attributes:
        at: Coordinates of the grid, ascending; 1 is one length of a direction.
        loss: Mean loss in nats per token; None where it is not finite.
        normalisation: `"filter"` or `"norm"`, see `rankwise.training.landscape`.
        seed: Of the two directions.
        parameters: Numbers in theta.
        parameter_norm: Euclidean norm of theta.
        direction_norms: Euclidean norms of d1 and d2.
        cosine: Of the angle between them.
        batches: Held-out batches behind every loss.
        batch_size: Sequences in a batch.
        tokens: Labelled tokens in all of them.
        data_fingerprint: Of their token ids and labels.
        model_fingerprint: Of the base model.
        forward_passes: Batches run through the model.
        seconds: Wall time.
        versions: Packages.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    at: list[FiniteFloat]
    loss: list[list[FiniteFloat | None]]
    normalisation: Literal["filter", "norm"]
    seed: NonNegativeInt
    parameters: PositiveInt
    parameter_norm: FiniteFloat
    direction_norms: tuple[FiniteFloat, FiniteFloat]
    cosine: FiniteFloat
    batches: PositiveInt
    batch_size: PositiveInt
    tokens: PositiveInt
    data_fingerprint: str
    model_fingerprint: str
    forward_passes: PositiveInt
    seconds: FiniteFloat
    versions: dict[str, str]
    schema: Literal[1] = 1

    def __post_init__(self) -> None:
        n = len(self.at)
        if n < 2 or self.at != sorted(set(self.at)):
            raise FileError(f"at={self.at}: must hold at least two ascending numbers.")
        if len(self.loss) != n or any(len(row) != n for row in self.loss):
            raise FileError(f"loss: must be {n} rows of {n} numbers, as many as `at`.")


@dataclass(frozen=True)
class AnalysedModule:
    """One LR-LoRA module at one step; a value that was not recorded is None.

    Attributes:
        stable_rank: Of the update `f(BA)`.
        stable_rank_without_constant: Of `f(BA) - f(0)`.
        f0: `f(0)`, the part of the update that is the same in every entry.
        u_min: Smallest entry of `U = BA`.
        u_max: Its largest.
        grid_min: Smallest grid point of the function.
        grid_max: Its largest.
        factorised: Whether the update was applied through factors, without forming U.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _IGNORE

    stable_rank: FiniteFloat | None = None
    stable_rank_without_constant: FiniteFloat | None = None
    f0: FiniteFloat | None = None
    u_min: FiniteFloat | None = None
    u_max: FiniteFloat | None = None
    grid_min: FiniteFloat | None = None
    grid_max: FiniteFloat | None = None
    factorised: bool | None = None


@dataclass(frozen=True)
class AnalysedStep:
    """The analysed modules after `step` optimizer steps."""

    __pydantic_config__: ClassVar[ConfigDict] = _IGNORE

    step: NonNegativeInt
    modules: dict[str, AnalysedModule]


@dataclass(frozen=True)
class Histogram:
    """Counts between neighbouring edges, one fewer than edges."""

    __pydantic_config__: ClassVar[ConfigDict] = _IGNORE

    edges: list[FiniteFloat]
    counts: list[NonNegativeInt]

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.counts) + 1 or self.edges != sorted(self.edges):
            raise FileError(
                f"a histogram has {len(self.edges)} edges and {len(self.counts)} counts; edges "
                "must ascend, and be one more than counts."
            )


@dataclass(frozen=True)
class LearnedFunction:
    """f of one LR-LoRA module at one step: `f[i] = f(u[i])`, None where it is not finite.

    The histogram says where the entries of U lie.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _IGNORE

    step: NonNegativeInt
    module: str
    u: list[FiniteFloat]
    f: list[FiniteFloat | None]
    histogram: Histogram

    def __post_init__(self) -> None:
        if len(self.u) != len(self.f):
            raise FileError(f"{self.module}: {len(self.u)} values of u, {len(self.f)} of f.")


@dataclass(frozen=True)
class Analysis:
    """`analysis.json`: what a run recorded of its updates, and LR-LoRA's of its functions.

    `spectra` holds the singular values of the final updates by module, largest first.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _IGNORE

    steps: list[AnalysedStep] = field(default_factory=list)
    functions: list[LearnedFunction] = field(default_factory=list)
    conditioning: dict[str, dict[str, FiniteFloat | None]] = field(default_factory=dict)
    spectra: dict[str, list[FiniteFloat | None]] = field(default_factory=dict)
    schema: Literal[1] = 1


_Kind = TypeVar("_Kind", Tracking, Landscape, Analysis)


def save_run_file(value: Tracking | Landscape | Analysis, path: Path) -> None:
    """Write it as JSON, atomically.

    Raises:
        FileError: The file cannot be written; an earlier one is untouched.
    """
    write_text(path, json.dumps(asdict(value), indent=1, allow_nan=False) + "\n")


def load_run_file(path: Path, kind: type[_Kind]) -> _Kind:
    """Read a saved one.

    Raises:
        FileError: Missing, malformed, or of another schema.
    """
    what = kind.__name__.lower()
    return parse_json(read_text(path, what), kind, path=path, what=what)
