"""The targets of one kind of block, in some of the layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from rankwise.errors import TargetError, nearest
from rankwise.targets import LayerPosition, LinearShape, layer_position

Part = Literal["all", "attention", "mlp", "qkv", "gate_up"]
Layers = Literal["all", "odd", "even", "first_last"]
_PARTS: Mapping[str, str] = {
    "all": "",
    "attention": r"(^|[._])(self_attn|self_attention|attn|attention)([._]|$)",
    "mlp": r"(^|[._])(mlp|ffn|feed_forward|intermediate)([._]|$)|^output\.dense$",
    "qkv": r"(^|[._])(q|k|v|query|key|value|qkv|c_attn)(_proj|_lin)?$",
    "gate_up": r"(^|[._])(gate|up|gate_up)_proj$",
}
_LAYERS: tuple[str, ...] = ("all", "odd", "even", "first_last")


def placed_modules(
    targets: Mapping[str, LinearShape],
    part: Part = "all",
    *,
    layers: Layers = "all",
    edge: int = 8,
) -> list[str]:
    """The targets of one kind, in some layers (LR-LoRA tables 19 and 23).

    Args:
        targets: As `find_targets` returns them.
        part: `"attention"` and `"mlp"` by the name of the block they sit in, `"qkv"` and
            `"gate_up"` by their own.
        layers: `"odd"` and `"even"` by the number in the name, which starts at 0; `"first_last"`
            for the first and the last `edge` layers of every stack.
        edge: Of `"first_last"`; default 8 (the same).

    Returns:
        Full module names in model order, for `target_modules`.

    Raises:
        TargetError: Nothing is left, or an option is not known.
    """
    for name, value, allowed in (("part", part, _PARTS), ("layers", layers, _LAYERS)):
        if value not in allowed:
            raise TargetError(f"{name}={value!r} is not known; {nearest(str(value), allowed)}")
    positions = {name: layer_position(name) for name in targets}
    last: dict[str, int] = {}
    for place in positions.values():
        last[place.stack] = max(place.index or 0, last.get(place.stack, 0))

    def in_layers(place: LayerPosition) -> bool:
        if layers == "all":
            return True
        if place.index is None:
            return False
        if layers == "first_last":
            return place.index < edge or place.index > last[place.stack] - edge
        return place.index % 2 == (layers == "odd")

    chosen = [
        name
        for name, position in positions.items()
        if re.search(_PARTS[part], position.kind) and in_layers(position)
    ]
    if not chosen:
        raise TargetError(
            f"part={part!r} with layers={layers!r} leaves none of the {len(positions)} targets."
        )
    return chosen
