from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rankwise.errors import ProfileError
from rankwise.profiling import GradientProfile
from tiny_models import synthetic_profile


def curve(*means: float) -> GradientProfile:
    """Two modules whose GIDs have these means after 1, 2, 4, ... batches."""
    profile = synthetic_profile({"a": (8, 8), "b": (8, 8)})
    batches = 2 ** (len(means) - 1)
    values = torch.tensor(means, dtype=torch.float64)
    return replace(
        profile,
        provenance=replace(profile.provenance, batches=batches),
        convergence={"a": values - 1, "b": values + 1},
    )


def test_settled() -> None:
    assert curve(40.0, 70.0, 75.0).convergence_verdict() == (
        "mean GID 40.0, 70.0, 75.0 after 1, 2, 4 batches; the last step changed it by +7.1%: "
        "profiled enough"
    )


def test_still_growing() -> None:
    assert curve(40.0, 70.0, 90.0).convergence_verdict().endswith("+28.6%: profile more")


def test_falling_is_not_settled() -> None:
    assert curve(40.0, 90.0, 54.0).convergence_verdict().endswith("-40.0%: profile more")


def test_one_batch_tells_no_trend() -> None:
    assert "profile more, one measurement" in curve(40.0).convergence_verdict()


def test_without_a_curve() -> None:
    with pytest.raises(ProfileError, match=r"statistics=\('mean', 'convergence'\)"):
        synthetic_profile({"a": (8, 8)}).convergence_verdict()
