"""Broken copies of adapters, plans and profiles, and what loading them may do."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from torch import nn

from rankwise import load_adapter
from rankwise.errors import RankwiseError

FILES = ("adapter_config.json", "adapter_model.safetensors")
SECONDS = 2.0
"""Most that one broken adapter may take, on a machine that is doing other things."""


def mutated(content: bytes, draw: random.Random) -> bytes:
    """One of: flipped bits, a cut, an insertion, a repetition, another number, swapped parts."""
    data = bytearray(content)
    at = draw.randrange(len(data))
    # headers and settings are at the front, and most of a file is weights
    at = min(at, draw.randrange(len(data)), draw.choice([8, 64, 512, len(data)]))
    kind = draw.randrange(7)
    if kind == 0:
        for _ in range(draw.choice([1, 1, 2, 16])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        data[at % len(data)] ^= 1 << draw.randrange(8)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        data[at:at] = draw.randbytes(draw.choice([1, 8, 1000]))
    elif kind == 4:
        data[at:at] = data[: draw.choice([16, 4096])] * draw.choice([1, 50])
    elif kind == 5:
        digits = [i for i, byte in enumerate(data[:4096]) if chr(byte).isdigit()]
        if digits:
            where = draw.choice(digits)
            data[where : where + 1] = draw.choice(
                [b"0", b"-3", b"4.5", b'"4"', b"1e9", b"1" + b"0" * 400, b"null", b"NaN", b"true"]
            )
    else:
        end = draw.randrange(at, len(data)) if at < len(data) else at
        del data[at:end]
    return bytes(data)


def fuzz(
    make_model: type[nn.Module], original: Path, scratch: Path, runs: int, seed: int
) -> Counter[str]:
    """Load `runs` broken adapters; any error but ours, or one that takes long, is raised on."""
    draw = random.Random(seed)
    outcomes: Counter[str] = Counter()
    names = {name for name, _ in make_model().named_modules()}
    model = make_model()
    for _ in range(runs):
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(original, scratch)
        target = scratch / draw.choice(FILES)
        target.write_bytes(mutated(target.read_bytes(), draw))
        started = time.perf_counter()
        try:
            load_adapter(model, scratch)
            outcomes["loaded"] += 1
            model = make_model()
        except RankwiseError as error:
            outcomes[type(error).__name__] += 1
            assert {name for name, _ in model.named_modules()} == names, "the model was changed"
        seconds = time.perf_counter() - started
        assert seconds < SECONDS, f"{seconds:.1f} s for {target.read_bytes()[:200]!r}"
    return outcomes


def fuzz_files(
    load: Callable[[Path], object], original: Path, scratch: Path, runs: int, seed: int
) -> Counter[str]:
    """The same for what `load` reads from a file, or from a folder of files.

    What can be loaded must also show itself.
    """
    draw = random.Random(seed)
    outcomes: Counter[str] = Counter()
    files = sorted(p.name for p in original.iterdir()) if original.is_dir() else [original.name]
    source = original if original.is_dir() else original.parent
    scratch.mkdir()
    for _ in range(runs):
        for name in files:
            shutil.copyfile(source / name, scratch / name)
        target = scratch / draw.choice(files)
        target.write_bytes(mutated(target.read_bytes(), draw))
        started = time.perf_counter()
        try:
            str(load(scratch if original.is_dir() else target))
            outcomes["loaded"] += 1
        except RankwiseError as error:
            outcomes[type(error).__name__] += 1
        seconds = time.perf_counter() - started
        assert seconds < SECONDS, f"{seconds:.1f} s for {target.read_bytes()[:200]!r}"
    return outcomes
