"""From a saved adapter and its base to an exported folder: the `export` command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankwise.adapters import (
    Exported,
    LrLoraConfig,
    Truncated,
    export_lora,
    export_merged,
    export_truncated,
    load_adapter,
)
from rankwise.adapters.export import MODES
from rankwise.adapters.export_folder import check_export_folder
from rankwise.adapters.truncated import TOLERANCE
from rankwise.errors import ConfigError
from rankwise.training.train import load_model

DTYPES = ("float32", "bfloat16", "float16")


def export_folder(
    adapter: Path,
    base: str,
    out: Path,
    *,
    mode: str = "padded",
    native: bool = False,
    dtype: str = "float32",
    allow_other_base: bool = False,
    rank: int | None = None,
    tolerance: float | None = None,
) -> Exported | Truncated:
    """Load an adapter strictly, and write it in another form.

    Args:
        adapter: Folder of a saved adapter.
        base: Folder or hub id of its base model; that in the adapter's files is not followed.
        out: Folder to write.
        mode: `"padded"`, `"compact"`, `"vllm"` or `"merged"`.
        native: Also write the trainable original to `native/`.
        dtype: In which the base is loaded.
        allow_other_base: Accept a base that the adapter was not trained on.
        rank: Of the truncated SVD that makes an LR-LoRA adapter plain LoRA; see `export_truncated`.
        tolerance: Its largest relative error.

    Raises:
        RankwiseError: Bad input, or outputs that differ; nothing is written.
    """
    if mode not in (*MODES, "merged"):
        raise ConfigError(f"mode={mode!r} must be one of {', '.join(MODES)}, merged.")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}.")
    if mode == "merged" and native:
        raise ConfigError("mode='merged' has no native form beside it; leave --native out.")
    check_export_folder(out)
    for source in (adapter, Path(base)):
        if source.exists() and source.resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"out={str(out)!r} would replace {source}; name another folder.")
    network, tokenizer = load_model(base, dtype)
    model = load_adapter(network, adapter, allow_other_base=allow_other_base)
    chosen: Any = mode
    approximated = mode != "merged" and isinstance(model.active_peft_config, LrLoraConfig)
    if not approximated and (rank is not None or tolerance is not None):
        raise ConfigError("rank and tolerance are for LR-LoRA as plain LoRA; leave them out.")
    if mode == "merged":
        return export_merged(model, out, tokenizer=tokenizer)
    if approximated:
        if native:
            raise ConfigError("an approximation has no native form; copy the adapter itself.")
        limit = TOLERANCE if tolerance is None else tolerance
        return export_truncated(model, out, rank=rank, tolerance=limit, mode=chosen)
    return export_lora(model, out, mode=chosen, native=native)
