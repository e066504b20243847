"""What a saved plan, profile, run record, adapter or comparison contains, as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rankwise.artifacts import (
    PLAN_FILE,
    RECORD_FILE,
    RESULTS_FILE,
    read_adapter_config,
    recognise,
)
from rankwise.errors import FileError
from rankwise.plan import RankPlan
from rankwise.profile_tables import compare_profiles, profile_table
from rankwise.profiling import GradientProfile
from rankwise.records import RunRecord
from rankwise.report.comparison_inspection import describe_comparison
from rankwise.tables import layer_table, make_table, render

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_SETTINGS = ("r", "alpha", "lora_alpha", "scaling", "rank_scaling", "init_fan_in", "use_rslora")


def describe(path: Path) -> str:
    """A text for whatever the path holds.

    Raises:
        FileError: It is missing, malformed, or nothing of ours.
    """
    kind = recognise(path)
    if kind == "profile":
        return str(GradientProfile.load(path))
    if kind == "adapter":
        return _describe_adapter(path)
    if kind == "record":
        return _describe_record(RunRecord.load(path))
    if kind == "plan":
        return str(RankPlan.load(path))
    if kind == "comparison":
        return describe_comparison(path / RESULTS_FILE if path.is_dir() else path)
    return _describe_run(path)


def describe_profile(path: Path, column: str, *, compare: Path | None = None) -> str:
    """One column of a saved profile; with another profile, what differs from it to this one.

    Raises:
        FileError: A path is missing or malformed, or holds no profile.
        ProfileError: No such column, or the two hold different modules.
    """
    for each in filter(None, (path, compare)):
        kind = recognise(each)
        if kind != "profile":
            raise FileError(f"{each}: holds a {kind}; columns are of profiles only.")
    profile = GradientProfile.load(path)
    if compare is None:
        return profile_table(profile, column)
    return compare_profiles(GradientProfile.load(compare), profile, column)


def _describe_run(folder: Path) -> str:
    parts = [_describe_record(RunRecord.load(folder / RECORD_FILE))]
    if (folder / PLAN_FILE).is_file():
        parts.append(str(RankPlan.load(folder / PLAN_FILE)))
    return "\n\n".join(parts)


def _describe_record(record: RunRecord) -> str:
    rows = [
        (point.step, f"{point.loss:.4f}", f"{point.perplexity:.2f}", f"{point.tokens:,}")
        for point in record.held_out
    ]
    table = make_table(["step", "held-out loss", "perplexity", "tokens"], rows)
    seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in record.seconds.items())
    return "\n".join(
        [
            f"run of {record.method} on {record.model}, seed {record.seed}, {record.finished}",
            f"{record.trainable_parameters:,} trainable parameters; {seconds}",
            render(table),
        ]
    )


def _describe_adapter(folder: Path) -> str:
    config = read_adapter_config(folder)
    shapes = _tensor_shapes(folder / _ADAPTER_WEIGHTS)
    cells: dict[str, str] = {}
    total = 0
    for name, shape in shapes.items():
        count = 1
        for size in shape:
            count *= size
        total += count
        module = name.removeprefix("base_model.model.")
        if ".ralora_A" in module and len(shape) == 3:
            cells[module.split(".ralora_A")[0]] = f"r={shape[1]} n={shape[0]}"
        elif ".lrlora_A" in module and len(shape) == 2:
            cells[module.split(".lrlora_A")[0]] = f"r={shape[0]}"
        elif ".lora_A" in module and len(shape) == 2:
            cells[module.split(".lora_A")[0]] = f"r={shape[0]}"
    kind = str(config.get("peft_type", "unknown")).lower()
    base = config.get("base_model_name_or_path") or "an unnamed model"
    return layer_table(
        cells,
        title=f"{kind} adapter for {base}",
        caption=f"{len(cells)} modules, {total:,} parameters{_settings(config)}",
    )


def _settings(config: Mapping[str, Any]) -> str:
    """What the configuration says of scaling and drawing, on a line of its own."""
    said = [f"{key}={config[key]}" for key in _SETTINGS if config.get(key) is not None]
    return "\n" + ", ".join(said) if said else ""


def _tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes from the header alone; the weights stay on disk."""
    if not path.is_file():
        raise FileError(f"adapter weights {path}: no such file; pickle files are never opened.")
    try:
        with safe_open(path, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(
            f"adapter weights {path}: not a whole safetensors file ({error})."
        ) from error
