"""From a rank plan to a PEFT model."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, get_args

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_quantization_kwargs
from torch import nn

from rankwise.adapters.base_fingerprint import remember_base_
from rankwise.adapters.block_diagonal import RaLoraConfig
from rankwise.adapters.lr_lora_config import LrLoraConfig
from rankwise.adapters.whole_modules import trained_whole
from rankwise.errors import PlanError, nearest
from rankwise.plan import AdapterKind, RankPlan, check_is_plan
from rankwise.provenance import model_fingerprint


def adapter_config(
    plan: RankPlan,
    *,
    adapter: AdapterKind | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> LoraConfig | RaLoraConfig | LrLoraConfig:
    """The PEFT configuration that carries out a plan.

    Args:
        plan: What each module gets.
        adapter: Another kind of adapter with the plan's ranks; default: the plan's own.
        dropout: Probability of dropping an input of an adapter.
        **options: Forwarded to the configuration class: `task_type`, `modules_to_save` and so on;
            for block-diagonal adapters also `scaling`, `rank_scaling` and `init_fan_in`, in the
            place of the plan's.

    Raises:
        PlanError: The plan has blocks, which the other kind of adapter lacks.
    """
    if adapter is not None:
        check_adapter(adapter)
        plan = replace(plan, adapter=adapter)
    if plan.adapter == "lora":
        return plan.to_lora_config(lora_dropout=dropout, **options)
    modules = plan.modules
    if plan.adapter == "lr-lora":
        return LrLoraConfig(
            r=plan.r_ref,
            alpha=plan.alpha,
            dropout=dropout,
            target_modules=list(modules),
            rank_pattern={name: m.rank for name, m in modules.items()},
            **options,
        )
    return RaLoraConfig(
        r=plan.r_ref,
        alpha=plan.alpha,
        dropout=dropout,
        target_modules=list(modules),
        # every module has its entry, or one named `proj` would speak for `block.proj` as well
        rank_pattern={name: m.rank for name, m in modules.items()},
        blocks_pattern={name: m.blocks for name, m in modules.items()},
        **(asdict(plan.block_options) | options),
    )


def check_adapter(adapter: str) -> None:
    """Refuse an unknown kind of adapter."""
    if adapter not in get_args(AdapterKind):
        raise PlanError(
            f"adapter={adapter!r} is not known; {nearest(adapter, get_args(AdapterKind))}"
        )


def attach(
    model: nn.Module,
    plan: RankPlan,
    *,
    adapter_name: str = "default",
    allow_other_base: bool = False,
    **options: Any,
) -> PeftModel:
    """Give a model the adapters of a plan; its function stays what it was until they train.

    Args:
        model: The base model, which PEFT modifies in place.
        plan: Made for this model.
        adapter_name: Name of the adapter.
        allow_other_base: See `RankPlan.check_fits`.
        **options: `adapter="lr-lora"`, say, for the plan's ranks under LR-LoRA, and what the PEFT
            configuration takes: `task_type="SEQ_CLS"` or `modules_to_save=[...]`, without which a
            new head stays as it was drawn; `"CAUSAL_LM"` is set by itself.

    Returns:
        A `PeftModel`: train it, save it, merge it as any other.

    Raises:
        PlanError: It is no plan, or does not fit the model; nothing was changed.
    """
    check_is_plan(plan)
    plan.check_fits(model, allow_other_base=allow_other_base)
    _check_quantised(model, plan)
    if "task_type" not in options and _is_causal_lm(model):
        options["task_type"] = "CAUSAL_LM"
    config = adapter_config(plan, **options)
    config.target_modules = plan.target_modules(model)
    for name, entry in trained_whole(
        plan.modules, config.modules_to_save, config.task_type
    ).items():
        raise PlanError(
            f"the plan adapts {name}, which is trained whole: modules_to_save or task_type asks "
            f"for {entry!r}. Plan without it, or leave that out."
        )
    remember_base_(config, model_fingerprint(model))
    return get_peft_model(model, config, adapter_name=adapter_name)


def _check_quantised(model: nn.Module, plan: RankPlan) -> None:
    """PEFT finds out only in the middle that it cannot quantise torchao's weights again."""
    if "get_apply_tensor_subclass" in get_quantization_kwargs(model):
        return
    for name in plan.modules:
        if hasattr(model.get_submodule(name).weight, "tensor_data_names"):
            raise PlanError(
                f"{name} was quantised by torchao, and PEFT cannot tell how; load the model with "
                "AutoModelForCausalLM.from_pretrained(..., quantization_config=TorchAoConfig(...))."
            )


def _is_causal_lm(model: nn.Module) -> bool:
    return hasattr(model, "prepare_inputs_for_generation") and not getattr(
        getattr(model, "config", None), "is_encoder_decoder", False
    )
