from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from rankwise.profiling.capture import capture_gradients

Seen = list[tuple[str, Tensor, Tensor]]


def recorder() -> tuple[Seen, object]:
    seen: Seen = []
    return seen, lambda name, x, g: seen.append((name, x.clone(), g.clone()))


def test_consumer_gets_the_factors_of_the_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Conv1D(3, 6))
    x = torch.randn(2, 5, 4)
    seen, consume = recorder()
    with capture_gradients(model, ["0", "2"], consume):
        model(x).square().sum().backward()
    assert [name for name, _, _ in seen] == ["2", "0"]  # backward runs from the end
    model(x).square().sum().backward()
    for name, inputs, gradients in seen:
        module = model.get_submodule(name)
        assert inputs.shape[0] == gradients.shape[0] == 10
        expected = module.weight.grad if name == "0" else module.weight.grad.T
        torch.testing.assert_close(gradients.T @ inputs, expected)


def test_weights_are_frozen_inside_only() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model[1].bias.requires_grad_(False)
    _, consume = recorder()
    with capture_gradients(model, ["0"], consume):
        assert not any(p.requires_grad for p in model.parameters())
        model(torch.randn(3, 4)).sum().backward()
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_unknown_target_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    _, consume = recorder()
    with pytest.raises(AttributeError), capture_gradients(model, ["0", "nothing"], consume):
        pass
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_is_captured_without_gradients_or_after_the_block() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    seen, consume = recorder()
    with capture_gradients(model, ["0", "1"], consume), torch.no_grad():
        model(torch.randn(3, 4))
    model(torch.randn(3, 4)).sum().backward()
    assert seen == []


def test_every_backward_is_captured_once() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    seen, consume = recorder()
    with capture_gradients(model, ["0", "1"], consume):
        for _ in range(3):
            model(torch.randn(3, 4)).sum().backward()
    assert sorted(name for name, _, _ in seen) == ["0"] * 3 + ["1"] * 3


def test_frozen_model_is_measured_all_the_same() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).requires_grad_(False)
    seen, consume = recorder()
    with capture_gradients(model, ["0", "1"], consume):
        model(torch.randn(3, 4)).sum().backward()
    assert len(seen) == 2
    assert not any(p.requires_grad for p in model.parameters())


class Checkpointed(nn.Module):
    """A body that recomputes itself, as transformers does without helping the gradient in."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        self.use_reentrant = use_reentrant

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.embedding(ids)
        return checkpoint(self.body, embedded, use_reentrant=self.use_reentrant).square().sum()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_body_of_a_frozen_model(use_reentrant: bool) -> None:
    model = Checkpointed(use_reentrant=use_reentrant)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    seen, consume = recorder()
    with capture_gradients(model, ["body.0", "body.2"], consume):
        model(ids).backward()
    assert [name for name, _, _ in seen] == ["body.2", "body.0"]
    model(ids).backward()
    for name, inputs, gradients in seen:
        torch.testing.assert_close(gradients.T @ inputs, model.get_submodule(name).weight.grad)


def five_times_the_gradient(_module: nn.Module, _inputs: object, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(lambda gradient: 5 * gradient)


@pytest.mark.parametrize(
    "hook",
    [
        lambda _module, _inputs, output: 3 * output,
        lambda _module, _inputs, output: output.mul_(3),
        lambda _module, _inputs, output: output.relu_(),
        five_times_the_gradient,
    ],
    ids=["another output", "in place", "in-place activation", "another gradient"],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4)])
def test_what_follows_a_layer_does_not_hide_its_gradient(
    hook: Callable[..., Tensor | None], bias: bool, shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6, bias=bias), nn.Tanh())
    model[1].register_forward_hook(hook)
    x = torch.randn(shape)
    seen, consume = recorder()
    with capture_gradients(model, ["0", "1"], consume):
        model(x).square().sum().backward()
    model(x).square().sum().backward()
    assert [name for name, _, _ in seen] == ["1", "0"]
    for name, inputs, gradients in seen:
        torch.testing.assert_close(gradients.T @ inputs, model.get_submodule(name).weight.grad)


@pytest.mark.parametrize(("layer", "keyword"), [(nn.Linear(4, 6), "input"), (Conv1D(6, 4), "x")])
def test_a_layer_that_is_called_by_keyword(layer: nn.Module, keyword: str) -> None:
    x = torch.randn(5, 4)
    seen, consume = recorder()
    with capture_gradients(layer, [""], consume):
        layer(**{keyword: x}).sum().backward()
    ((_, inputs, gradients),) = seen
    assert torch.equal(inputs, x) and torch.equal(gradients, torch.ones(5, 6))


def test_parameters_that_were_replaced_inside_are_given_back_too() -> None:
    """Offloading does so around every forward pass."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    _, consume = recorder()
    with capture_gradients(model, ["0"], consume):
        model[1].weight = nn.Parameter(model[1].weight.detach(), requires_grad=False)
    assert all(p.requires_grad for p in model.parameters())
