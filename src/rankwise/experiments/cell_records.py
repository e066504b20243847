"""The record of one cell: its settings, where it ran, what it cost, and how well it did."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, FiniteFloat, NonNegativeInt

from rankwise.files import parse_json, read_text, write_text

SCHEMA_VERSION = 1
RECORDS = "records"
"""Folder of the records in an experiment's output."""

FAILED = ".failed.json"
_FORBID = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class SizeRecord:
    """What the adapters cost.

    Attributes:
        budget: Parameters of LoRA at the budget's rank on the same targets.
        parameters: Trainable parameters of the adapters, heads not counted; those that are active
            where more are allocated.
        matched: Whether they lie within 2 % of the budget.
        smallest: Smallest size of a module: rank, frequencies, or whatever the method's unit is.
        largest: Largest size.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    budget: int
    parameters: int
    matched: bool
    smallest: int
    largest: int

    def __str__(self) -> str:
        size = str(self.smallest)
        if self.largest > self.smallest:
            size += f"-{self.largest}"
        off = self.parameters / self.budget - 1
        return f"size {size}, {self.parameters:,} parameters ({off:+.1%} of the budget)"


@dataclass(frozen=True)
class EvaluationRecord:
    """Metrics on the validation part after so many steps."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    step: NonNegativeInt
    metrics: dict[str, FiniteFloat]


@dataclass(frozen=True)
class CellRecord:
    """One cell, whole.

    Attributes:
        name: Of the cell.
        phase: `"search"` or `"final"`.
        task: Name of the task.
        method: Name of the method.
        label: As tables call it.
        budget_rank: LoRA rank whose parameters are the budget; None where none applies.
        seed: Of the run.
        learning_rate: None where nothing is trained.
        steps: Optimizer steps.
        config_hash: Of `settings`.
        settings: Everything that decides the result.
        metric: Name of the metric that counts.
        lower_is_better: Whether a smaller one is better.
        size: What the adapters cost; None for full fine-tuning, zero-shot and head-only.
        trainable_parameters: What the optimizer updates, heads not counted, slots of dynamic ranks
            and AdaLoRA's spare ranks included.
        head_parameters: Of heads that are trained whole.
        ranks: Size of each adapted module, at the end.
        blocks: Diagonal blocks of each module, where a profile decided them and there are any.
        validation: Metrics on the validation part at each evaluation; the last is after training.
        test: Metrics on the test part after training; None in a search, and where training
            diverged.
        train_loss: Steps and the mean loss since the entry before.
        diverged_at: Step at which the loss was no longer finite, and the run was given up.
        tokens: Tokens trained on, padding excluded; rows where rows are not tokens.
        seconds: `load` (model and data) and `profile`, as they took when they were made, also where
            several cells share them; `prepare` (plan, adapters), `train`, `evaluate`.
        peak_memory_mib: Of the process while this cell ran, or of the GPU; None if unknown.
        memory_before_mib: Memory in use before it: the interpreter, the data, the base model.
        model: Folder name or hub id.
        model_fingerprint: See `rankwise.provenance`.
        data_fingerprint: Of all encoded rows.
        rows: Of the train, validation and test parts.
        notes: What else is to be known.
        commit: Of the repository that the command ran in.
        versions: Packages.
        hardware: Machine.
        finished: UTC time, ISO 8601.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    name: str
    phase: Literal["search", "final"]
    task: str
    method: str
    label: str
    budget_rank: int | None
    seed: int
    learning_rate: FiniteFloat | None
    steps: NonNegativeInt
    config_hash: str
    settings: dict[str, Any]
    metric: str
    lower_is_better: bool
    size: SizeRecord | None
    trainable_parameters: NonNegativeInt
    head_parameters: NonNegativeInt
    ranks: dict[str, NonNegativeInt]
    validation: list[EvaluationRecord]
    test: dict[str, FiniteFloat] | None
    train_loss: list[tuple[NonNegativeInt, FiniteFloat]]
    diverged_at: int | None
    tokens: NonNegativeInt
    seconds: dict[str, FiniteFloat]
    peak_memory_mib: FiniteFloat | None
    memory_before_mib: FiniteFloat | None
    model: str
    model_fingerprint: str
    data_fingerprint: str
    rows: dict[str, NonNegativeInt]
    notes: list[str]
    commit: str | None
    versions: dict[str, str]
    hardware: dict[str, str | int]
    finished: str
    blocks: dict[str, NonNegativeInt] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def value(self) -> float | None:
        """The metric that counts: on the test part, or in a search on the validation part."""
        if self.diverged_at is not None:
            return None
        metrics = self.validation[-1].metrics if self.phase == "search" else self.test
        return None if metrics is None else metrics.get(self.metric)

    def save(self, path: Path) -> None:
        """Write the record as JSON, atomically.

        Raises:
            FileError: The file cannot be written; an earlier one is untouched.
        """
        write_text(path, json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> CellRecord:
        """Read a record.

        Raises:
            FileError: Missing, malformed, or of another schema.
        """
        text = read_text(path, "record")
        return parse_json(text, cls, path=path, what="record", version=SCHEMA_VERSION)


@dataclass(frozen=True)
class FailureRecord:
    """Why a cell has no record: the error."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    name: str
    config_hash: str
    error: str
    traceback: str
    finished: str
    schema_version: int = SCHEMA_VERSION

    def save(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        write_text(path, json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> FailureRecord:
        """Read it.

        Raises:
            FileError: Missing, malformed, or of another schema.
        """
        text = read_text(path, "failure")
        return parse_json(text, cls, path=path, what="failure", version=SCHEMA_VERSION)
