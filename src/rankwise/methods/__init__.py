"""The methods, one row each: which statistic, which estimator, which rule, which adapter.

| method | statistic | estimator | rule | adapter |
|---|---|---|---|---|
| `Lora` | none | none | uniform rank | LoRA |
| `LoraGid` | mean gradient | effective rank | rank = GID, or GID in a budget | LoRA |
| `LsLora` | sensitivity | none | ranks by sensitivity | LoRA |
| `Gard` | Gram matrix of batch gradients | energy rank | ranks proportional to it | LoRA |
| `WaterFill` | mean gradient | singular values | most energy per parameter | LoRA |
| `RaLora` | mean gradient | effective rank | uniform rank, blocks by GID | block-diagonal |
| `RaLoraPro` | both | effective rank | ranks by sensitivity, blocks by GID | block-diagonal |

`RaLoraThreshold` is RaLoRA by counted singular values, the baseline of its paper's table 7.
`Compose` puts together any statistic, estimator, rule and adapter, among them the controls depth,
gradient norm and random.

A method is a frozen set of options; `plan(profile)` turns measured gradients into a `RankPlan`.
"""

from __future__ import annotations

from collections.abc import Mapping

from rankwise.methods.base import Method
from rankwise.methods.compose import Compose
from rankwise.methods.counted import RaLoraThreshold
from rankwise.methods.sensitivity import LsLora, RaLoraPro
from rankwise.methods.spectral import Gard, LoraGid, WaterFill
from rankwise.methods.uniform import Lora, RaLora

__all__ = [
    "METHODS",
    "Compose",
    "Gard",
    "Lora",
    "LoraGid",
    "LsLora",
    "Method",
    "RaLora",
    "RaLoraPro",
    "RaLoraThreshold",
    "WaterFill",
]

METHODS: Mapping[str, type[Method]] = {
    cls.name: cls
    for cls in (
        Lora,
        LoraGid,
        LsLora,
        Gard,
        WaterFill,
        RaLora,
        RaLoraPro,
        RaLoraThreshold,
        Compose,
    )
}
"""Every method by the name the configuration files use."""
