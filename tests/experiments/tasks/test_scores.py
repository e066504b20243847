import pytest
import torch
from scipy import stats
from sklearn.metrics import f1_score as sklearn_f1
from sklearn.metrics import matthews_corrcoef

from rankwise.experiments.tasks.scores import (
    accuracy,
    f1_score,
    final_number,
    matthews_correlation,
    pearson,
    spearman,
)


@pytest.mark.parametrize("classes", [2, 3])
def test_matthews_is_sklearns(classes):
    generator = torch.Generator().manual_seed(classes)
    true = torch.randint(classes, (60,), generator=generator).tolist()
    predicted = torch.randint(classes, (60,), generator=generator).tolist()
    assert matthews_correlation(predicted, true) == pytest.approx(
        matthews_corrcoef(true, predicted)
    )
    assert matthews_correlation([1] * 60, true) == 0.0


def test_f1_is_sklearns():
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(2, (50,), generator=generator).tolist()
    predicted = torch.randint(2, (50,), generator=generator).tolist()
    assert f1_score(predicted, true) == pytest.approx(sklearn_f1(true, predicted))
    assert f1_score([0, 0], [0, 0]) == 0.0


def test_correlations_are_scipys_with_ties():
    x, y = [1.0, 2.0, 2.0, 4.0, -3.0], [0.5, 0.5, 3.0, 1.0, 0.0]
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert pearson([1.0, 1.0], [0.0, 1.0]) == 0.0


def test_accuracy():
    assert accuracy([1, 0, 2, 2], [1, 1, 2, 0]) == 0.5


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 2 = <<2+2=4>>4\n#### 4", 4),
        ("#### 1,234,567", 1234567),
        ("The answer is: -12.5.", -12.5),
        ("costs $20 and then 30 more", 30),
        ("#### no, 5 of them, or 6", 5),
        ("####", None),
        ("first 7 ####", 7),
        ("half is .5", 0.5),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number
