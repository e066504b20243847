"""A gradient profile as the report shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray

from rankwise.curve import budget_curve
from rankwise.errors import FileError
from rankwise.profiling.profile import SETTLED, GradientProfile
from rankwise.report.sampling import places, sampled
from rankwise.report.views import (
    Convergence,
    Curve,
    CurvePoint,
    FisherCorrelations,
    ModuleGradient,
    ProfileView,
    Spread,
)
from rankwise.spectra import energy_rank, participation_ratio, stable_rank
from rankwise.targets import layer_position

ENERGY = 0.9
"""Part of the energy that energy ranks hold."""


def view_of_profile(profile: GradientProfile) -> ProfileView:
    """All that the report says of a profile.

    Raises:
        FileError: It holds no module.
    """
    if not profile.modules:
        raise FileError(
            f"the profile of {profile.provenance.model} holds no module; profile again."
        )
    ranks = profile.energy_ranks(ENERGY) if profile.gram is not None else {}
    kinds = _by_kind(profile.gid)
    return ProfileView(
        label="gradients",
        provenance=asdict(profile.provenance),
        gid=Spread.of(profile.gid.values()),
        gid_by_kind={kind: Spread.of(values) for kind, values in kinds.items()},
        modules={name: _module(profile, name, ranks.get(name)) for name in profile.modules},
        sampled_at={
            str(count): list(places(count))
            for count in sorted({len(values) for values in profile.singular_values.values()})
        },
        curve=_curve(profile),
        convergence=_convergence(profile),
        fisher=_fisher(profile),
    )


def energy_held(profile: GradientProfile, name: str) -> NDArray[np.float64]:
    """Squared singular values summed up to each rank, largest first."""
    values: NDArray[np.float64] = profile.singular_values[name].numpy()
    return np.cumsum(values**2)


def _module(profile: GradientProfile, name: str, energy: int | None) -> ModuleGradient:
    statistics, spectrum = profile.modules[name], profile.singular_values[name]
    held = energy_held(profile, name)
    total = float(held[-1])
    curve = None if profile.convergence is None else profile.convergence[name]
    return ModuleGradient(
        d_in=statistics.d_in,
        d_out=statistics.d_out,
        gid=profile.gid[name],
        stable_rank=stable_rank(spectrum),
        participation_ratio=participation_ratio(spectrum),
        directions=energy_rank(spectrum**2, ENERGY),
        energy_rank=energy,
        sensitivity=statistics.sensitivity,
        gradient_norm=statistics.gradient_norm,
        batches=statistics.batches,
        zero_batches=statistics.zero_batches,
        fisher=statistics.fisher,
        singular_values=sampled(spectrum.numpy()),
        energy=sampled(held / total) if total else [],
        convergence=None if curve is None else [float(value) for value in curve],
    )


def _by_kind(values: Mapping[str, float]) -> dict[str, list[float]]:
    kinds: dict[str, list[float]] = {}
    for name, value in values.items():
        kinds.setdefault(layer_position(name).kind, []).append(value)
    return kinds


def _curve(profile: GradientProfile) -> Curve | None:
    """The budget curve; nothing can be captured where no module has a gradient."""
    if not any(module.has_gradient for module in profile.modules.values()):
        return None
    curve = budget_curve(profile)
    points = [CurvePoint(p.r, p.parameters, p.uniform, p.water_fill) for p in curve.points]
    return Curve(points, curve.knee.r, curve.recommendation())


def _convergence(profile: GradientProfile) -> Convergence | None:
    if profile.convergence is None:
        return None
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, curve in profile.convergence.items():
        kinds.setdefault(layer_position(name).kind, []).append(curve)
    mean = torch.stack(list(profile.convergence.values())).mean(0).tolist()
    return Convergence(
        batches=profile.convergence_batches,
        mean=mean,
        by_kind={kind: torch.stack(curves).mean(0).tolist() for kind, curves in kinds.items()},
        verdict=profile.convergence_verdict(),
        settled=len(mean) > 1 and mean[-2] > 0 and abs(mean[-1] / mean[-2] - 1) < SETTLED,
    )


def _fisher(profile: GradientProfile) -> FisherCorrelations | None:
    """Correlations of GID with Fisher information, as the RaLoRA paper's Table 8 gives them."""
    measured = {n: m.fisher for n, m in profile.modules.items() if m.fisher is not None}
    if not measured:
        return None
    used = [name for name, fisher in measured.items() if fisher > 0 and profile.gid[name] > 0]
    gid = np.array([profile.gid[name] for name in used])
    fisher = np.array([measured[name] for name in used], dtype=np.float64)
    return FisherCorrelations(
        modules=len(used),
        left_out=len(profile.modules) - len(used),
        pearson_log=correlation(gid, np.log(fisher)),
        pearson_inverse=correlation(gid, 1 / fisher),
        spearman=correlation(ranked(gid), ranked(fisher)),
    )


def correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float | None:
    """Pearson's correlation coefficient; None if either side is constant or there are under 3."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def ranked(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1, ties sharing their mean rank, as Spearman's correlation wants them.

    Example:
        >>> ranked(np.array([5.0, 1.0, 5.0])).tolist()
        [2.5, 1.0, 2.5]
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: NDArray[np.float64] = last - (counts - 1) / 2
    return mean[inverse]
