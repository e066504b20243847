"""Measuring gradients: hooks, streaming statistics, and the profile they make."""

from rankwise.profiling.loss import BatchLoss, LossFunction, model_loss
from rankwise.profiling.measure import Engine, profile_gradients
from rankwise.profiling.profile import GradientProfile, ModuleStatistics, ProfileProvenance
from rankwise.profiling.statistics import Statistic

__all__ = [
    "BatchLoss",
    "Engine",
    "GradientProfile",
    "LossFunction",
    "ModuleStatistics",
    "ProfileProvenance",
    "Statistic",
    "model_loss",
    "profile_gradients",
]
