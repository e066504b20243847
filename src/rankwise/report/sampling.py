"""Long curves at few places: a spectrum of thousands of values says as much in sixty."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

POINTS = 64
"""Most places at which a spectrum is shown."""
_DIGITS = 7


@lru_cache(maxsize=64)
def places(count: int) -> tuple[int, ...]:
    """At most `POINTS` ranks from 1 to `count`, evenly spaced on a logarithmic scale.

    Example:
        >>> places(5)
        (1, 2, 3, 4, 5)
        >>> places(4096)[:3], places(4096)[-1], len(places(4096)) <= POINTS
        ((1, 2, 3), 4096, True)
    """
    if count <= POINTS:
        return tuple(range(1, count + 1))
    wanted = np.geomspace(1, count, POINTS)
    return tuple(dict.fromkeys(int(place) for place in np.rint(wanted)))


def sampled(values: NDArray[np.float64]) -> list[float]:
    """The values at their `places`, to seven significant digits, which no plot can tell apart."""
    return [float(f"{values[place - 1]:.{_DIGITS}g}") for place in places(len(values))]
