"""What a path holds, told by its content: profile, plan, run, record, adapter, comparison."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rankwise.errors import FileError
from rankwise.files import read_text
from rankwise.plan import RankPlan
from rankwise.profiling.profile import PROFILE_FILE, GradientProfile
from rankwise.records import RunRecord

RECORD_FILE = "record.json"
PLAN_FILE = "plan.json"
PROFILE_FOLDER = "profile"
ADAPTER_CONFIG_FILE = "adapter_config.json"
EVENTS_FILE = "rank_events.json"
RESULTS_FILE = "results.json"
"""What tells the folder of a comparison."""

EXPERIMENT_FILE = "experiment.json"
"""Of a comparison, written before its first run."""

ArtifactKind = Literal["profile", "plan", "run", "record", "adapter", "comparison"]

_FOLDERS: dict[str, ArtifactKind] = {
    PROFILE_FILE: "profile",
    RECORD_FILE: "run",
    ADAPTER_CONFIG_FILE: "adapter",
    RESULTS_FILE: "comparison",
}
# top-level keys that tell the kinds apart; the loaders check the rest
_FILES: dict[ArtifactKind, frozenset[str]] = {
    "record": frozenset({"train_loss", "held_out"}),
    "plan": frozenset({"method", "modules"}),
    "comparison": frozenset({"rows", "reference", "cells"}),
}


@dataclass(frozen=True)
class SavedRun:
    """What a run folder holds; a lone record has neither plan nor profile."""

    record: RunRecord
    plan: RankPlan | None = None
    profile: GradientProfile | None = None


def recognise(path: Path) -> ArtifactKind:
    """The kind of thing a file or folder holds, whatever its name.

    Raises:
        FileError: It is missing, unreadable, or nothing of ours.
    """
    if path.is_dir():
        for marker, kind in _FOLDERS.items():
            if (path / marker).is_file():
                return kind
        if (path / EXPERIMENT_FILE).is_file():
            raise FileError(
                f"{path}: is a comparison that has no {RESULTS_FILE} yet; rankwise compare writes "
                "it at its end, and with --table at once."
            )
        raise FileError(
            f"{path}: holds no {', '.join(list(_FOLDERS)[:-1])} or {list(_FOLDERS)[-1]}; name a "
            "profile, a run, an adapter, a comparison or a plan."
        )
    text = read_text(path, "file")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"{path}: is not JSON ({error}); name a folder of a profile, a run or an adapter, or "
            "the JSON file of a plan or a run record."
        ) from error
    if isinstance(content, dict):
        for file_kind, keys in _FILES.items():
            if keys <= content.keys():
                return file_kind
        if {"provenance", "modules"} <= content.keys():
            raise FileError(f"{path}: is one file of a profile; name its folder, {path.parent}.")
    raise FileError(
        f"{path}: is JSON, but neither a plan nor a run record; name the file that rankwise wrote."
    )


def load_run(folder: Path) -> SavedRun:
    """Read a run folder: its record, and its plan and profile where they are there.

    Raises:
        FileError: The record is missing, or a part is malformed.
    """
    plan = folder / PLAN_FILE
    profile = folder / PROFILE_FOLDER
    return SavedRun(
        record=RunRecord.load(folder / RECORD_FILE),
        plan=RankPlan.load(plan) if plan.is_file() else None,
        profile=GradientProfile.load(profile) if (profile / PROFILE_FILE).is_file() else None,
    )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The configuration of a saved adapter, as plain values.

    Raises:
        FileError: It is missing, or no JSON object.
    """
    path = folder / ADAPTER_CONFIG_FILE
    try:
        config = json.loads(read_text(path, "adapter configuration"))
    except (ValueError, RecursionError) as error:
        raise FileError(f"adapter configuration {path}: is not valid JSON ({error}).") from error
    if not isinstance(config, dict):
        raise FileError(f"adapter configuration {path}: must hold keys and values.")
    return config
