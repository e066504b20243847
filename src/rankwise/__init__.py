"""rankwise: how much adapter each layer needs, measured from gradients.

Importing this package registers its adapter types with PEFT.
"""

from rankwise.adapters import RaLoraConfig, attach
from rankwise.errors import RankwiseError
from rankwise.methods import Lora, RaLora, RaLoraPro
from rankwise.plan import ModulePlan, RankPlan
from rankwise.profiling import BatchLoss, GradientProfile, profile_gradients
from rankwise.spectra import effective_rank, singular_values
from rankwise.targets import LinearShape, find_targets

__version__ = "0.1.0"

__all__ = [
    "BatchLoss",
    "GradientProfile",
    "LinearShape",
    "Lora",
    "ModulePlan",
    "RaLora",
    "RaLoraConfig",
    "RaLoraPro",
    "RankPlan",
    "RankwiseError",
    "attach",
    "effective_rank",
    "find_targets",
    "profile_gradients",
    "singular_values",
]
