"""What the configuration of a saved adapter may say, and PEFT's configuration made from it.

Patterns are read literally, and nothing that the file names is imported or opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from peft import LoraConfig
from pydantic import ConfigDict

from rankwise.adapters.block_diagonal import RaLoraConfig
from rankwise.adapters.changed_base import why_base_changed
from rankwise.adapters.literal_patterns import literal_patterns
from rankwise.adapters.lr_lora_config import LrLoraConfig
from rankwise.errors import FileError, nearest
from rankwise.files import parse_json, read_text
from rankwise.plan import BlockOptions

MAX_CONFIG_BYTES = 16 * 1024 * 1024
WHAT = "adapter configuration"
_STRICT = ConfigDict(extra="forbid")


@dataclass
class SavedConfig:
    """Fields of PEFT's that both kinds have, with the only values that are taken."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    r: int
    target_modules: list[str] | str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    peft_version: str | None = None
    revision: str | None = None
    auto_mapping: dict[str, str | None] | None = None
    inference_mode: bool = False
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    bias: Literal["none", "all", "lora_only", "ralora_only", "lrlora_only"] = "none"


@dataclass
class SavedRaLora(SavedConfig):
    """The fields of `RaLoraConfig`."""

    peft_type: Literal["RALORA"] = "RALORA"
    alpha: float = 16.0
    rank_scaling: str = BlockOptions.rank_scaling
    scaling: str = BlockOptions.scaling
    blocks: int = 1
    blocks_pattern: dict[str, int] = field(default_factory=dict)
    dropout: float = 0.0
    init_fan_in: str = BlockOptions.init_fan_in
    init_weights: bool = True
    base_fingerprint: str | None = None


@dataclass
class SavedLrLora(SavedConfig):
    """The fields of `LrLoraConfig`."""

    peft_type: Literal["LRLORA"] = "LRLORA"
    alpha: float = 16.0
    dropout: float = 0.0
    basis: str = "sinc"
    points: int = 50
    span: float = 3.0
    grid: str = "uniform"
    grid_seed: int = 0
    bandwidth: str = "learned"
    bandwidth_init: float = 1.0
    init: str = "live"
    amplitude_std: float = 0.1
    constant: bool = True
    omega: float = 100.0
    share: str = "none"
    init_weights: bool = True
    base_fingerprint: str | None = None


@dataclass
class SavedLora(SavedConfig):
    """The fields of `peft.LoraConfig` that plain LoRA uses; others must be as PEFT writes them."""

    peft_type: Literal["LORA"] = "LORA"
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    init_lora_weights: bool | str = True


Saved = SavedRaLora | SavedLrLora | SavedLora
OurConfig = RaLoraConfig | LrLoraConfig | LoraConfig


def read_config(path: Path) -> Saved:
    """The validated content of `adapter_config.json`.

    Raises:
        FileError: It is too large or malformed, names a field that is not read, or another type.
    """
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise FileError(f"{WHAT} {path}: {size} bytes; at most {MAX_CONFIG_BYTES} are read.")
    text = read_text(path, WHAT)
    document = parse_json(text, dict[str, Any], path=path, what=WHAT)
    kind = document.get("peft_type")
    if kind == "RALORA":
        return parse_json(text, SavedRaLora, path=path, what=WHAT)
    if kind == "LRLORA":
        return parse_json(text, SavedLrLora, path=path, what=WHAT)
    if kind == "LORA":
        known = {f.name for f in fields(SavedLora)}
        unset = _defaults_of_lora()
        kept = {k: v for k, v in document.items() if k in known or k not in unset or v != unset[k]}
        for name in kept:
            if name not in known:
                raise FileError(
                    f"{WHAT} {path}: {name} is not read by rankwise; {nearest(name, known)} "
                    "Load an adapter that you trust with peft.PeftModel.from_pretrained."
                )
        return parse_json(json.dumps(kept), SavedLora, path=path, what=WHAT)
    raise FileError(f"{WHAT} {path}: peft_type={kind!r} must be 'RALORA', 'LRLORA' or 'LORA'.")


def _defaults_of_lora() -> dict[str, Any]:
    """What PEFT writes for the options of LoRA that were not used."""
    default: dict[str, Any] = json.loads(json.dumps(LoraConfig().to_dict(), default=str))
    return default


def peft_config(
    saved: Saved,
    names: list[str],
    path: Path,
    trainable: bool,
) -> OurConfig:
    """PEFT's configuration, every module by its literal name; the base is the one at hand."""
    common: dict[str, Any] = {
        "task_type": saved.task_type,
        "modules_to_save": saved.modules_to_save,
        "target_modules": names,
        "inference_mode": not trainable,
        "bias": saved.bias,
        "r": saved.r,
    }
    try:
        if not isinstance(saved, SavedLora):
            own = {f.name: getattr(saved, f.name) for f in _own_fields(type(saved))}
            kind: type[OurConfig] = RaLoraConfig if isinstance(saved, SavedRaLora) else LrLoraConfig
            return kind(**common, rank_pattern=saved.rank_pattern, **own)
        return _lora_config(saved, common, names, path)
    except (ValueError, TypeError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{WHAT} {path}: {error}") from error


def _own_fields(kind: type[SavedConfig]) -> list[Any]:
    common = {f.name for f in fields(SavedConfig)}
    return [f for f in fields(kind) if f.name not in common and f.name != "peft_type"]


def _lora_config(
    saved: SavedLora, common: dict[str, Any], names: list[str], path: Path
) -> LoraConfig:
    """The ranks and alphas that the file's patterns give each module, read literally."""
    for option in ("rank_pattern", "alpha_pattern"):
        for key, value in getattr(saved, option).items():
            _check_positive(f"{option}[{key!r}]", value)
    if saved.bias in ("ralora_only", "lrlora_only"):
        raise ValueError(f"bias={saved.bias!r} must be 'none', 'all' or 'lora_only' in plain LoRA.")
    changed = why_base_changed(saved.init_lora_weights)
    if changed is not None:
        raise ValueError(
            f"{changed}. Load an adapter that you trust with peft.PeftModel.from_pretrained, which "
            "takes it out again, and export merged weights."
        )
    _check_positive("r", saved.r)
    _check_positive("lora_alpha", saved.lora_alpha)
    if not 0 <= saved.lora_dropout < 1:
        raise ValueError(f"lora_dropout={saved.lora_dropout!r} must be in [0, 1).")
    return LoraConfig(
        **common,
        lora_alpha=saved.lora_alpha,  # type: ignore[arg-type]  # PEFT takes floats too
        lora_dropout=saved.lora_dropout,
        use_rslora=saved.use_rslora,
        fan_in_fan_out=saved.fan_in_fan_out,
        rank_pattern=_by_module(saved.rank_pattern, names, saved.r, path),
        alpha_pattern=_by_module(saved.alpha_pattern, names, saved.lora_alpha, path),
    )


def _check_positive(name: str, value: float) -> None:
    if not (0 < value < 1e9):
        raise ValueError(f"{name}={value!r} must be a positive number below 1e9.")


def _by_module(
    pattern: Mapping[str, Any], names: list[str], default: Any, path: Path
) -> dict[str, Any]:
    """A pattern with one anchored, escaped key per module."""
    value_of = literal_patterns(pattern, default, f"{WHAT} {path}")
    return {"^" + re.escape(name): value_of(name) for name in names}
