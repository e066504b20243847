import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from rankwise.errors import ConfigError
from rankwise.experiments.statistics import compare_with, holm, mean_ranks, summarise

BASE = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}


def _shifted(by):
    return {cell: value + delta for (cell, value), delta in zip(BASE.items(), by, strict=True)}


def test_summary_is_students_interval():
    sample = [2.0, 4.0, 4.5, 7.0]
    found = summarise(sample)
    low, high = stats.t.interval(0.95, 3, np.mean(sample), stats.sem(sample))
    assert found.mean == pytest.approx(np.mean(sample))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.deviation == pytest.approx(np.std(sample, ddof=1))


def test_one_value_has_no_spread():
    found = summarise([3.0])
    assert found.mean == 3.0
    assert math.isnan(found.low)
    assert math.isnan(found.deviation)


def test_pairs_are_tested_as_pairs():
    better = _shifted([-0.2, -0.1, -0.3, -0.25])
    [found] = compare_with("lora", {"lora": BASE, "ours": better}, lower_is_better=True)
    expected = stats.ttest_rel(list(better.values()), list(BASE.values()))
    assert found.t_p == pytest.approx(expected.pvalue)
    assert found.wilcoxon_p == pytest.approx(0.125)  # all four of one sign: 2 / 2^4
    assert found.wins == 4
    assert found.difference.mean == pytest.approx(-0.2125)
    [higher] = compare_with("lora", {"lora": BASE, "ours": better}, lower_is_better=False)
    assert higher.wins == 0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.2]) == pytest.approx([0.04, 0.09, 0.09, 0.2])


def test_holm_is_the_procedure():
    """The corrected p is the smallest level at which Holm's step-down test rejects."""
    p_values = np.array([0.2, 0.001, 0.04, 0.04, 0.9, 0.015])

    def rejected(level):
        order = np.argsort(p_values, kind="stable")
        found = set()
        for place, i in enumerate(order):
            if p_values[i] > level / (len(order) - place) * (1 + 1e-12):
                break
            found.add(int(i))
        return found

    for i, corrected in enumerate(holm(p_values)):
        assert i in rejected(corrected) or corrected == 1.0
        assert i not in rejected(corrected * (1 - 1e-9))


def test_holm_ignores_what_could_not_be_tested():
    found = holm([0.01, math.nan, 0.02])
    assert found[0] == pytest.approx(0.02)
    assert math.isnan(found[1])


def test_comparisons_are_corrected_together():
    cells = {
        "lora": BASE,
        "x": _shifted([-0.2, -0.1, -0.3, -0.25]),
        "y": _shifted([0.1, -0.1, 0.2, 0.05]),
    }
    found = compare_with("lora", cells, lower_is_better=True)
    assert [c.holm_p for c in found] == pytest.approx(holm([c.t_p for c in found]))
    wilcoxon = holm([c.wilcoxon_p for c in found])
    assert [c.wilcoxon_holm_p for c in found] == pytest.approx(wilcoxon)


def test_equal_methods_have_no_p():
    [found] = compare_with("lora", {"lora": BASE, "same": dict(BASE)}, lower_is_better=True)
    assert math.isnan(found.t_p)
    assert math.isnan(found.wilcoxon_p)
    assert found.wins == 0


def test_differences_that_are_equal_but_for_rounding_have_no_p():
    cells = {"lora": {"a": 0.7, "b": 0.5}, "ours": {"a": 0.8, "b": 0.6}}
    assert cells["ours"]["a"] - cells["lora"]["a"] != cells["ours"]["b"] - cells["lora"]["b"]
    [found] = compare_with("lora", cells, lower_is_better=False)
    assert math.isnan(found.t_p) and math.isnan(found.holm_p)


def test_only_shared_cells_count():
    part = {"a": 0.5, "b": 1.0, "z": -100.0}
    [found] = compare_with("lora", {"lora": BASE, "ours": part}, lower_is_better=True)
    assert found.difference.count == 2


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"other": BASE}, "not among"),
        ({"lora": BASE, "ours": {"z": 1.0}}, "share no cell"),
        ({"lora": BASE, "ours": {"a": math.nan}}, "finite"),
    ],
)
def test_bad_input(cells, message):
    with pytest.raises(ConfigError, match=message):
        compare_with("lora", cells, lower_is_better=True)
    with pytest.raises(ConfigError, match="finite"):
        summarise([])


def test_mean_ranks_share_ties():
    cells = {
        "x": {"a": 1.0, "b": 1.0},
        "y": {"a": 2.0, "b": 1.0},
        "z": {"a": 3.0, "b": 5.0, "c": 0},
    }
    assert mean_ranks(cells, lower_is_better=True) == {"x": 1.25, "y": 1.75, "z": 3.0}
    with pytest.raises(ConfigError, match="no cell"):
        mean_ranks({"x": {"a": 1.0}, "y": {"b": 1.0}}, lower_is_better=True)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_and_keeps_the_order(p_values):
    found = holm(p_values)
    assert all(c >= p - 1e-12 for c, p in zip(found, p_values, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert np.all(np.diff(np.array(found)[order]) >= -1e-12)
    assert found == pytest.approx(multipletests(p_values, method="holm")[1])
