"""Rows of a data set from a local file, a folder of IDX files, or the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from rankwise.errors import DataError
from rankwise.training.data import unreadable

Row = dict[str, Any]
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def read_rows(source: str, subset: str | None, split: str) -> list[Row]:
    """All rows of a .jsonl, .json, .csv, .tsv or .parquet file, or of a hub data set's split.

    Raises:
        DataError: The source is missing or cannot be read.
    """
    path = Path(source).expanduser()
    if path.suffix == ".tsv":
        return _read_tsv(path)
    return [dict(row) for row in load_rows(source, subset, split)]


def load_rows(source: str, subset: str | None, split: str) -> Any:
    """The data set itself, whose rows are decoded when they are looked at.

    Raises:
        DataError: The source is missing or cannot be read.
    """
    path = Path(source).expanduser()
    try:
        if path.suffix in _FORMATS:
            kind = _FORMATS[path.suffix]
            return datasets.load_dataset(kind, data_files=str(path), split="train")
        return datasets.load_dataset(source, subset, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise unreadable(f"data {source}", error, "subset") from error


def text_of(row: Mapping[str, Any], column: str) -> str:
    """A text of a row.

    Raises:
        DataError: There is no such column, or it holds something else.
    """
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(
            f"a row has no text in column {column!r}; it has {', '.join(row)}. The task's keys "
            "that end in _column name the columns."
        )
    return value


def label_of(row: Mapping[str, Any], column: str, labels: int) -> int:
    """A class of a row, from 0 to `labels - 1`.

    Raises:
        DataError: There is no such column, or it holds no class.
    """
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < labels:
        raise DataError(
            f"a row's label in column {column!r} is {value!r}; it must be a whole number from 0 to "
            f"{labels - 1} (labels={labels})."
        )
    return value


def _read_tsv(path: Path) -> list[Row]:
    """Sentences and labels in either order: CoLA's files have four columns, SST-2's two."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data {path}: cannot be read ({error}).") from error
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        cells = line.split("\t")
        if len(cells) == 4:
            label, sentence = cells[1], cells[3]
        elif len(cells) == 2:
            sentence, label = cells
        else:
            raise DataError(
                f"{path}, line {number}: {len(cells)} columns; 2 (sentence, label) or CoLA's 4 "
                "are expected, without a header. Other tables go into a .csv or .jsonl file."
            )
        if not label.isdecimal():
            raise DataError(
                f"{path}, line {number}: label {label!r} is no whole number; remove a header, or "
                "write the table as .csv or .jsonl."
            )
        rows.append({"sentence": sentence, "label": int(label)})
    return rows
