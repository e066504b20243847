"""How programs that serve LoRA read the scale of an adapter: they differ where ranks differ.

Each rule takes the content of `adapter_config.json`, a module's name, and the rank of its tensors,
and returns the factor in front of B A; NaN where the program does not load such a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

Config = Mapping[str, Any]
ScaleRule = Callable[[Config, str, int], float]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM allows as `--max-lora-rank`."""


def peft_scale(config: Config, module: str, rank: int) -> float:
    """As in PEFT and vLLM after 0.30: alpha and r of the patterns, or the general ones."""
    alpha = _match(config.get("alpha_pattern"), module, config["lora_alpha"])
    r = _match(config.get("rank_pattern"), module, config["r"])
    return _divided(config, alpha, r)


def one_scale(config: Config, module: str, rank: int) -> float:
    """As in vLLM up to 0.30: the general alpha and r, whatever the patterns say."""
    return _divided(config, config["lora_alpha"], config["r"])


def sglang_scale(config: Config, module: str, rank: int) -> float:
    """As in SGLang: likewise, of files whose tensors all have rank r and whose targets are names.

    It copies every factor into a slot of that shape and asserts that it fits, and takes no regular
    expression (`lora/mem_pool.py` and `lora/utils.py` there).
    """
    names = isinstance(config.get("target_modules"), list)
    return one_scale(config, module, rank) if names and rank == config["r"] else math.nan


def llama_cpp_scale(config: Config, module: str, rank: int) -> float:
    """As in llama.cpp: the general alpha, over the rank of this module's tensors."""
    return float(config["lora_alpha"]) / rank


READERS: dict[str, ScaleRule] = {
    "PEFT": peft_scale,
    "vLLM after 0.30": peft_scale,
    "vLLM up to 0.30": one_scale,
    "SGLang": sglang_scale,
    "llama.cpp": llama_cpp_scale,
}
"""Reader -> its rule."""


def readers_that_are_right(
    config: Config, ranks: Mapping[str, int], scales: Mapping[str, float]
) -> list[str]:
    """The readers that see the intended scale in every module.

    Args:
        config: Content of `adapter_config.json`.
        ranks: Module -> rank of its tensors.
        scales: Module -> the factor that B A of its tensors should have.
    """
    return [
        reader
        for reader, rule in READERS.items()
        if all(
            math.isclose(rule(config, module, rank), scales[module], rel_tol=1e-6)
            for module, rank in ranks.items()
        )
    ]


def vllm_max_rank(rank: int) -> int | None:
    """The smallest `--max-lora-rank` that vLLM allows for an adapter; None if it is too large."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def _divided(config: Config, alpha: float, r: int) -> float:
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def _match(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that is, as a regular expression, the name or an end of it."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
