"""What predictions are worth: correlations, F1, and the final number of an answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")


def accuracy(predicted: Sequence[float], true: Sequence[float]) -> float:
    """Share of predictions that are right."""
    return float(np.mean(np.equal(predicted, true)))


def matthews_correlation(predicted: Sequence[int], true: Sequence[int]) -> float:
    """Matthews' correlation coefficient; 0 where a side is constant, as is customary.

    For K classes it is the correlation of the two one-hot codings (Gorodkin 2004).

    Example:
        >>> round(matthews_correlation([0, 1, 1, 0], [0, 1, 0, 0]), 4)
        0.5774
    """
    p, t = np.asarray(predicted), np.asarray(true)
    classes = np.union1d(p, t)
    x = (p[:, None] == classes).astype(float)
    y = (t[:, None] == classes).astype(float)
    x, y = x - x.mean(0), y - y.mean(0)
    spread = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / spread) if spread else 0.0


def f1_score(predicted: Sequence[int], true: Sequence[int]) -> float:
    """F1 of class 1: `2 TP / (2 TP + FP + FN)`; 0 where class 1 is neither there nor predicted.

    Example:
        >>> f1_score([1, 1, 0], [1, 0, 0])
        0.6666666666666666
    """
    p, t = np.equal(predicted, 1), np.equal(true, 1)
    hits = int((p & t).sum())
    involved = int(p.sum() + t.sum())
    return 2 * hits / involved if involved else 0.0


def pearson(predicted: Sequence[float], true: Sequence[float]) -> float:
    """Pearson's correlation; 0 where a side is constant."""
    x, y = np.asarray(predicted, float), np.asarray(true, float)
    x, y = x - x.mean(), y - y.mean()
    spread = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / spread) if spread else 0.0


def spearman(predicted: Sequence[float], true: Sequence[float]) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, ties at their mean rank."""
    return pearson(rankdata(predicted).tolist(), rankdata(true).tolist())


def final_number(text: str) -> float | None:
    r"""The number an answer ends in: after `####` or `answer is` if that is there, else the last.

    Thousands separators are dropped.

    Example:
        >>> final_number("She has 3 + 4 = 7.\n#### 1,234")
        1234.0
        >>> final_number("so 5 apples cost $20. The answer is: 20 dollars for 5")
        20.0
        >>> final_number("none at all") is None
        True
    """
    marked = re.split(r"####|answer is", text)
    if len(marked) > 1:
        found = _NUMBER.search(marked[-1])
        if found:
            return float(found.group().replace(",", ""))
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
