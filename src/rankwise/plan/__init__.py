"""A rank plan: how much adapter each module gets; readable, savable, checked against a model."""

from rankwise.plan.block_options import BlockOptions
from rankwise.plan.rank_plan import AdapterKind, ModulePlan, RankPlan, check_is_plan, module_plans

__all__ = ["AdapterKind", "BlockOptions", "ModulePlan", "RankPlan", "check_is_plan", "module_plans"]
