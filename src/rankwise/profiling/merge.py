"""Several shards' profiles into one."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from rankwise.errors import ProfileError
from rankwise.profiling.profile import GradientProfile, ModuleStatistics, ProfileProvenance
from rankwise.profiling.statistics import sensitivity
from rankwise.provenance import model_fingerprint
from rankwise.spectra import singular_values
from rankwise.targets import linear_weight

logger = logging.getLogger(__name__)
_MUST_AGREE = ("model_fingerprint", "dtype", "train_mode")


def merge_profiles(profiles: Sequence[GradientProfile], model: nn.Module) -> GradientProfile:
    """See `GradientProfile.merge`."""
    _check_compatible(profiles, model)
    tokens = [profile.provenance.tokens for profile in profiles]
    modules: dict[str, ModuleStatistics] = {}
    spectra: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for name in profiles[0].modules:
        mean = _weighted_mean([p.gradients[name] for p in profiles if p.gradients], tokens)
        spectra[name] = singular_values(mean)
        weight = linear_weight(model.get_submodule(name))
        modules[name] = replace(
            profiles[0].modules[name],
            gradient_norm=float(spectra[name].norm()),
            sensitivity=sensitivity(weight, mean.to(weight.device)),
            fisher=_fisher(name, profiles),
            **{key: _sum(name, profiles, key) for key in ("batches", "rows", "zero_batches")},
        )
        gradients[name] = mean
    if any(profile.gram or profile.convergence for profile in profiles):
        logger.warning(
            "merging leaves out Gram matrices and convergence: no shard has seen the batches of "
            "the others; profile them together for these"
        )
    return GradientProfile(modules, spectra, _provenance(profiles), gradients)


def _check_compatible(profiles: Sequence[GradientProfile], model: nn.Module) -> None:
    if not profiles:
        raise ProfileError("merge: no profile was given; pass at least one.")
    first = profiles[0]
    for i, profile in enumerate(profiles):
        if profile.gradients is None:
            raise ProfileError(
                f"merge: profile {i} holds no gradients; profile with keep_gradients=True."
            )
        for key in _MUST_AGREE:
            here, there = (getattr(p.provenance, key) for p in (profile, first))
            if here != there:
                raise ProfileError(f"merge: profile {i} has {key} {here!r}, profile 0 {there!r}.")
        shapes = {name: entry.shape for name, entry in profile.modules.items()}
        if shapes != {name: entry.shape for name, entry in first.modules.items()}:
            raise ProfileError(f"merge: profile {i} has other modules than profile 0.")
    found = model_fingerprint(model)
    if found != first.provenance.model_fingerprint:
        raise ProfileError(
            f"merge: the model's fingerprint is {found}, the profiles are of "
            f"{first.provenance.model_fingerprint}; pass the model they were measured on."
        )


def _weighted_mean(gradients: Sequence[Tensor], weights: Sequence[int]) -> Tensor:
    total = torch.zeros(gradients[0].shape, dtype=torch.float64)
    for gradient, weight in zip(gradients, weights, strict=True):
        total.add_(gradient.double(), alpha=weight / sum(weights))
    return total.to(gradients[0].dtype)


def _sum(name: str, profiles: Sequence[GradientProfile], key: str) -> int:
    return sum(getattr(profile.modules[name], key) for profile in profiles)


def _fisher(name: str, profiles: Sequence[GradientProfile]) -> float | None:
    """The mean over the samples of all shards, if every shard measured it."""
    total, samples = 0.0, 0
    for profile in profiles:
        fisher = profile.modules[name].fisher
        if fisher is None:
            return None
        rows = sum(profile.provenance.batch_sizes)
        total += fisher * rows
        samples += rows
    return total / samples


def _provenance(profiles: Sequence[GradientProfile]) -> ProfileProvenance:
    parts = [profile.provenance for profile in profiles]
    data = hashlib.sha256("".join(p.data_fingerprint for p in parts).encode()).hexdigest()[:16]
    dropped: list[int] = []
    unlabelled: list[int] = []
    before = 0
    for p in parts:
        dropped += [before + index for index in p.dropped_batches]
        unlabelled += [before + index for index in p.unlabelled_batches]
        before += p.batches + len(p.dropped_batches) + len(p.unlabelled_batches)
    engines = {p.engine for p in parts}
    return replace(
        parts[0],
        data_fingerprint=data if len(parts) > 1 else parts[0].data_fingerprint,
        batches=sum(p.batches for p in parts),
        batch_sizes=list(chain.from_iterable(p.batch_sizes for p in parts)),
        batch_items=list(chain.from_iterable(p.batch_items for p in parts)),
        tokens=sum(p.tokens for p in parts),
        seconds=round(sum(p.seconds for p in parts), 3),
        dropped_batches=dropped,
        unlabelled_batches=unlabelled,
        engine="+".join(sorted(engines)),
    )
