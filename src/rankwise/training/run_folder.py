"""The folder of a run: what is in it, what it may replace, and what a failed save keeps."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.adapters.base_fingerprint import write_base_fingerprint
from rankwise.adapters.export import WEIGHTS_FILE
from rankwise.artifacts import EVENTS_FILE, PLAN_FILE, PROFILE_FOLDER, RECORD_FILE
from rankwise.dynamic import RankEvent
from rankwise.errors import ConfigError, FileError
from rankwise.files import (
    check_replaceable,
    files_in,
    new_folder,
    parse_json,
    read_text,
    write_text,
)
from rankwise.plan import RankPlan
from rankwise.profiling import GradientProfile
from rankwise.records import RunRecord
from rankwise.run_files import (
    ANALYSIS_FILE,
    LANDSCAPE_FILE,
    TRACKING_FILE,
    Tracking,
    save_run_file,
)

ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"
"""Where a fully fine-tuned run keeps the whole model."""
LOGS_FOLDER = "logs"
"""Files of the tools that `training.report_to` names."""
CONFIG_FILE = "run.yaml"
FILES_FILE = "files.json"
"""Names every other file that the run wrote: what another run may replace."""
_WRITTEN = {
    *(ADAPTER_FOLDER, MODEL_FOLDER, PROFILE_FOLDER, LOGS_FOLDER),
    *(CONFIG_FILE, RECORD_FILE, PLAN_FILE, EVENTS_FILE),
    *(TRACKING_FILE, ANALYSIS_FILE, LANDSCAPE_FILE, FILES_FILE),
}


@dataclass(frozen=True)
class TrainingRun:
    """What a run leaves: record, plan, profile if one was made, trained model, events, analysis.

    The plan of a dynamic run is that of its final ranks; full fine-tuning has none. `tracking` is
    there where gradients were followed.
    """

    record: RunRecord
    plan: RankPlan | None
    profile: GradientProfile | None
    model: PeftModel | PreTrainedModel
    events: list[RankEvent] | None = None
    tracking: Tracking | None = None
    analysis: dict[str, Any] | None = None


def check_output(output: Path, model: str) -> None:
    """Refuse to replace anything but a run, one to which something was added, and the base.

    Args:
        output: The folder to write.
        model: The base model, a folder or a hub id.

    Raises:
        FileError: `output` holds what no run wrote.
        ConfigError: It holds the base model.
    """
    check_replaceable(output, marker=RECORD_FILE, written=_replaceable(output))
    base = Path(model)
    if base.exists() and base.resolve().is_relative_to(output.resolve()):
        raise ConfigError(
            f"output={str(output)!r} would replace the base, model={model!r}; choose another "
            "folder."
        )


def _replaceable(output: Path) -> set[str] | None:
    """The files of `output` that another run may replace; None if it has none."""
    if not output.is_dir():
        return None
    path = output / FILES_FILE
    if not path.is_file():  # a run of an earlier version
        return {name for name in files_in(output) if name.split("/")[0] in _WRITTEN}
    names = parse_json(read_text(path, "list of files"), list[str], path=path, what="list of files")
    return {*names, FILES_FILE, LANDSCAPE_FILE}


def save_or_rescue(
    run: TrainingRun, tokenizer: PreTrainedTokenizerBase, output: Path, logs: Path
) -> None:
    """Save the run; if that fails, what was trained alone, where temporary files go.

    Raises:
        FileError: The run was not saved; it says where the trained weights are.
    """
    try:
        _save(run, tokenizer, output, logs)
    except Exception as error:  # tokenizers knows no better error for a full disk
        kept = _kept_elsewhere(run, tokenizer)
        reason = str(error) if isinstance(error, FileError) else f"{output}: {error}."
        raise FileError(
            f"{reason} Nor could the trained weights be kept in {tempfile.gettempdir()}."
            if kept is None
            else f"{reason} The trained weights are in {kept}; move them to a safe place."
        ) from error


def _kept_elsewhere(run: TrainingRun, tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """A folder of the system's temporary ones that holds what was trained; None if it is full."""
    try:
        place = Path(tempfile.mkdtemp(prefix="rankwise-trained-"))
    except OSError:
        return None
    try:
        _save_trained(run, tokenizer, place)
    except Exception:
        shutil.rmtree(place, ignore_errors=True)
        return None
    return place


def _save_trained(run: TrainingRun, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    run.model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    if run.plan is not None:
        assert isinstance(run.model, PeftModel)
        write_base_fingerprint(run.model, folder / WEIGHTS_FILE, "default")


def _save(run: TrainingRun, tokenizer: PreTrainedTokenizerBase, output: Path, logs: Path) -> None:
    """Everything the run leaves, all or nothing."""
    written = _replaceable(output)
    with new_folder(output, marker=RECORD_FILE, written=written) as folder:
        trained = folder / (MODEL_FOLDER if run.plan is None else ADAPTER_FOLDER)
        _save_trained(run, tokenizer, trained)
        if run.plan is not None:
            run.plan.save(folder / PLAN_FILE)
        if any(logs.iterdir()):
            shutil.copytree(logs, folder / LOGS_FOLDER)
        if run.tracking is not None:
            save_run_file(run.tracking, folder / TRACKING_FILE)
        if run.events is not None:
            events = json.dumps([asdict(event) for event in run.events], indent=2, allow_nan=False)
            write_text(folder / EVENTS_FILE, events + "\n")
        if run.analysis is not None:
            analysis = json.dumps(run.analysis, allow_nan=False)
            write_text(folder / ANALYSIS_FILE, analysis + "\n")
        if run.profile is not None:
            run.profile.save(folder / PROFILE_FOLDER)
        write_text(folder / CONFIG_FILE, yaml.safe_dump(run.record.config, sort_keys=False))
        run.record.save(folder / RECORD_FILE)
        write_text(folder / FILES_FILE, json.dumps(files_in(folder), indent=1) + "\n")
