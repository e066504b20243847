"""What an event did, for people and for logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict, FiniteFloat, NonNegativeInt

_FORBID = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class RankMove:
    """One module at one event; modules that neither moved nor were flagged have none.

    Attributes:
        module: Full name.
        before: Rank before the event.
        after: Rank after it.
        reason: Why, in words.
        discarded: Squared Frobenius norm of the part of the update that was cut off.
        total: That of the whole update before.
        moments: What became of the optimizer's moments: those of the slots that stay are
            `"kept"`, or `"reset"` where a rotation mixed the slots.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    module: str
    before: NonNegativeInt
    after: NonNegativeInt
    reason: str
    discarded: FiniteFloat = 0.0
    total: FiniteFloat = 0.0
    moments: Literal["kept", "reset"] = "kept"


@dataclass(frozen=True)
class RankEvent:
    """One event.

    Attributes:
        step: Optimizer step after which it happened.
        moves: What became of each module that moved or was flagged.
        used: Active parameters after it.
        budget: Active parameters allowed.
        batches: Training batches that were measured for it.
        dropped: Batches left out for a NaN or an infinity.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    step: NonNegativeInt
    moves: list[RankMove] = field(default_factory=list)
    used: NonNegativeInt = 0
    budget: NonNegativeInt = 0
    batches: NonNegativeInt = 0
    dropped: NonNegativeInt = 0

    @property
    def discarded(self) -> float:
        """Energy cut off in all modules."""
        return sum(move.discarded for move in self.moves)

    def __str__(self) -> str:
        grown = sum(move.after > move.before for move in self.moves)
        shrunk = sum(move.after < move.before for move in self.moves)
        kept = len(self.moves) - grown - shrunk
        return (
            f"step {self.step}: {grown} modules grew, {shrunk} shrank"
            + (f", {kept} kept their rank for want of a gradient" if kept else "")
            + f"; {self.used:,} of {self.budget:,} parameters"
            + f"; energy discarded {self.discarded:.3g}"
        )


def reason(
    module: str, before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]
) -> str:
    """The module's part of all averaged estimates, now and before: why its rank moved."""

    def part(averages: Mapping[str, Sequence[float]]) -> float:
        return averages[module][0] / (sum(values[0] for values in averages.values()) or 1.0)

    was = f", was {part(before):.2%}" if module in before else ""
    return f"{part(after):.2%} of all estimates{was}"
