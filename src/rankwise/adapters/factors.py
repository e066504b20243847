"""The two factors of one LoRA layer, and the optimizer state that belongs to their rows.

Rank is the first axis here: row j of A, column j of B and the optimizer's moments of both are one
*slot*. A layer of rank r has `slots >= r` of them; those from r on are *empty*: zero in both
factors and in every moment. An empty slot stays empty without any mask in the training step:

    dL/dB[:, j] = s g' (x A[j]')  and  dL/dA[j] = s (g B[:, j])' x

are exactly zero where A[j] and B[:, j] are, and SGD, Adam and AdamW move a zero with zero gradient
and zero moments nowhere, weight decay and clipping included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rankwise.adapters.changed_base import why_base_changed
from rankwise.errors import DynamicError, PlanError


class HasState(Protocol):
    """An optimizer, or a wrapper that shows its state as Accelerate's does."""

    @property
    def state(self) -> Any:
        """Parameter -> name -> tensor or number."""


@dataclass(frozen=True)
class LoraFactors:
    """The factors of one module's LoRA layer: `delta_W = s B A`.

    Attributes:
        name: Module name in the base model.
        layer: PEFT's layer.
        adapter: Name of the adapter.
    """

    name: str
    layer: LoraLayer
    adapter: str

    @property
    def a(self) -> nn.Parameter:
        """A `(slots, d_in)`."""
        return self._linear(self.layer.lora_A).weight  # type: ignore[return-value]

    @property
    def b(self) -> nn.Parameter:
        """B `(d_out, slots)`."""
        return self._linear(self.layer.lora_B).weight  # type: ignore[return-value]

    @property
    def slots(self) -> int:
        """Allocated rank."""
        return int(self.a.shape[0])

    @property
    def scaling(self) -> float:
        """The factor s of the update."""
        return float(self.layer.scaling[self.adapter])

    def rows(self, optimizer: HasState | None) -> list[Tensor]:
        """A, B' and all their moments as views whose first axis is the slots."""
        views: list[Tensor] = [self.a.detach(), self.b.detach().T]
        views += self.moments(optimizer)
        return views

    def moments(self, optimizer: HasState | None) -> list[Tensor]:
        """The moments of A and B as views whose first axis is the slots."""
        state = {} if optimizer is None else optimizer.state
        of_a = [tensor for _, tensor in _moments(state, self.a, self.name)]
        of_b = [tensor.T for _, tensor in _moments(state, self.b, self.name)]
        return of_a + of_b

    def check_empty(self, rank: int, optimizer: HasState | None = None) -> None:
        """Refuse to go on if a slot from `rank` on holds anything.

        Raises:
            DynamicError: Something moved an empty slot, so the rank is not what it is said to be.
        """
        if any(bool(view[rank:].any()) for view in self.rows(optimizer)):
            raise DynamicError(
                f"{self.name}: a slot beyond its rank {rank} is not empty. The optimizer moves "
                "parameters whose gradient and moments are zero, or other code writes to the "
                "adapter; use AdamW, Adam or SGD."
            )

    def allocate_(self, slots: int, optimizer: HasState | None = None) -> None:
        """Change the number of slots in place; new ones are empty, those cut off must be.

        The parameters stay the same objects, so that optimizer groups and schedulers hold on.
        """
        if slots == self.slots:
            return
        self.check_empty(slots, optimizer)
        state = {} if optimizer is None else optimizer.state
        for parameter, axis in ((self.a, 0), (self.b, 1)):
            for key, tensor in list(_moments(state, parameter, self.name)):
                state[parameter][key] = _resized(tensor, slots, axis)
            _reshape_(parameter, _resized(parameter.detach(), slots, axis))
        self._linear(self.layer.lora_A).out_features = slots
        self._linear(self.layer.lora_B).in_features = slots
        self.layer.lora_alpha[self.adapter] = self.scaling * slots
        self.layer.r[self.adapter] = slots

    def _linear(self, container: nn.ModuleDict) -> nn.Linear:
        return container[self.adapter]  # type: ignore[return-value]


def lora_factors(model: PeftModel, adapter: str = "default") -> dict[str, LoraFactors]:
    """The factors of every adapted module, by its name in the base model, in model order.

    Raises:
        PlanError: The model carries no such adapter, or one whose layers are not plain LoRA.
    """
    config = model.peft_config.get(adapter)
    if not isinstance(config, LoraConfig):
        raise PlanError(
            f"adapter {adapter!r} of this model is {type(config).__name__}; only plain LoRA has "
            "ranks that can move. Attach a plan whose adapter is 'lora'."
        )
    changed = why_base_changed(config.init_lora_weights)
    if changed is not None:
        raise PlanError(f"adapter {adapter!r}: {changed}, so its ranks cannot move.")
    base = model.get_base_model()
    found: dict[str, LoraFactors] = {}
    for name, module in base.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        if module.lora_variant or module.lora_bias.get(adapter) or module.merged:
            raise PlanError(
                f"{name}: a merged adapter, a LoRA variant (DoRA and the like) or lora_bias=True "
                "has more than two factors to move; use plain, unmerged LoRA."
            )
        found[name] = LoraFactors(name, module, adapter)
    if not found:
        raise PlanError(
            f"adapter {adapter!r} has no LoRA layer of two matrices; check the targets."
        )
    return found


_MOMENTS = frozenset(
    {
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf"),  # Adam and its relatives, Lion
        *("momentum_buffer", "square_avg", "grad_avg"),  # SGD, RMSprop
        *("sum", "acc_delta"),  # Adagrad, Adadelta
        *("state1", "state2"),  # bitsandbytes
    }
)
"""State that is zero where a parameter and its gradients always were."""


def _moments(
    state: Mapping[Any, MutableMapping[str, Any]], parameter: Tensor, name: str
) -> Iterator[tuple[str, Tensor]]:
    """The parts of a parameter's optimizer state that have one entry per parameter entry."""
    for key, value in state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            continue  # step counts
        if value.shape != parameter.shape or not value.is_floating_point():
            raise DynamicError(
                f"{name}: the optimizer keeps {key!r} as {value.dtype} {tuple(value.shape)} for a "
                f"factor of shape {tuple(parameter.shape)}, so its rows cannot follow a change of "
                "rank. Use an optimizer with plain moments: AdamW, Adam, SGD."
            )
        if key not in _MOMENTS:
            raise DynamicError(
                f"{name}: the optimizer keeps {key!r} of every parameter, which may be no moment "
                "but another iterate of it, so it cannot follow a change of rank. Use an optimizer "
                "with plain moments: AdamW, Adam, SGD."
            )
        yield key, value


def _reshape_(parameter: nn.Parameter, new: Tensor) -> None:
    """Give a parameter data of another shape.

    A graph that is still alive, through a loss someone keeps, holds the accumulator of the
    parameter's gradient, which would hand the old shape to the next backward pass. Autograd makes a
    new one only when the dtype changes, so that is changed and changed back.
    """
    parameter.grad = None
    other = torch.float64 if new.dtype != torch.float64 else torch.float32
    parameter.data = new.new_empty(0, dtype=other)
    parameter.data = new


def _resized(tensor: Tensor, slots: int, axis: int) -> Tensor:
    shape = list(tensor.shape)
    kept = min(shape[axis], slots)
    shape[axis] = slots
    new = tensor.new_zeros(shape)
    new.narrow(axis, 0, kept).copy_(tensor.narrow(axis, 0, kept))
    return new
