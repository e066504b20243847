"""From a rank plan to a PEFT model."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from rankwise.adapters.block_diagonal import RaLoraConfig
from rankwise.plan import RankPlan
from rankwise.provenance import model_fingerprint


def adapter_config(
    plan: RankPlan, *, dropout: float = 0.0, **options: Any
) -> LoraConfig | RaLoraConfig:
    """The PEFT configuration that carries out a plan.

    Args:
        plan: What each module gets.
        dropout: Probability of dropping an input of an adapter.
        **options: Forwarded to the configuration class: `task_type`, `modules_to_save` and so on;
            for block-diagonal adapters also `scaling`, `rank_scaling` and `init_fan_in`.
    """
    if plan.adapter == "lora":
        return plan.to_lora_config(lora_dropout=dropout, **options)
    modules = plan.modules
    return RaLoraConfig(
        r=plan.r_ref,
        alpha=plan.alpha,
        dropout=dropout,
        target_modules=list(modules),
        # every module has its entry, or one named `proj` would speak for `block.proj` as well
        rank_pattern={name: m.rank for name, m in modules.items()},
        blocks_pattern={name: m.blocks for name, m in modules.items()},
        **options,
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
        **options: Forwarded to `adapter_config`.

    Returns:
        A `PeftModel`: train it, save it, merge it as any other.

    Raises:
        PlanError: The plan does not fit the model; nothing was changed.
    """
    plan.check_fits(model, allow_other_base=allow_other_base)
    if "task_type" not in options and _is_causal_lm(model):
        options["task_type"] = "CAUSAL_LM"
    config = adapter_config(plan, **options)
    config.target_modules = plan.target_modules(model)
    if isinstance(config, RaLoraConfig):
        config.base_fingerprint = model_fingerprint(model)
    return get_peft_model(model, config, adapter_name=adapter_name)


def _is_causal_lm(model: nn.Module) -> bool:
    return hasattr(model, "prepare_inputs_for_generation") and not getattr(
        getattr(model, "config", None), "is_encoder_decoder", False
    )
