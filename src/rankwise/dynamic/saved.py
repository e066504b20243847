"""The state of a dynamic run, as a checkpoint holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, NonNegativeInt
from torch import Tensor

from rankwise.dynamic.controller import ControllerState
from rankwise.dynamic.events import RankEvent
from rankwise.errors import DynamicError
from rankwise.files import parse_json
from rankwise.provenance import DataFingerprint

STATE_VERSION = 1


@dataclass(frozen=True)
class SavedRanks:
    """What a checkpoint holds of a dynamic run, beside weights and optimizer state.

    Attributes:
        settings: Method, options, mode and plan the run was started with.
        steps: Optimizer steps taken.
        controller: Ranks and averages.
        events: Everything that happened.
        window: Hash of the arrays of a window under way; None between windows.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    settings: dict[str, Any]
    steps: NonNegativeInt
    controller: ControllerState
    events: list[RankEvent]
    window: str | None = None
    schema_version: int = STATE_VERSION

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse to go on with other settings than the run was started with.

        Raises:
            DynamicError: Names what differs.
        """
        kept = self.settings
        if isinstance(plan := kept.get("plan"), dict):
            kept = {**kept, "plan": start_of(plan)}  # earlier versions kept all of it
        for key, value in json.loads(json.dumps(settings)).items():
            if kept.get(key) != value:
                raise DynamicError(
                    f"the checkpoint was made with another {key}: {kept.get(key)!r}, now "
                    f"{value!r}. Resume with the settings of the run, or start a new one."
                )


def start_of(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What of a plan, as plain values, decides where ranks start.

    When and on what it was measured does not.
    """
    kept = {key: plan.get(key) for key in ("adapter", "r_ref", "alpha", "budget")}
    modules = plan.get("modules") or {}
    sides = ("d_in", "d_out", "rank")
    return kept | {
        "modules": {name: {side: m.get(side) for side in sides} for name, m in modules.items()}
    }


def digest(arrays: Mapping[str, Tensor]) -> str | None:
    """A hash of a window's arrays; None if there are none."""
    if not arrays:
        return None
    found = DataFingerprint()
    found.update(arrays)
    return found.hexdigest()


def read_saved(document: object, path: Path) -> SavedRanks:
    """The state of a dynamic run from the JSON of a checkpoint.

    Raises:
        FileError: It is malformed or of another version.
    """
    return parse_json(
        json.dumps(document), SavedRanks, path=path, what="dynamic ranks", version=STATE_VERSION
    )
