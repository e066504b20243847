"""Which modules LR-LoRA's ablations adapt."""

from __future__ import annotations

from typing import Any

import pytest

from rankwise import LinearShape, placed_modules
from rankwise.errors import TargetError

ATTENTION = [f"self_attn.{k}_proj" for k in "qkvo"]
MLP = [f"mlp.{k}_proj" for k in ("gate", "up", "down")]
LLAMA = {
    f"model.layers.{i}.{kind}": LinearShape(8, 8) for i in range(5) for kind in ATTENTION + MLP
}


def kinds(part: Any) -> list[str]:
    names = placed_modules(LLAMA, part)
    assert len(names) % 5 == 0
    return [name.removeprefix("model.layers.0.") for name in names[: len(names) // 5]]


def layers(**options: Any) -> list[int]:
    return sorted({int(name.split(".")[2]) for name in placed_modules(LLAMA, **options)})


def test_parts() -> None:
    assert kinds("all") == ATTENTION + MLP
    assert kinds("attention") == ATTENTION
    assert kinds("mlp") == MLP
    assert kinds("qkv") == ATTENTION[:3]
    assert kinds("gate_up") == MLP[:2]


def test_layers() -> None:
    assert layers() == [0, 1, 2, 3, 4]
    assert layers(layers="odd") == [1, 3]
    assert layers(layers="even") == [0, 2, 4]
    assert layers(layers="first_last", edge=1) == [0, 4]
    assert layers(layers="first_last", edge=2) == [0, 1, 3, 4]
    assert layers(layers="first_last") == [0, 1, 2, 3, 4]
    assert len(placed_modules(LLAMA, "qkv", layers="odd")) == 6


def test_every_stack_has_a_last_layer() -> None:
    towers = {f"text.layers.{i}.fc": LinearShape(8, 8) for i in range(4)}
    towers |= {f"vision.layers.{i}.fc": LinearShape(8, 8) for i in range(6)}
    assert [name[0] + name.split(".")[2] for name in placed_modules(
        towers, layers="first_last", edge=1
    )] == ["t0", "t3", "v0", "v5"]  # fmt: skip


def test_other_names() -> None:
    bert = {
        f"bert.encoder.layer.0.{kind}": LinearShape(8, 8)
        for kind in (
            *("attention.self.query", "attention.output.dense"),
            *("intermediate.dense", "output.dense"),
        )
    }
    assert placed_modules(bert, "qkv") == ["bert.encoder.layer.0.attention.self.query"]
    assert len(placed_modules(bert, "attention")) == 2
    assert placed_modules(bert, "mlp") == [
        "bert.encoder.layer.0.intermediate.dense",
        "bert.encoder.layer.0.output.dense",
    ]


def test_a_module_outside_the_stack_has_no_layer() -> None:
    targets = LLAMA | {"adapter.mlp.up_proj": LinearShape(8, 8)}
    assert "adapter.mlp.up_proj" in placed_modules(targets, "mlp")
    assert "adapter.mlp.up_proj" not in placed_modules(targets, "mlp", layers="even")


def test_what_leaves_nothing_or_is_not_known_is_refused() -> None:
    with pytest.raises(TargetError, match="leaves none of the 1 targets"):
        placed_modules({"layers.0.fc": LinearShape(8, 8)}, "qkv")
    with pytest.raises(TargetError, match="part='attn' is not known"):
        placed_modules(LLAMA, "attn")  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="layers='first' is not known"):
        placed_modules(LLAMA, layers="first")  # type: ignore[arg-type]
