"""Measuring gradients: hooks, streaming statistics, and the profile they make."""

from rankwise.profiling.loss import BatchLoss, LossFunction, model_loss
from rankwise.profiling.measure import Engine, profile_gradients
from rankwise.profiling.memory import MemoryEstimate, estimate_memory
from rankwise.profiling.profile import GradientProfile, ModuleStatistics, ProfileProvenance
from rankwise.profiling.statistics import Statistic
from rankwise.profiling.workers import Distributed

__all__ = [
    "BatchLoss",
    "Distributed",
    "Engine",
    "GradientProfile",
    "LossFunction",
    "MemoryEstimate",
    "ModuleStatistics",
    "ProfileProvenance",
    "Statistic",
    "estimate_memory",
    "model_loss",
    "profile_gradients",
]
