import pytest
import torch

from rankwise.errors import PlanError
from rankwise.methods import METHODS, RaLora, RaLoraThreshold
from rankwise.profiling import GradientProfile
from tiny_models import synthetic_profile

SHAPES = {"a": (64, 64), "b": (64, 128), "c": (96, 96)}


@pytest.fixture
def profile():
    """Spectra that fall by four orders of magnitude, each at its own pace."""
    flat = synthetic_profile(SHAPES)
    spectra = {
        name: torch.logspace(0, -4 - i, min(SHAPES[name]), dtype=torch.float64)
        for i, name in enumerate(SHAPES)
    }
    return GradientProfile(flat.modules, spectra, flat.provenance)


@pytest.mark.parametrize("eps", [1e-1, 1e-2, 1e-4])
def test_blocks_follow_the_count_of_singular_values(profile, eps):
    plan = RaLoraThreshold(r=2, threshold=eps).plan(profile)
    for name, module in plan.modules.items():
        count = int((profile.singular_values[name] > eps).sum())
        wanted = max(n for n in (1, 2, 4, 8, 16, 32) if n == 1 or 2 * n <= count)
        assert module.blocks == wanted
        assert module.rank == 2


def test_a_threshold_above_everything_is_lora(profile):
    plan = RaLoraThreshold(r=2, threshold=1e9).plan(profile)
    assert {module.blocks for module in plan.modules.values()} == {1}
    assert {module.blocks for module in RaLora(r=2).plan(profile).modules.values()} != {1}


def test_its_parameters_are_loras(profile):
    plan = RaLoraThreshold(r=4, threshold=1e-6).plan(profile)
    assert plan.parameters == RaLora(r=4).plan(profile).parameters
    assert plan.method == "ralora-threshold" and "ralora-threshold" in METHODS


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), float("inf")])
def test_thresholds_that_cannot_be(threshold):
    with pytest.raises(PlanError, match="threshold="):
        RaLoraThreshold(threshold=threshold)


def test_blocks_that_do_not_divide_are_lowered_and_logged(caplog):
    profile = synthetic_profile({"a": (96, 36)}, gid=32)
    with caplog.at_level("INFO", logger="rankwise"):
        plan = RaLoraThreshold(r=1).plan(profile)
    assert plan.modules["a"].blocks == 4
    assert "a: 32 blocks do not divide 36 x 96; 4 do" in caplog.text
