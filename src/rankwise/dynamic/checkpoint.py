"""What a dynamic run keeps in Trainer's checkpoints.

The state is in `trainer_state.json`, which Trainer writes last of its own files. A window under way
is too large for JSON: its arrays lie beside it, and the state holds their hash.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from rankwise.dynamic.saved import SavedRanks, digest, read_saved
from rankwise.dynamic.session import DynamicRanks
from rankwise.errors import DynamicError, RankwiseError
from rankwise.files import read_tensors, read_text, write_bytes

TRAINER_STATE_NAME = "trainer_state.json"  # transformers.trainer names it; its import is slow
WINDOW_FILE = "rankwise_window.safetensors"
CALLBACK = "RankCallback"
SAVED = "saved"


def write_window(checkpoint: Path, arrays: Mapping[str, Tensor]) -> None:
    """Put a window under way beside the state, atomically; nothing between windows.

    Raises:
        FileError: It cannot be written.
    """
    if arrays:
        write_bytes(checkpoint / WINDOW_FILE, save(dict(arrays)))


def restore(ranks: DynamicRanks, saved: SavedRanks, folders: Iterable[Path]) -> None:
    """Continue a run, its window found in the first folder that has the right one.

    Raises:
        DynamicError: No folder has it, or the state does not fit.
    """
    window: dict[str, Tensor] = {}
    if saved.window is not None:
        window = _window(saved.window, [folder / WINDOW_FILE for folder in folders])
    ranks.restore(saved, window)


def saved_in(checkpoint: Path) -> SavedRanks:
    """The state of a dynamic run in a checkpoint folder of Trainer.

    Raises:
        DynamicError: The checkpoint is not whole, or holds none.
        FileError: It is missing, malformed or of another version.
    """
    path = checkpoint / TRAINER_STATE_NAME
    try:
        document = json.loads(read_text(path, "Trainer state"))
    except ValueError as error:
        raise DynamicError(
            f"{path} is not whole ({error}); resume from an earlier checkpoint."
        ) from error
    callbacks = document.get("stateful_callbacks") if isinstance(document, dict) else None
    return saved_of(callbacks, path)


def saved_of(callbacks: object, path: Path) -> SavedRanks:
    """The state of a dynamic run among the states of a Trainer's callbacks.

    Raises:
        DynamicError: There is none.
        FileError: It is malformed or of another version.
    """
    entry: Any = callbacks.get(CALLBACK) if isinstance(callbacks, dict) else None
    saved = entry.get("attributes", {}).get(SAVED) if isinstance(entry, dict) else None
    if saved is None:
        raise DynamicError(
            f"{path} holds no state of a RankCallback, so the ranks, averages and counters of its "
            "run are unknown. Resume from a checkpoint of a run with RankCallback, or start anew."
        )
    return read_saved(saved, path)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a dynamic run, for `resume_from_checkpoint`.

    A process may be killed while it saves. Trainer writes its files one after the other, the state
    last, so a checkpoint whose state can be read, and whose window is there, is whole.

    Args:
        output_dir: `TrainingArguments.output_dir`.

    Returns:
        The folder, or None if there is no whole one.
    """
    found = {
        int(match[1]): folder
        for folder in Path(output_dir).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name))
    }
    for step in sorted(found, reverse=True):
        try:
            saved = saved_in(found[step])
            if saved.window is not None:
                _window(saved.window, [found[step] / WINDOW_FILE])
        except RankwiseError:
            continue
        return found[step]
    return None


def _window(wanted: str, files: Iterable[Path]) -> dict[str, Tensor]:
    files = list(dict.fromkeys(files))
    for file in files:
        if file.is_file():
            arrays = read_tensors(file, "window of gradients")
            if digest(arrays) == wanted:
                return arrays
    raise DynamicError(
        "the checkpoint was made while gradients were measured, and their window is not in "
        f"{', '.join(map(str, files)) or 'any folder named'}: it was killed while saving, or lies "
        "elsewhere. Name its folder in RankCallback(resume_from=...), or resume from "
        "rankwise.last_checkpoint(output_dir)."
    )
