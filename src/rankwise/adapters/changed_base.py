"""Starts of PEFT's LoRA that take a part of the adapter out of the base's weights."""

from __future__ import annotations

_KEEP_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


def why_base_changed(init_lora_weights: object) -> str | None:
    """Why the factors belong to other weights than the base's own; None if they do not.

    PiSSA, OLoRA and their like begin with `W - s B A` in place of W, so the same factors on W give
    another model. What is not known to keep W counts as one of them.
    """
    if init_lora_weights in _KEEP_THE_BASE:
        return None
    return (
        f"init_lora_weights={init_lora_weights!r} took a part of the adapter out of the base's "
        "weights, which the factors alone do not say"
    )
