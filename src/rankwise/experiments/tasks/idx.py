"""Images and labels in the IDX files of MNIST and Fashion-MNIST, perhaps gzipped."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

from rankwise.errors import DataError
from rankwise.experiments.tasks.reading import Row

_PREFIXES = {"train": "train", "test": "t10k"}
_BYTES = 8


def read_idx(folder: Path, split: str) -> list[Row]:
    """Rows of a split: `image` (bytes, row by row), `size` (height, width), and `label`.

    Args:
        folder: Holds `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and those of `t10k`.
        split: `"train"` or `"test"`.

    Raises:
        DataError: The split is another, or a file is missing, broken, or of another length.
    """
    if split not in _PREFIXES:
        raise DataError(f"split {split!r} of {folder}: IDX files have 'train' and 'test'.")
    prefix = _PREFIXES[split]
    images = _array(folder / f"{prefix}-images-idx3-ubyte", 3)
    labels = _array(folder / f"{prefix}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} images but {len(labels)} labels of {split}.")
    size = [int(side) for side in images.shape[1:]]
    return [
        {"image": image.tobytes(), "size": size, "label": int(label)}
        for image, label in zip(images, labels, strict=True)
    ]


def _array(path: Path, dimensions: int) -> np.ndarray:
    """Unsigned bytes: two zero bytes, the type 8, the number of dimensions, their sizes, data."""
    packed = path.with_name(path.name + ".gz")
    try:
        raw = gzip.decompress(packed.read_bytes()) if packed.is_file() else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"data {path}: cannot be read ({error}).") from error
    header = 4 + 4 * dimensions
    if len(raw) < header or raw[:4] != bytes([0, 0, _BYTES, dimensions]):
        raise DataError(f"data {path}: is no IDX file of bytes in {dimensions} dimensions.")
    shape = struct.unpack(f">{dimensions}I", raw[4:header])
    if len(raw) - header != int(np.prod(shape, dtype=object)):
        raise DataError(f"data {path}: its length does not fit its dimensions {shape}.")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
