"""What an adapter may cost: no matrix as large as the weight in training, nothing when merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from contracts import train_by_chance_
from rankwise import RaLoraConfig, fuse_lora_
from tiny_models import VOCABULARY, tiny_llama


class Operations(TorchDispatchMode):
    """Every operation with the shapes of its tensors, and the elements of the largest new one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen.append((str(func), [tuple(a.shape) for a in args if isinstance(a, Tensor)]))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor) and value._base is None and not func.is_view:
                self.elements = max(self.elements, value.numel())
        return result


def adapted(base: nn.Module, kind: str, blocks: int = 1, **options: Any) -> PeftModel:
    if kind == "ralora":
        return get_peft_model(base, RaLoraConfig(blocks=blocks, **options))
    if "dropout" in options:
        options["lora_dropout"] = options.pop("dropout")
    model = get_peft_model(base, LoraConfig(**options))
    assert fuse_lora_(model)
    return model


@pytest.mark.parametrize(("kind", "blocks"), [("lora", 1), ("ralora", 1), ("ralora", 32)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_dense_matrix_at_d_4096(kind: str, blocks: int, dropout: float) -> None:
    d, tokens = 4096, 3
    base = nn.Sequential(nn.Linear(d, d, bias=False))
    model = adapted(base, kind, blocks, r=8, target_modules=["0"], dropout=dropout)
    x = torch.randn(tokens, d, requires_grad=True)
    with Operations() as during:
        model.train()(x).sum().backward()
    assert during.elements == 8 * d, "the gradients of A and B are the largest"


def operations(model: nn.Module) -> list[tuple[str, list[tuple[int, ...]]]]:
    tokens = torch.arange(3, 19).reshape(2, 8) % VOCABULARY
    with torch.no_grad(), Operations() as during:
        model.eval()(input_ids=tokens, use_cache=False)
    return during.seen


@pytest.mark.parametrize(("kind", "blocks"), [("lora", 1), ("ralora", 4)])
def test_merged_inference_is_the_bases(kind: str, blocks: int) -> None:
    """The same operations on the same shapes in the same order, hence the same time."""
    # frozen, because torch multiplies by a trainable weight in another way
    expected = operations(tiny_llama().requires_grad_(False))
    model = adapted(tiny_llama(), kind, blocks, r=2, target_modules="all-linear")
    train_by_chance_(model)
    live = operations(model)
    assert len(live) > len(expected)
    model.merge_adapter()
    assert operations(model) == expected
    model.unmerge_adapter()
    assert operations(model.merge_and_unload().requires_grad_(False)) == expected
