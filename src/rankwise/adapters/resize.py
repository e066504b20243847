"""Growing and shrinking LoRA factors while they train, with their optimizer state.

All changes happen on the first slots of a layer (see `factors`), so that the active ones are always
slots `0 .. r - 1` and the rank alone says which they are. Whether unused slots stay allocated
(masked) or are cut off (resized) makes no difference to what is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from rankwise.adapters.factors import HasState, LoraFactors, lora_factors
from rankwise.errors import PlanError
from rankwise.plan import RankPlan
from rankwise.targets import exact_target_modules


@dataclass(frozen=True)
class Shrinkage:
    """What was lost.

    Attributes:
        discarded: `||delta_W - delta_W'||_F^2`, squared Frobenius norm of the part cut off.
        total: `||delta_W||_F^2` before.
        moments: `"kept"` where whole slots stayed, `"reset"` where a rotation mixed them.
    """

    discarded: float
    total: float
    moments: Literal["kept", "reset"]


def grow_(
    factors: LoraFactors,
    rank: int,
    new_rank: int,
    directions: Float[Tensor, "new d_in"],
    optimizer: HasState | None = None,
) -> None:
    """Fill slots `rank .. new_rank - 1`: A gets the directions, B stays zero.

    `delta_W = s B A` is what it was, to the last bit, and the slots are alive:
    `dL/dB[:, j] = s G A[j]'` is not zero, so that the first step moves the update along
    `-G A[j]' A[j]`, downhill. (With both factors zero nothing would ever move.) The new slots have
    no moments; step counts stay. In place; needs `new_rank` slots.
    """
    _no_gradient(factors)
    factors.check_empty(rank, optimizer)
    with torch.no_grad():
        factors.a[rank:new_rank] = directions.to(factors.a)


def random_directions(
    count: int, d_in: int, generator: torch.Generator
) -> Float[Tensor, "count d_in"]:
    """Rows of A as LoRA draws them: uniform in `+-1 / sqrt(d_in)` (Kaiming with a = sqrt 5).

    In fp32 on the CPU from a generator of its own, so that they are the same on every worker and
    the state of training's generators is not touched.
    """
    bound = 1 / math.sqrt(d_in)
    return torch.empty(count, d_in).uniform_(-bound, bound, generator=generator)


def gradient_directions(
    gradient: Float[Tensor, "d_out d_in"], count: int
) -> Float[Tensor, "count d_in"]:
    """The top right singular vectors of a gradient, as long as LoRA's random rows, `1 / sqrt 3`.

    With B = 0 the first step moves `delta_W` by a negative multiple of `G v v'`, the descent
    direction of the best rank-one step, whichever sign v has.
    """
    right = torch.linalg.svd(gradient.cpu().double(), full_matrices=False).Vh[:count]
    return right / math.sqrt(3)


def shrink_(
    factors: LoraFactors,
    rank: int,
    new_rank: int,
    by: Literal["svd", "norm"] = "svd",
    optimizer: HasState | None = None,
) -> Shrinkage:
    """Reduce the active slots to `new_rank`, in place; the slots given up become empty.

    `"svd"` keeps the best approximation of rank r' (Eckart-Young): with thin `B = Q_b R_b`,
    `A' = Q_a R_a` and `R_b R_a' = U S V'`, it loses exactly `s^2 sum_{i > r'} S_i^2`. The new rows
    of A are `c v_i`, with c the root mean square length of the old ones, and B carries the singular
    values: a direction not yet used keeps a live A, which equal shares of S would make zero for
    good. The rotation mixes the slots, so their moments are reset.

    `"norm"` drops the slots of smallest `||a_j|| ||b_j||`, later ones first among equals; those
    kept stay as they are, moments included, in their order.

    Computed in fp64, stored in the factors' dtype.
    """
    _no_gradient(factors)
    a = factors.a.detach()[:rank].cpu().double()
    b = factors.b.detach()[:, :rank].cpu().double()
    square = factors.scaling**2
    if by == "norm":
        weight = a.norm(dim=1) * b.norm(dim=0)
        order = torch.sort(weight, descending=True, stable=True).indices
        kept, lost = order[:new_rank].sort().values, order[new_rank:]
        discarded, total = _energy(a[lost], b[:, lost]), _energy(a, b)
        for view in factors.rows(optimizer):
            view[:new_rank] = view[kept.to(view.device)]
            view[new_rank:] = 0
        return Shrinkage(square * discarded, square * total, moments="kept")
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    length = float(a.square().sum(1).mean().sqrt()) or 1 / math.sqrt(3)
    for view in factors.rows(optimizer):
        view.zero_()
    with torch.no_grad():
        factors.a[:new_rank] = (length * vh[:new_rank] @ q_a.T).to(factors.a)
        factors.b[:, :new_rank] = (q_b @ u[:, :new_rank] * (s[:new_rank] / length)).to(factors.b)
    squares = square * s.square()
    return Shrinkage(float(squares[new_rank:].sum()), float(squares.sum()), moments="reset")


def allocate_slots_(
    model: PeftModel,
    plan: RankPlan,
    slots: Mapping[str, int],
    *,
    adapter: str = "default",
    optimizer: HasState | None = None,
) -> None:
    """Give every adapted module so many slots, in place, and make the configuration say so.

    Empty slots are zeros, so the function stays what it was, and the saved adapter is a plain LoRA
    that loads anywhere at any time.

    Raises:
        DynamicError: A slot to be cut off is in use.
        PlanError: The model does not carry the plan's adapters.
    """
    factors = matching_factors(model, plan, adapter)
    for name, count in slots.items():
        factors[name].allocate_(count, optimizer)
    _describe_(model, plan_with(plan, slots, budget=None), adapter)


def compact_(model: PeftModel, plan: RankPlan, *, adapter: str = "default") -> PeftModel:
    """End as plain LoRA of the plan's ranks, in place: empty slots are cut off.

    A module that the plan leaves out, having rank 0, is put back as it was without an adapter. The
    configuration becomes that of `plan.to_lora_config()`. Optimizers made for the model before hold
    parameters of modules that are gone; compact after training.

    Args:
        model: The trained model.
        plan: Its present ranks, `DynamicRanks.plan`.
        adapter: Name of the adapter.

    Returns:
        The same model.

    Raises:
        DynamicError: A slot to be cut off is in use, so the plan is not the model's.
    """
    base = model.get_base_model()
    for name, found in lora_factors(model, adapter).items():
        rank = plan.modules[name].rank if name in plan.modules else 0
        found.check_empty(rank)
        if rank:
            found.allocate_(rank)
        elif len(found.layer.lora_A) == 1:
            base.set_submodule(name, found.layer.get_base_layer())
        else:
            _forget_(found.layer, adapter)
    _describe_(model, plan, adapter)
    return model


def plan_with(plan: RankPlan, ranks: Mapping[str, int], *, budget: int | None) -> RankPlan:
    """The plan with other ranks; a module of rank 0 is left out.

    What the plan says of its budget's remainder and of captured energy is about its own ranks, and
    is dropped if they move.
    """
    modules = {
        name: replace(module, rank=ranks[name])
        for name, module in plan.modules.items()
        if ranks[name]
    }
    if modules == plan.modules:
        return replace(plan, budget=budget)
    empty = {name: m.shape for name, m in plan.modules.items() if name not in modules}
    return replace(
        plan,
        modules=modules,
        budget=budget,
        left_out=plan.left_out | empty,
        next_rank=None,
        full=False,
        largest_total=None,
        captured=None,
        captured_by_uniform=None,
    )


def matching_factors(model: PeftModel, plan: RankPlan, adapter: str) -> dict[str, LoraFactors]:
    """The factors of the plan's modules.

    Raises:
        PlanError: The model carries adapters on other modules, or scales them otherwise.
    """
    factors = lora_factors(model, adapter)
    if set(factors) != set(plan.modules):
        odd = sorted(set(factors) ^ set(plan.modules))[0]
        side = "model" if odd in factors else "plan"
        raise PlanError(
            f"model and plan adapt different modules: {odd} is only in the {side}. Attach this "
            "plan with rankwise.attach(model, plan)."
        )
    for name, found in factors.items():
        if not math.isclose(found.scaling, plan.scaling, rel_tol=1e-9):
            raise PlanError(
                f"{name} is scaled by {found.scaling} and the plan says {plan.scaling}; attach "
                "this plan with rankwise.attach(model, plan)."
            )
    return factors


def _describe_(model: PeftModel, plan: RankPlan, adapter: str) -> None:
    """Make the adapter's configuration that of a plan; its other settings stay."""
    config: Any = model.peft_config[adapter]
    fresh = plan.to_lora_config()
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        setattr(config, field, getattr(fresh, field))
    config.target_modules = _bare_targets(model, plan, adapter)


def _bare_targets(model: PeftModel, plan: RankPlan, adapter: str) -> list[str] | str:
    """What `target_modules` must be for the model as it was before it carried adapters."""
    inside = tuple(f"{name}." for name in lora_factors(model, adapter))
    names = [name for name, _ in model.get_base_model().named_modules()]
    return exact_target_modules(
        list(plan.modules), [name for name in names if not name.startswith(inside)]
    )


def _forget_(layer: LoraLayer, adapter: str) -> None:
    """Delete an adapter from one layer; PEFT's own method would activate another in its place."""
    for part in (*layer.adapter_layer_names, *layer.other_param_names):
        held = getattr(layer, part)
        if adapter in held:
            del held[adapter]


def _energy(a: Float[Tensor, "k d_in"], b: Float[Tensor, "d_out k"]) -> float:
    """`||b a||_F^2` through the k x k Gram matrices."""
    return float(((b.T @ b) * (a @ a.T)).sum().clamp_min(0))


def _no_gradient(factors: LoraFactors) -> None:
    """Gradients of the step before belong to rows that are about to move."""
    factors.a.grad = None
    factors.b.grad = None
