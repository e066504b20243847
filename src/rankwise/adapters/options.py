"""Checks and look-ups that the configurations of all our adapters share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any


def check_targets(config: Any) -> None:
    """Make lists of modules sets, as PEFT does, and refuse layer options that it would ignore."""
    if isinstance(config.target_modules, list):
        config.target_modules = set(config.target_modules)
    if isinstance(config.exclude_modules, list):
        config.exclude_modules = set(config.exclude_modules)
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
    if isinstance(config.target_modules, str) and config.layers_pattern is not None:
        raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError(
            "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
        )


def check_pattern_keys(option: str, pattern: Mapping[str, object]) -> None:
    """Refuse keys that are not literal names; regular expressions can take forever."""
    for key in pattern:
        if not re.fullmatch(r"[\w.\-]+", key):
            raise ValueError(
                f"{option} key {key!r} must be a module name or the end of one, literally: "
                "letters, digits, '_', '-' and '.'."
            )


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Refuse anything but a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")


def check_rank_fits(r: int, module: str, d_in: int, d_out: int) -> None:
    """Refuse a rank that no update of the layer can have."""
    if r > min(d_in, d_out):
        raise ValueError(
            f"rank {r} of {module} exceeds its smaller dimension {min(d_in, d_out)}; lower r or "
            "leave the module out."
        )


def check_positive(name: str, value: object) -> None:
    """Refuse anything but a finite number above 0."""
    if not (is_finite(value) and value > 0):  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} must be a positive number.")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not on the list."""
    if not isinstance(value, str) or value not in allowed:
        choices = ", ".join(map(repr, allowed[:-1])) + f" or {allowed[-1]!r}"
        raise ValueError(f"{name}={value!r} must be {choices}.")


def check_dropout(value: object) -> None:
    """Refuse what is no probability below 1."""
    if not (is_finite(value) and 0 <= value < 1):  # type: ignore[operator]
        raise ValueError(f"dropout={value!r} must be a number in [0, 1).")


def is_finite(value: object) -> bool:
    """Whether a value is a finite int or float; True and False are not."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]


def longest_match(pattern: Mapping[str, int], module: str, default: int) -> int:
    """The value of the longest key that is a module's name or the end of it after a dot."""
    matches = [key for key in pattern if module == key or module.endswith("." + key)]
    return pattern[max(matches, key=len)] if matches else default
