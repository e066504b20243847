"""Tensors on disk that are written one by one, in any order, and read one by one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankwise.errors import FileError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8


def with_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file's content with other metadata; its tensors stay as they are.

    Keys are sorted: the library writes them in an order that differs from file to file, and files
    of equal content would differ.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(metadata.items()))
    return _header(header) + content[8 + size :]


def _header(content: Mapping[str, object]) -> bytes:
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class ArrayLayout:
    """Shape and dtype of an array; the dtype is None if it is no floating-point number."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * (self.dtype or torch.float32).itemsize


class TensorWriter:
    """Writes a safetensors file whose layout is known beforehand, holding one tensor at a time.

    The header comes first and says where each tensor will be, so that they can be written in any
    order and again.
    """

    def __init__(self, path: Path, layout: Mapping[str, ArrayLayout]) -> None:
        self._layout = dict(layout)
        self._start: dict[str, int] = {}
        self._missing = set(layout)
        header: dict[str, object] = {}
        at = 0
        for name, array in self._layout.items():
            assert array.dtype is not None
            self._start[name] = at
            header[name] = {
                "dtype": _NAMES[array.dtype],
                "shape": list(array.shape),
                "data_offsets": [at, at + array.bytes],
            }
            at += array.bytes
        self._file = path.open("wb")
        self._data = self._file.write(_header(header))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, in the dtype of the layout."""
        array = self._layout[name]
        if tuple(tensor.shape) != array.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, laid out as {array.shape}")
        self._file.seek(self._data + self._start[name])
        plain = tensor.detach().to("cpu", array.dtype).contiguous().flatten()
        self._file.write(plain.view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def close(self) -> None:
        """Finish the file.

        Raises:
            ValueError: A tensor was not written.
        """
        self._file.close()
        if self._missing:
            raise ValueError(f"not written: {', '.join(sorted(self._missing))}")

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when asked for.

    The file stays open, so that the tensors are those it held when it was opened, even if it is
    replaced.

    Args:
        path: The file.
        what: What it is, for messages.

    Raises:
        FileError: It is missing, truncated or not safetensors.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self._what = what
        if not path.is_file():
            raise FileError(f"{what} {path}: no such file; check the path.")
        try:
            self._file = safe_open(path, framework="pt")
            names = list(self._file.keys())
            self.layout = {name: self._layout_of(name) for name in names}
        except (SafetensorError, OSError, ValueError) as error:
            raise FileError(f"{what} {path}: not a whole safetensors file ({error}).") from error

    def _layout_of(self, name: str) -> ArrayLayout:
        part = self._file.get_slice(name)
        return ArrayLayout(tuple(part.get_shape()), _DTYPES.get(part.get_dtype()))

    def in_order(self, names: Mapping[str, object]) -> LazyTensors:
        """The same, iterated over in the order of the names, which are exactly these tensors."""
        self.layout = {name: self.layout[name] for name in names}
        return self

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.layout:
            raise KeyError(name)
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise FileError(f"{self._what} {self.path}: cannot be read ({error}).") from error
        if not bool(torch.isfinite(tensor).all()):
            raise FileError(f"{self.path}: array of module {name} is not finite; profile again.")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, ArrayLayout]:
    """The layout that holds the tensors; lazy ones are not read."""
    if isinstance(tensors, LazyTensors):
        return dict(tensors.layout)
    return {name: ArrayLayout(tuple(t.shape), t.dtype) for name, t in tensors.items()}
