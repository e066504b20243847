"""A profile's numbers as text: any column, layer by layer, and two profiles held side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from rankwise.errors import ProfileError, nearest
from rankwise.profiling import GradientProfile
from rankwise.spectra import energy_rank, participation_ratio, stable_rank
from rankwise.tables import layer_table, make_table, render
from rankwise.targets import layer_position

BIGGEST = 8
"""How many modules a comparison names."""


def _gram_rank(profile: GradientProfile) -> dict[str, float]:
    return {name: float(rank) for name, rank in profile.energy_ranks().items()}


def _spectral(estimate: Callable[[torch.Tensor], float]) -> Callable[..., dict[str, float]]:
    def column(profile: GradientProfile) -> dict[str, float]:
        return {name: float(estimate(s)) for name, s in profile.singular_values.items()}

    return column


def _fisher(profile: GradientProfile) -> dict[str, float]:
    values = {name: entry.fisher for name, entry in profile.modules.items()}
    found = {name: value for name, value in values.items() if value is not None}
    if len(found) < len(values):
        raise ProfileError(
            "this profile holds no Fisher information; profile with statistics=('mean', 'fisher')."
        )
    return found


def _scalar(key: str) -> Callable[[GradientProfile], dict[str, float]]:
    def column(profile: GradientProfile) -> dict[str, float]:
        return {name: float(getattr(entry, key)) for name, entry in profile.modules.items()}

    return column


_COLUMNS: Mapping[str, tuple[str, Callable[[GradientProfile], dict[str, float]]]] = {
    "gid": ("gradient intrinsic dimensionality", lambda profile: profile.gid),
    "stable": ("stable rank of the mean gradient", _spectral(stable_rank)),
    "participation": ("participation ratio of the mean gradient", _spectral(participation_ratio)),
    "energy": (
        "directions that hold 90 % of the mean gradient's energy",
        _spectral(lambda values: energy_rank(values**2)),
    ),
    "gard": ("independent batch gradients that hold 90 % of the energy (GARD)", _gram_rank),
    "norm": ("Frobenius norm of the mean gradient", _scalar("gradient_norm")),
    "sensitivity": ("sensitivity mean(|W * G|)", _scalar("sensitivity")),
    "fisher": ("mean entry of the empirical Fisher information", _fisher),
    "rows": ("input rows seen", _scalar("rows")),
    "batches": ("batches that reached the module", _scalar("batches")),
}
COLUMNS = tuple(_COLUMNS)
"""What `profile_table` and `compare_profiles` can show."""


def check_column(column: str) -> None:
    """Refuse a column that does not exist.

    Raises:
        ProfileError: Names the nearest one.
    """
    if column not in _COLUMNS:
        raise ProfileError(f"column={column!r}; {nearest(column, _COLUMNS)}")


def column_values(profile: GradientProfile, column: str) -> dict[str, float]:
    """One number per module.

    Raises:
        ProfileError: There is no such column, or the profile does not hold it.
    """
    check_column(column)
    return _COLUMNS[column][1](profile)


def profile_table(profile: GradientProfile, column: str = "gid") -> str:
    """One column of a profile, layers down and module kinds across.

    Raises:
        ProfileError: See `column_values`.
    """
    values = column_values(profile, column)
    p = profile.provenance
    return layer_table(
        {name: _number(value) for name, value in values.items()},
        title=f"{_COLUMNS[column][0]} of {p.model}",
        caption=f"{len(values)} modules; N = {p.batches} batches, {p.tokens} tokens, {p.dtype}",
    )


def compare_profiles(before: GradientProfile, after: GradientProfile, column: str = "gid") -> str:
    """What differs between two profiles of the same modules.

    The means per module kind and per layer, the correlation over modules of the values (Pearson)
    and of their order (Spearman), and the modules that changed most, by the logarithm of the ratio.

    Raises:
        ProfileError: Their modules differ, or see `column_values`.
    """
    _check_same_modules(before, after)
    first, second = column_values(before, column), column_values(after, column)
    kinds: dict[str, list[str]] = {}
    layers: dict[str, list[str]] = {}
    for name in first:
        place = layer_position(name)
        kinds.setdefault(place.kind, []).append(name)
        if place.index is not None:
            layers.setdefault(f"{place.stack}.{place.index}", []).append(name)
    changed = sorted(first, key=lambda name: (-_change(first[name], second[name]), name))
    parts = [
        f"{_COLUMNS[column][0]}: {_described(before)} -> {_described(after)}",
        _means("module kind", kinds, first, second),
        _means("layer", layers, first, second) if layers else "",
        _means("largest changes", {name: [name] for name in changed[:BIGGEST]}, first, second),
        _correlations(list(first.values()), [second[name] for name in first]),
    ]
    return "\n".join(part for part in parts if part)


def _check_same_modules(before: GradientProfile, after: GradientProfile) -> None:
    first = {name: entry.shape for name, entry in before.modules.items()}
    second = {name: entry.shape for name, entry in after.modules.items()}
    for name in {**first, **second}:
        if name not in first or name not in second:
            where = "second" if name not in first else "first"
            raise ProfileError(
                f"only the {where} profile holds module {name} ({len(first)} and {len(second)} "
                "modules); compare profiles of the same model and targets."
            )
        if first[name] != second[name]:
            raise ProfileError(
                f"module {name} is {first[name].d_out} x {first[name].d_in} in the first profile, "
                f"{second[name].d_out} x {second[name].d_in} in the second; compare profiles of "
                "the same model."
            )


def _described(profile: GradientProfile) -> str:
    p = profile.provenance
    return f"{p.model} (N = {p.batches}, {p.tokens} tokens)"


def _means(
    label: str,
    groups: Mapping[str, list[str]],
    first: Mapping[str, float],
    second: Mapping[str, float],
) -> str:
    rows = []
    for group, names in groups.items():
        a = math.fsum(first[name] for name in names) / len(names)
        b = math.fsum(second[name] for name in names) / len(names)
        rows.append((group, _number(a), _number(b), f"{b / a - 1:+.1%}" if a else "-"))
    return render(make_table([label, "first", "second", "change"], rows))


def _correlations(first: list[float], second: list[float]) -> str:
    a = torch.tensor(first, dtype=torch.float64)
    b = torch.tensor(second, dtype=torch.float64)
    pearson, spearman = _correlation(a, b), _correlation(_ranks(a), _ranks(b))
    if pearson is None or spearman is None:
        return "no correlation over modules: one profile has the same value everywhere"
    return f"over {len(a)} modules: correlation {pearson:.3f}, of the order {spearman:.3f}"


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float | None:
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else None


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks, equal values sharing the mean of theirs."""
    less = (values[:, None] > values[None, :]).sum(1)
    equal = (values[:, None] == values[None, :]).sum(1)
    return less + (equal - 1) / 2


def _change(a: float, b: float) -> float:
    if a == b:
        return 0.0
    return abs(math.log(b / a)) if a > 0 and b > 0 else math.inf


def _number(value: float) -> str:
    if value == 0 or 0.1 <= abs(value) < 1e5:
        return f"{value:.1f}" if value != int(value) or abs(value) < 1e3 else f"{value:.0f}"
    return f"{value:.2e}"
