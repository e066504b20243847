"""rankwise: how much adapter each layer needs, measured from gradients.

Importing this package registers its adapter types with PEFT, and how profiles and plans look in
notebooks.
"""

from rankwise.adapters import (
    LrLoraConfig,
    RaLoraConfig,
    attach,
    compile_lr_lora_,
    export_lora,
    export_merged,
    export_truncated,
    fuse_lora_,
    load_adapter,
    lr_lora_param_groups,
    save_native,
    unfuse_lora_,
)
from rankwise.curve import BudgetCurve, budget_curve
from rankwise.dynamic import DynamicOptions, DynamicRanks, RankCallback, last_checkpoint
from rankwise.errors import RankwiseError
from rankwise.methods import Compose, Gard, Lora, LoraGid, LsLora, RaLora, RaLoraPro, WaterFill
from rankwise.placement import placed_modules
from rankwise.plan import ModulePlan, RankPlan
from rankwise.profiling import BatchLoss, GradientProfile, profile_gradients
from rankwise.report import notebook as _notebook  # noqa: F401
from rankwise.spectra import (
    effective_rank,
    energy_crossing,
    energy_rank,
    gram_eigenvalues,
    participation_ratio,
    singular_values,
    stable_rank,
    threshold_rank,
)
from rankwise.targets import LinearShape, find_targets

__version__ = "0.1.0"

__all__ = [
    "BatchLoss",
    "BudgetCurve",
    "Compose",
    "DynamicOptions",
    "DynamicRanks",
    "Gard",
    "GradientProfile",
    "LinearShape",
    "Lora",
    "LoraGid",
    "LrLoraConfig",
    "LsLora",
    "ModulePlan",
    "RaLora",
    "RaLoraConfig",
    "RaLoraPro",
    "RankCallback",
    "RankPlan",
    "RankwiseError",
    "WaterFill",
    "attach",
    "budget_curve",
    "compile_lr_lora_",
    "effective_rank",
    "energy_crossing",
    "energy_rank",
    "export_lora",
    "export_merged",
    "export_truncated",
    "find_targets",
    "fuse_lora_",
    "gram_eigenvalues",
    "last_checkpoint",
    "load_adapter",
    "lr_lora_param_groups",
    "participation_ratio",
    "placed_modules",
    "profile_gradients",
    "save_native",
    "singular_values",
    "stable_rank",
    "threshold_rank",
    "unfuse_lora_",
]
