"""The errors rankwise raises for input a user can mend.

Every message names the offending argument, module, file or field, the value received, what is
allowed and the remedy. Programming errors stay built-in exceptions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RankwiseError(Exception):
    """Base class of every error that rankwise raises on purpose."""


class TargetError(RankwiseError, ValueError):
    """A target specification matches nothing, or a module that cannot carry an adapter."""


class ProfileError(RankwiseError, RuntimeError):
    """Gradients could not be measured: no batches, no labels, a non-finite gradient."""


class PlanError(RankwiseError, ValueError):
    """A rank plan cannot be made from these numbers, or does not fit the model."""


class DynamicError(RankwiseError, RuntimeError):
    """Ranks cannot move here: an optimizer, a wrapper or a checkpoint does not allow it."""


class ExportError(RankwiseError, ValueError):
    """An adapter cannot be written in the form asked for, or would compute something else there."""


class FileError(RankwiseError, ValueError):
    """A saved file is missing, malformed, or does not hold what it should."""


class ConfigError(RankwiseError, ValueError):
    """A run configuration has an unknown key or a value that is not allowed."""


class DataError(RankwiseError, ValueError):
    """A data set is missing, empty, or lacks the columns training needs."""


class DivergenceError(DataError):
    """A loss is no longer finite: training diverged, or the data or the weights are broken."""


def reason_of(error: BaseException, lines: int = 3) -> str:
    """The first lines of another library's message as one line; often the second has the remedy."""
    text = " ".join(str(error).strip().splitlines()[:lines])
    return " ".join(text.split()) or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """How a message ends: the known name closest to a misspelt one, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}."
