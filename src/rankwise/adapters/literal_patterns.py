"""Patterns of adapter files from elsewhere, read as names and never run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from rankwise.errors import FileError

T = TypeVar("T")


def literal_patterns(pattern: Mapping[str, T], default: T, where: str) -> Callable[[str], T]:
    """Module name -> its value of a `rank_pattern` or `alpha_pattern`; PEFT's first match wins.

    A key stands for the module of that name, and without a leading `^` for every one that ends so.

    Args:
        pattern: Key -> value.
        default: Of modules that no key stands for.
        where: The file and option, for messages.

    Raises:
        FileError: A key is no name, even without `^`, `$` and backslashes.
    """
    literal: dict[str, tuple[bool, T]] = {}
    for key, value in pattern.items():
        plain = re.sub(r"\\(\W)", r"\1", key.removeprefix("^").removesuffix("$"))
        if not re.fullmatch(r"[\w.\-]+", plain):
            raise FileError(
                f"{where}: the pattern {key!r} is no module name; regular expressions from "
                "elsewhere are not run. Write one key per module."
            )
        literal.setdefault(plain, (key.startswith("^"), value))

    def value_of(name: str) -> T:
        matches = (
            value
            for key, (whole, value) in literal.items()
            if name == key or (not whole and name.endswith("." + key))
        )
        return next(matches, default)

    return value_of
