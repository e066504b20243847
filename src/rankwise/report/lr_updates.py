"""The updates of a saved LR-LoRA adapter, as matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.adapters import LrLoraConfig, LrLoraLinear
from rankwise.adapters.transfer import BASES
from rankwise.errors import FileError

_PREFIX = "base_model.model."
_CONTAINERS = ("A", "B", "amplitude", "bandwidth", "grid")
_NAME = "default"
_FUNCTION = (
    "r", "alpha", "init", "basis", "points", "span", "grid", "grid_seed", "bandwidth",
    "bandwidth_init", "omega", "constant",
)  # fmt: skip
"""What of the configuration says what f is; ranks follow from the factors' shapes."""


def lr_parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """By module, its parameters: `A`, `B`, and those of its function."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for part in _CONTAINERS:
            ending = f".lrlora_{part}.weight"
            if key.endswith(ending):
                name = key.removeprefix(_PREFIX).removesuffix(ending)
                found.setdefault(name, {})[part] = tensor
    return found


def lr_updates(
    config: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]], folder: Path
) -> Iterator[tuple[str, Float[Tensor, "d_out d_in"]]]:
    """Every module's `s f(B A)`, one at a time.

    Raises:
        FileError: The configuration or a shape is not that of an LR-LoRA adapter.
    """
    try:
        settings = LrLoraConfig(**{key: config[key] for key in _FUNCTION if key in config})
    except (TypeError, ValueError, ArithmeticError) as error:
        raise FileError(f"{folder}: its configuration is not LR-LoRA's ({error}).") from error
    if settings.basis != "sine":
        expected = (BASES[settings.basis].amplitudes(settings.points),)
        for name, own in parts.items():
            if "amplitude" in own and tuple(own["amplitude"].shape) != expected:
                raise FileError(
                    f"{folder}: module {name} has amplitudes of shape "
                    f"{tuple(own['amplitude'].shape)}; points={settings.points} asks for "
                    f"{expected}."
                )
    shared: dict[str, Tensor] = {}
    for own in parts.values():
        shared = {**own, **shared}
    for name, own in parts.items():
        yield name, _update(settings, {**shared, **own}, own, name, folder)


def _update(
    config: LrLoraConfig,
    held: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    name: str,
    folder: Path,
) -> Tensor:
    """What the layer itself says; parameters that modules share are held by the first of them."""
    a, b = own.get("A"), own.get("B")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise FileError(f"{folder}: module {name} has no factors A and B that fit together.")
    if not all(bool(tensor.isfinite().all()) for tensor in held.values()):
        raise FileError(f"{folder}: the parameters of module {name} are not finite.")
    base = nn.utils.skip_init(nn.Linear, a.shape[1], b.shape[0], bias=False)
    layer = LrLoraLinear(base)
    config.rank_pattern = {name: len(a)}
    try:
        with torch.random.fork_rng(devices=[]):  # drawn before they are overwritten
            layer.add_adapter(_NAME, config, name)
        with torch.no_grad():
            for part in _CONTAINERS:
                container = getattr(layer, f"lrlora_{part}")
                if _NAME in container:
                    container[_NAME].weight.copy_(held[part])
    except (KeyError, RuntimeError, ValueError) as error:
        raise FileError(
            f"{folder}: the parameters of module {name} are not those of its configuration "
            f"({error})."
        ) from error
    with torch.no_grad():
        return layer.delta_weight(_NAME)
