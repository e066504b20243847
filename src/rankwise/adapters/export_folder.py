"""The folder of an export: whole or not there, and replaced only if nothing else is in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rankwise.files import (
    check_replaceable,
    files_in,
    new_folder,
    parse_json,
    read_text,
    write_text,
)

EXPORT_FILE = "rankwise_export.json"
"""Tells an export from the many folders that hold a `config.json` or an `adapter_config.json`."""


@dataclass(frozen=True)
class _Contents:
    """What an export wrote, besides `EXPORT_FILE`."""

    mode: str
    files: list[str]


def check_export_folder(folder: Path) -> None:
    """Refuse to write over anything but an export to which nothing was added.

    Raises:
        FileError: The folder holds other files, or is a file.
    """
    check_replaceable(folder, marker=EXPORT_FILE)
    path = folder / EXPORT_FILE
    if not path.is_file():
        return
    contents = parse_json(read_text(path, "export"), _Contents, path=path, what="export")
    check_replaceable(folder, marker=EXPORT_FILE, written={EXPORT_FILE, *contents.files})


@contextmanager
def new_export(folder: Path, mode: str) -> Iterator[Path]:
    """A temporary folder that becomes the export when the block ends well.

    Raises:
        FileError: As `check_export_folder`, or it cannot be written.
    """
    check_export_folder(folder)
    with new_folder(folder, marker=EXPORT_FILE) as draft:
        yield draft
        contents = _Contents(mode, files_in(draft))
        write_text(draft / EXPORT_FILE, json.dumps(asdict(contents), indent=1) + "\n")
