"""Whole numbers of files, which have no largest one in JSON, before a page computes with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path

from rankwise.errors import FileError

LARGEST = 2**62
LARGEST_SIDE = 2**31 - 1
"""Of a matrix, as in plans."""
_SIDES = ("d_in", "d_out")


def check_numbers(value: object, path: Path, where: str = "") -> None:
    """Refuse whole numbers that are beyond any model, and beyond what arrays and floats hold.

    Args:
        value: What was read: a dataclass, a mapping, a sequence or a number.
        path: The file or folder, for messages.
        where: The place of `value` in it.

    Raises:
        FileError: There is such a number.
    """
    largest = LARGEST_SIDE if where.rsplit(".", 1)[-1] in _SIDES else LARGEST
    if isinstance(value, int):
        if abs(value) > largest:
            raise FileError(f"{path}: {where} is beyond {largest}; the file is broken.")
        return
    if is_dataclass(value):
        parts: list[tuple[str, object]] = [(f.name, getattr(value, f.name)) for f in fields(value)]
    elif isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, list | tuple):
        parts = [(str(i), part) for i, part in enumerate(value)]
    else:
        return
    for name, part in parts:
        check_numbers(part, path, f"{where}.{name}".removeprefix("."))
