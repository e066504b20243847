"""Seeing each target's input and output gradient, exactly once per backward.

`dL/dW = sum_t g_t x_t'` over tokens t, with `x (T, d_in)` the layer's input and `g (T, d_out)` the
gradient of the loss with respect to its output. Both are seen by a hook on the *graph node* that
made the output, which holds on to the input. That works with every weight frozen, on quantised
weights that have no `.grad`, under gradient checkpointing, where a forward hook fires twice but
each node's gradient arrives once, and beside hooks of the user's: the node sees what they make of
the gradient, not what they make of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

CaptureConsumer = Callable[[str, Tensor, Tensor], None]
"""Called as `consume(module_name, x (..., d_in), g (..., d_out))` once per use of a module."""


@contextmanager
def capture_gradients(
    model: nn.Module,
    targets: Iterable[str],
    consume: CaptureConsumer,
    *,
    flat: bool = True,
    from_embeddings: bool = True,
    freeze: bool = True,
) -> Iterator[None]:
    """Call `consume` for every target on every backward inside the block.

    With `flat` the tensors come as `(T, d_in)` and `(T, d_out)`, else in the layer's own shape.
    With `from_embeddings` the graph starts at the input embeddings, as reentrant checkpointing
    needs; else at the first target, or wherever the caller starts it.

    All parameters are frozen meanwhile, unless the backward is a training step's own and `freeze`
    is off; their `requires_grad` and the model's hooks are as before when the block ends, however
    it ends.
    """
    with ExitStack() as stack:
        if freeze:
            stack.enter_context(_frozen(model))
        for module in _input_embeddings(model) if from_embeddings else ():
            _remove_at_exit(stack, module.register_forward_hook(_require_output_grad))
        for name in targets:
            hook = _capturing_hook(name, consume, flat=flat)
            # before the user's own hooks, which may put another output in the place of the layer's
            module = model.get_submodule(name)
            handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            _remove_at_exit(stack, handle)
        yield


def _capturing_hook(
    name: str, consume: CaptureConsumer, *, flat: bool
) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], Tensor]:
    def on_forward(
        module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        output = _require_output_grad(module, inputs, output)
        if not output.requires_grad:
            return output
        if output._is_view():  # changed in place, a view leaves its node out of the graph
            output = torch.ops.aten._unsafe_view(output, output.shape)
        x = (inputs or tuple(named.values()))[0].detach()  # linear layers have one argument
        at = output.output_nr

        def on_gradient(gradients: tuple[Tensor, ...]) -> None:
            gradient: Tensor | None = gradients[at]
            if gradient is None:
                return
            if flat:
                consume(name, x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]))
            else:
                consume(name, x, gradient)

        assert output.grad_fn is not None
        output.grad_fn.register_prehook(on_gradient)
        return output

    return on_forward


def _require_output_grad(_module: nn.Module, _inputs: object, output: Any) -> Any:
    """Let gradients flow although every weight is frozen.

    With reentrant checkpointing the input of a block must require a gradient or its backward is
    skipped, hence the input embeddings; elsewhere the first target's own output is enough. The
    clone is there because a leaf may not be changed in place, as `ReLU(inplace=True)` does.
    """
    if (
        isinstance(output, Tensor)
        and torch.is_grad_enabled()
        and output.is_floating_point()
        and not output.requires_grad
    ):
        return output.requires_grad_(True).clone()
    return output


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        getter = getattr(module, "get_input_embeddings", None)
        if not callable(getter):
            continue
        try:
            embedding = getter()
        except NotImplementedError:
            continue
        if isinstance(embedding, nn.Module):
            found[id(embedding)] = embedding
    return list(found.values())


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    # by name: offloading puts new parameters in the place of the old ones; all names of tied ones,
    # which offloading may part
    before = {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield
    finally:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in before:
                parameter.requires_grad_(before[name])


def _remove_at_exit(stack: ExitStack, handle: RemovableHandle) -> None:
    stack.callback(handle.remove)
