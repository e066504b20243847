"""Reading files from strangers, and writing files that are either whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rankwise.errors import FileError, RankwiseError

MAX_TEXT_BYTES = 64 * 1024 * 1024
"""Largest JSON or YAML file that is read; a plan of 100,000 modules takes about 20 MB."""

T = TypeVar("T")


def read_text(path: Path, what: str) -> str:
    """The text of a file, with its absence, size and encoding checked first.

    Args:
        path: The file.
        what: What the file should be, for messages: `"rank plan"`.

    Raises:
        FileError: It is missing, a folder, larger than `MAX_TEXT_BYTES`, unreadable, or not UTF-8.
    """
    if not path.exists():
        raise FileError(f"{what} {path}: no such file; check the path.")
    if path.is_dir():
        raise FileError(f"{what} {path}: is a folder; name a file in it.")
    size = path.stat().st_size
    if size > MAX_TEXT_BYTES:
        raise FileError(f"{what} {path}: {size} bytes; at most {MAX_TEXT_BYTES} are read.")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{what} {path}: cannot be read as UTF-8 text ({error}).") from error


def parse_json(
    text: str, schema: type[T], *, path: Path, what: str, version: int | None = None
) -> T:
    """Validate JSON text against a dataclass, strictly: no coercion, no unknown key.

    Args:
        text: The file's content.
        schema: The dataclass it becomes.
        path: The file, for messages.
        what: What the file is, for messages.
        version: The `schema_version` that is understood; checked first, because another one is the
            better explanation of an unknown key.

    Raises:
        FileError: Names the field, the value received and what was expected.
    """
    if version is not None:
        _check_schema_version(text, version, path=path, what=what)
    try:
        return TypeAdapter(schema).validate_json(text, strict=True)
    except ValidationError as error:
        raise FileError(f"{what} {path}: {describe(error)}") from error


def describe(error: ValidationError) -> str:
    """The first validation error in one line, with the field, its value and the remedy."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RankwiseError):  # it names value and remedy itself
        return f"{place}: {cause}" if place else str(cause)
    where = place or "the top level"
    count = error.error_count()
    more = f" (and {count - 1} more)" if count > 1 else ""
    received = repr(first.get("input"))
    if len(received) > 80:
        received = received[:77] + "..."
    return f"{where}: {first['msg']}; received {received}{more}."


def _check_schema_version(text: str, expected: int, *, path: Path, what: str) -> None:
    try:
        document = from_json(text)
    except ValueError:
        return  # malformed: the validation explains it
    found = document.get("schema_version", expected) if isinstance(document, dict) else expected
    if found != expected:
        raise FileError(
            f"{what} {path}: schema_version {found!r}; this version of rankwise reads {expected}. "
            "Write the file again, or install the version that wrote it."
        )


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file; never a pickle.

    Raises:
        FileError: The file is missing, truncated or not safetensors.
    """
    if not path.is_file():
        raise FileError(f"{what} {path}: no such file; check the path.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{what} {path}: not a whole safetensors file ({error}).") from error


def read_json_lines(path: Path) -> list[Any]:
    """The rows of a file that finished runs are added to, line by line; none if there is no file.

    A last line that a kill cut short is dropped, from the file as well.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    return [json.loads(line) for line in whole.splitlines()]


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: beside it, fsync, rename.

    Raises:
        FileError: It cannot be written; an earlier file of that name is untouched.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as handle:
            temporary = Path(handle.name)
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(
            f"{path}: cannot be written ({error.strerror or error}); nothing was changed. "
            "Free some space or choose another place."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(
    path: Path, *, marker: str, written: Collection[str] | None = None
) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when not.

    Args:
        path: The folder to create or to replace.
        marker: A file that tells that an existing folder is one of ours and may be replaced.
        written: As for `check_replaceable`.

    Raises:
        FileError: `path` holds something else, or cannot be written; what was there is untouched.
    """
    folder = draft_folder(path, marker=marker, written=written)
    with folder as temporary, write_errors_explained(path):
        yield temporary
        publish(temporary, path)


@contextmanager
def draft_folder(
    path: Path, *, marker: str, written: Collection[str] | None = None
) -> Iterator[Path]:
    """A temporary folder beside `path` that vanishes with the block, unless it was published.

    Unlike `new_folder` it leaves errors of the block as they are, for a block that does more than
    write.

    Raises:
        FileError: As `new_folder`.
    """
    check_replaceable(path, marker=marker, written=written)
    temporary = None
    try:
        with write_errors_explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
            os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, path: Path) -> None:
    """Let a draft become the folder `path`, whole."""
    for file in temporary.rglob("*"):
        if file.is_file():
            _fsync(file)
    _swap(temporary, path)


@contextmanager
def write_errors_explained(path: Path) -> Iterator[None]:
    """Errors of the disk inside the block become a `FileError` about `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); nothing "
            "was changed. Free some space or choose another place."
        ) from error


def check_replaceable(path: Path, *, marker: str, written: Collection[str] | None = None) -> None:
    """Refuse to write a folder over anything that is not an earlier result of the same kind.

    Args:
        path: The folder.
        marker: A file that tells that it is one of ours.
        written: Names, relative to it, of all the files that may be replaced; None: all may.

    Raises:
        FileError: `path` is a file, a non-empty folder without `marker`, or holds a file that was
            not written by us.
    """
    if path.exists() and not path.is_dir():
        raise FileError(f"{path}: is a file; name a folder.")
    if path.is_dir() and any(path.iterdir()) and not (path / marker).is_file():
        raise FileError(
            f"{path}: exists and holds no {marker}, so it is not replaced; choose another folder."
        )
    if written is None or not path.is_dir():
        return
    added = [name for name in files_in(path) if name not in written]
    if added:
        raise FileError(
            f"{path}: holds {added[0]}, which rankwise did not write there, so it is not replaced; "
            "choose another folder."
        )


def files_in(folder: Path) -> list[str]:
    """The files of a folder and of those in it, by their paths relative to it, in order."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _swap(temporary: Path, path: Path) -> None:
    if not path.exists():
        os.rename(temporary, path)
        return
    retired = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    try:
        os.rename(path, retired / "old")
        try:
            os.rename(temporary, path)
        except BaseException:
            os.rename(retired / "old", path)
            raise
    except BaseException:
        retired.rmdir()  # empty, unless the earlier folder could not be put back
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
