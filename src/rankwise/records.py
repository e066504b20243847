"""The record of one training run: everything needed to compare it or to run it again."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, FiniteFloat, NonNegativeInt, PositiveInt

from rankwise.files import parse_json, read_text, write_text

SCHEMA_VERSION = 1
_FORBID = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class TrainLoss:
    """Mean training loss over the optimizer steps since the previous entry, in nats per token."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    step: NonNegativeInt
    loss: FiniteFloat


@dataclass(frozen=True)
class HeldOutLoss:
    """Held-out loss after so many optimizer steps, weighted by token over all batches.

    Attributes:
        step: Optimizer steps taken; 0 is the model before training.
        loss: Mean negative log-likelihood in nats per token.
        tokens: Tokens the mean is over.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    step: NonNegativeInt
    loss: FiniteFloat
    tokens: PositiveInt

    @property
    def perplexity(self) -> float:
        """`exp(loss)`; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 709 else math.inf


@dataclass(frozen=True)
class RunRecord:
    """One run, whole.

    Attributes:
        method: Name of the method.
        model: Hub id or folder name of the base model.
        model_fingerprint: See `rankwise.provenance.model_fingerprint`.
        seed: Seeds the data order, the adapters' initialisation and dropout.
        trainable_parameters: Parameters that the optimizer updates.
        ranks: Rank per adapted module.
        blocks: Diagonal blocks per adapted module.
        train_loss: Training curve.
        held_out: Held-out curve; the first entry is before training.
        seconds: Wall time of `profile`, `train` (evaluation excluded) and `evaluate`.
        peak_memory_mib: Largest memory of the process so far, or of the GPU where one was used.
        train_tokens: Tokens seen in training, padding excluded, over all steps.
        data: Rows and fingerprints of the data.
        config: The validated configuration, defaults filled in.
        versions: Packages.
        hardware: Machine.
        commit: Commit of the repository that the command ran in, if it ran in one.
        finished: UTC time, ISO 8601.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    method: str
    model: str
    model_fingerprint: str
    seed: int
    trainable_parameters: PositiveInt
    ranks: dict[str, PositiveInt]
    blocks: dict[str, PositiveInt]
    train_loss: list[TrainLoss]
    held_out: list[HeldOutLoss]
    seconds: dict[str, FiniteFloat]
    peak_memory_mib: FiniteFloat | None
    train_tokens: NonNegativeInt
    data: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, str | int]
    commit: str | None
    finished: str
    schema_version: int = SCHEMA_VERSION

    def save(self, path: str | Path) -> None:
        """Write the record as JSON, atomically.

        Raises:
            FileError: The file cannot be written; an earlier one is untouched.
        """
        write_text(Path(path), json.dumps(asdict(self), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> RunRecord:
        """Read a saved record.

        Raises:
            FileError: Missing, malformed, or of another schema.
        """
        path = Path(path)
        text = read_text(path, "run record")
        return parse_json(text, cls, path=path, what="run record", version=SCHEMA_VERSION)
