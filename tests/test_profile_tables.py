"""Columns of a profile, and two profiles side by side."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rankwise.errors import ProfileError
from rankwise.profile_tables import COLUMNS, column_values, compare_profiles, profile_table
from rankwise.profiling import profile_gradients
from tiny_models import synthetic_profile, tiny_llama, token_batch

SHAPES = {f"h.{layer}.{kind}": (8, 6) for layer in range(3) for kind in ("up", "down")}


def test_every_column_of_a_measured_profile() -> None:
    batches = [token_batch([5], seed=i) for i in range(2)]
    profile = profile_gradients(tiny_llama(), batches, batches=2, statistics=("gram", "fisher"))
    name = "model.layers.1.mlp.up_proj"
    entry, values = profile.modules[name], profile.singular_values[name]
    squares = (values / values.norm()) ** 2
    expected = {
        "gid": profile.gid[name],
        "stable": 1 / float(squares.max()),
        "participation": 1 / float((squares**2).sum()),
        "energy": 1 + int((squares.cumsum(0) < 0.9).sum()),
        "gard": profile.energy_ranks()[name],
        "norm": entry.gradient_norm,
        "sensitivity": entry.sensitivity,
        "fisher": entry.fisher,
        "rows": 10,
        "batches": 2,
    }
    assert set(expected) == set(COLUMNS)
    for column, value in expected.items():
        assert column_values(profile, column)[name] == pytest.approx(value)
        assert "mlp.up_proj" in profile_table(profile, column)


def test_a_cell_stands_at_its_layer_and_kind() -> None:
    profile = synthetic_profile(SHAPES, gid={name: i + 1 for i, name in enumerate(SHAPES)})
    rows = [line.split() for line in profile_table(profile).splitlines()]
    assert ["layer", "up", "down"] in rows
    assert ["1", "3.0", "4.0"] in rows


def test_comparison() -> None:
    before = synthetic_profile(SHAPES, gid={name: i + 1 for i, name in enumerate(SHAPES)})
    after = synthetic_profile(SHAPES, gid={n: 6 if n == "h.0.up" else i + 1 for i, n in enumerate(SHAPES)})  # fmt: skip  # noqa: E501
    text = compare_profiles(before, after)
    rows = [line.split() for line in text.splitlines()]
    assert ["up", "3.0", "4.7", "+55.6%"] in rows
    assert ["down", "4.0", "4.0", "+0.0%"] in rows
    assert ["h.0", "1.5", "4.0", "+166.7%"] in rows
    changes = next(i for i, row in enumerate(rows) if row[:2] == ["largest", "changes"])
    assert rows[changes + 2] == ["h.0.up", "1.0", "6.0", "+500.0%"]
    a, b = torch.tensor([1.0, 2, 3, 4, 5, 6]), torch.tensor([6.0, 2, 3, 4, 5, 6])
    ranks = torch.tensor([4.5, 0, 1, 2, 3, 4.5])
    pearson = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
    spearman = float(torch.corrcoef(torch.stack([a, ranks]))[0, 1])
    assert text.endswith(f"over 6 modules: correlation {pearson:.3f}, of the order {spearman:.3f}")
    assert "correlation 1.000, of the order 1.000" in compare_profiles(before, before)
    same = synthetic_profile(SHAPES, gid=2)
    assert "same value everywhere" in compare_profiles(before, same)


def test_the_largest_change_is_a_ratio() -> None:
    shapes = {"few": (8, 8), "many": (8, 8)}
    before = synthetic_profile(shapes, gid={"few": 1, "many": 5})
    after = synthetic_profile(shapes, gid={"few": 2, "many": 7})
    rows = [line.split() for line in compare_profiles(before, after).splitlines()]
    at = next(i for i, row in enumerate(rows) if row[:2] == ["largest", "changes"])
    assert rows[at + 2][0] == "few"


def test_refusals() -> None:
    profile = synthetic_profile(SHAPES)
    with pytest.raises(ProfileError, match=r"column='stabel'.*did you mean 'stable'"):
        profile_table(profile, "stabel")
    with pytest.raises(ProfileError, match="holds no Fisher"):
        profile_table(profile, "fisher")
    with pytest.raises(ProfileError, match="holds no Gram"):
        profile_table(profile, "gard")
    fewer = synthetic_profile({name: SHAPES[name] for name in list(SHAPES)[:-1]})
    with pytest.raises(ProfileError, match=r"only the first profile holds module h\.2\.down"):
        compare_profiles(profile, fewer)
    with pytest.raises(ProfileError, match=r"only the second profile holds module h\.2\.down"):
        compare_profiles(fewer, profile)
    other = synthetic_profile(SHAPES | {"h.0.up": (9, 6)})
    with pytest.raises(ProfileError, match=r"h\.0\.up is 6 x 8 in the first profile, 6 x 9"):
        compare_profiles(profile, other)
    assert compare_profiles(profile, replace(profile))
