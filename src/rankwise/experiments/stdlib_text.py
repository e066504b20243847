"""Text that every machine has: the source files of Python's own standard library."""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rankwise.errors import DataError
from rankwise.files import write_text

FILE_BYTES = range(1_000, 200_001)
"""Sizes of the files that are kept: shorter ones only import, longer ones are mostly tables."""

LEFT_OUT = frozenset(
    {
        "encodings",  # tables of code points
        "idle_test",
        "lib2to3",  # grammar tables, and fixtures that are not today's Python
        "msilib",  # tables
        "pydoc_data",  # one 700 kB dictionary of help texts
        "test",
        "tests",
        "__pycache__",
    }
)
"""Packages, at any depth, that are tests, tables or generated."""


class TextFiles(NamedTuple):
    """Two JSONL files of one text, for training and for held-out loss."""

    train: Path
    held_out: Path


@dataclass(frozen=True)
class _Source:
    """One source file: dotted module name and text."""

    module: str
    text: str

    @property
    def top_level(self) -> str:
        return self.module.partition(".")[0]


def write_stdlib_text(
    folder: Path,
    *,
    held_out_fraction: float = 0.1,
    max_bytes: int | None = None,
    seed: int = 0,
    source: Path | None = None,
) -> TextFiles:
    """Write the standard library's sources as `train.jsonl` and `held_out.jsonl`.

    Each row is `{"text": ..., "module": "json.decoder"}`. A top-level module belongs wholly to one
    side, by a hash of its name and the seed, so nothing held out is half seen in training. The same
    Python release, arguments and seed give the same bytes on any machine.

    Args:
        folder: Where to write; created if absent.
        held_out_fraction: Share of the top-level modules to hold out, and of `max_bytes`.
        max_bytes: Largest number of UTF-8 bytes of source on both sides together; all if None.
            Files are dropped whole, in an order that depends on the seed alone.
        seed: Chooses the split and, with `max_bytes`, the files.
        source: The library's folder; by default the running Python's.

    Returns:
        The two files.

    Raises:
        ValueError: `held_out_fraction` is not between 0 and 1, or `max_bytes` is not positive.
        DataError: There are no sources, or too few for both sides to have some.
        FileError: A file cannot be written.
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(
            f"held_out_fraction={held_out_fraction}: must be between 0 and 1, both excluded."
        )
    if max_bytes is not None and max_bytes <= 0:
        raise ValueError(f"max_bytes={max_bytes}: must be positive, or None for no limit.")
    library = source or Path(sysconfig.get_path("stdlib"))
    train: list[_Source] = []
    held_out: list[_Source] = []
    for item in _sources(library):
        (held_out if _fraction(seed, item.top_level) < held_out_fraction else train).append(item)
    if max_bytes is not None:
        held_out_bytes = int(max_bytes * held_out_fraction)
        train = _within(train, max_bytes - held_out_bytes, seed)
        held_out = _within(held_out, held_out_bytes, seed)
    if not (train and held_out):
        raise DataError(
            f"{library}: {len(train)} source files to train on and {len(held_out)} to hold out, "
            f"with held_out_fraction={held_out_fraction} and max_bytes={max_bytes}; both sides "
            "need one. Raise them, or use a Python that has its library as .py files."
        )
    files = TextFiles(folder / "train.jsonl", folder / "held_out.jsonl")
    write_text(files.train, _jsonl(train))
    write_text(files.held_out, _jsonl(held_out))
    return files


def _sources(library: Path) -> Iterator[_Source]:
    """The usable source files, in the order of their module names."""
    paths = {}
    for path in library.rglob("*.py"):
        parts = path.relative_to(library).with_suffix("").parts
        # Vendors put their own files and folders (site-packages, build configuration) beside these.
        if parts[0] in sys.stdlib_module_names and LEFT_OUT.isdisjoint(parts):
            paths[".".join(part for part in parts if part != "__init__")] = path
    for module, path in sorted(paths.items()):
        if path.stat().st_size in FILE_BYTES:
            try:
                yield _Source(module, path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                continue


def _within(sources: Iterable[_Source], limit: int, seed: int) -> list[_Source]:
    """Files in hashed order while they fit, returned in the order of their names."""
    kept = []
    for item in sorted(sources, key=lambda item: _fraction(seed, item.module)):
        size = len(item.text.encode())
        if size <= limit:
            limit -= size
            kept.append(item)
    return sorted(kept, key=lambda item: item.module)


def _fraction(seed: int, name: str) -> float:
    """A number in [0, 1) that depends on nothing but the seed and the name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _jsonl(sources: Iterable[_Source]) -> str:
    rows = ({"text": item.text, "module": item.module} for item in sources)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
