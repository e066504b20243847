"""Which base an adapter was trained on, in files whose configuration has no place for it.

`LoraConfig` knows no such field, and PEFT warns of fields that it does not know. The header of a
safetensors file takes any text, which other programs ignore.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from safetensors import safe_open

from rankwise.files import write_bytes
from rankwise.tensor_files import with_metadata

FINGERPRINT_KEY = "rankwise_base_fingerprint"
_ATTRIBUTE = "base_fingerprint"


def remember_base_(config: PeftConfig, fingerprint: str) -> None:
    """Keep the fingerprint of the base in the configuration of its adapter.

    It is a field of `RaLoraConfig` and there saved; on others it is an attribute that lives as long
    as they do, and `write_base_fingerprint` saves it.
    """
    setattr(config, _ATTRIBUTE, fingerprint)


def base_fingerprint(model: PeftModel, adapter: str) -> str | None:
    """The fingerprint that an adapter's configuration remembers, if it does."""
    found: Any = getattr(model.peft_config[adapter], _ATTRIBUTE, None)
    return found if isinstance(found, str) else None


def write_base_fingerprint(model: PeftModel, weights: Path, adapter: str) -> None:
    """Put the fingerprint into the header of a file that PEFT saved; its tensors stay the same.

    Args:
        model: Whose adapter was saved.
        weights: The safetensors file.
        adapter: Name of the adapter.
    """
    if any(field.name == _ATTRIBUTE for field in fields(model.peft_config[adapter])):
        return  # the configuration has it
    write_fingerprint(weights, base_fingerprint(model, adapter))


def write_fingerprint(weights: Path, fingerprint: str | None) -> None:
    """The same for a fingerprint that is known; None leaves the file as it is."""
    if fingerprint is None:
        return
    with safe_open(weights, framework="pt") as file:
        metadata = (file.metadata() or {}) | {FINGERPRINT_KEY: fingerprint}
    write_bytes(weights, with_metadata(weights.read_bytes(), metadata))
