"""Paired comparisons over seeds: means, intervals, tests and their correction.

Two methods are compared cell by cell: the same task, seed, data order and budget. The numbers are
small samples of differences, so intervals are Student's, and a family of comparisons is corrected
by Holm's procedure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from rankwise.errors import ConfigError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean of a sample with its spread.

    Attributes:
        mean: Arithmetic mean.
        deviation: Standard deviation of the sample (n - 1); NaN for one value.
        low: Lower end of the 95 % interval of the mean (Student); NaN for one value.
        high: Upper end.
        count: How many values.
    """

    mean: float
    deviation: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Comparison:
    """One method against another over paired cells, `difference = method - baseline`.

    Attributes:
        method: Who.
        baseline: Against whom.
        difference: Of the paired values, with its interval.
        t_p: p of the paired t-test, two-sided; NaN where all differences are equal or alone.
        wilcoxon_p: p of Wilcoxon's signed-rank test, two-sided, exact for few pairs.
        holm_p: `t_p` corrected by Holm for all comparisons made together.
        wilcoxon_holm_p: `wilcoxon_p` likewise.
        wins: Cells in which the method is strictly better.
    """

    method: str
    baseline: str
    difference: Summary
    t_p: float
    wilcoxon_p: float
    holm_p: float
    wilcoxon_holm_p: float
    wins: int


def summarise(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and 95 % interval of a sample.

    Raises:
        ConfigError: It is empty or holds a value that is not finite.

    Example:
        >>> summarise([1.0, 2.0, 3.0]).mean
        2.0
    """
    sample = _checked(values)
    mean = float(sample.mean())
    if len(sample) < 2:
        return Summary(mean, math.nan, math.nan, math.nan, 1)
    deviation = float(sample.std(ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(sample) - 1)) * deviation
    half /= math.sqrt(len(sample))
    return Summary(mean, deviation, mean - half, mean + half, len(sample))


def compare_with(
    baseline: str, cells: Mapping[str, Mapping[str, float]], *, lower_is_better: bool
) -> list[Comparison]:
    """Every other method against one, over the cells that both have, Holm-corrected together.

    Args:
        baseline: A key of `cells`.
        cells: Method -> cell (task, seed, budget) -> metric.
        lower_is_better: Whether a smaller metric wins a cell.

    Raises:
        ConfigError: The baseline is missing, two methods share no cell, or a value is not finite.
    """
    if baseline not in cells:
        raise ConfigError(f"baseline {baseline!r} is not among {', '.join(cells)}.")
    sign = -1.0 if lower_is_better else 1.0
    rows: list[tuple[str, Summary, float, float, int]] = []
    for method, values in cells.items():
        if method == baseline:
            continue
        shared = sorted(values.keys() & cells[baseline].keys())
        if not shared:
            raise ConfigError(f"{method} and {baseline} share no cell; run both on the same seeds.")
        differences = _checked([values[cell] - cells[baseline][cell] for cell in shared])
        wins = int((sign * differences > 0).sum())
        t_p, wilcoxon_p = _t_test(differences), _wilcoxon(differences)
        rows.append((method, summarise(differences.tolist()), t_p, wilcoxon_p, wins))
    corrected = zip(holm([row[2] for row in rows]), holm([row[3] for row in rows]), strict=True)
    return [
        Comparison(method, baseline, difference, t_p, wilcoxon_p, *holm_ps, wins)
        for (method, difference, t_p, wilcoxon_p, wins), holm_ps in zip(
            rows, corrected, strict=True
        )
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of m p-values.

    The i-th smallest becomes `max_{j <= i} min(1, (m - j + 1) p_(j))`. A NaN stays one and does not
    count as a comparison.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    corrected = np.array(p_values, dtype=float)
    order = [int(i) for i in np.argsort(corrected) if math.isfinite(corrected[i])]
    largest = 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * corrected[i]))
        corrected[i] = largest
    return [float(p) for p in corrected]


def mean_ranks(
    cells: Mapping[str, Mapping[str, float]], *, lower_is_better: bool
) -> dict[str, float]:
    """Mean rank of each method over the cells that all of them have; 1 is best, ties share.

    Raises:
        ConfigError: No cell is shared by all.
    """
    shared = sorted(set.intersection(*(set(values) for values in cells.values())))
    if not shared:
        raise ConfigError("no cell is shared by all methods; their mean rank is not defined.")
    sign = 1.0 if lower_is_better else -1.0
    grid = np.array([[sign * values[cell] for cell in shared] for values in cells.values()])
    ranks = stats.rankdata(grid, axis=0)
    return dict(zip(cells, ranks.mean(1).tolist(), strict=True))


def _t_test(differences: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    if len(differences) < 2 or _are_equal(differences):
        return math.nan
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def _are_equal(differences: np.ndarray[tuple[int], np.dtype[np.float64]]) -> bool:
    """But for the rounding of their operands, which are no larger than about 1."""
    return bool(np.ptp(differences) <= 1e-12 * max(1.0, float(np.abs(differences).max())))


def _wilcoxon(differences: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    if len(differences) < 2 or not differences.any():
        return math.nan
    return float(stats.wilcoxon(differences).pvalue)


def _checked(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    sample = np.asarray(values, dtype=np.float64)
    if not len(sample) or not np.isfinite(sample).all():
        raise ConfigError(f"a sample needs finite values, not {list(values)}.")
    return sample
