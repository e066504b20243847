"""The tasks of GLUE (Wang et al. 2018): columns, labels, metrics, and T5's words for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GLUE_ID = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTable:
    """One task.

    Attributes:
        columns: Of the first sentence, and of the second where there is one.
        metric: GLUE's own, or the first of two.
        words: What T5 answers for each label, in the labels' order (Raffel et al. 2020, appendix
            D); none for a regression.
        test_split: The split with labels that is not trained on.
    """

    columns: tuple[str, str | None]
    metric: str
    words: tuple[str, ...]
    test_split: str = "validation"

    @property
    def labels(self) -> int:
        """How many classes; 1 for a regression."""
        return len(self.words) or 1


_ENTAILED = ("entailment", "not_entailment")

GLUE: Mapping[str, GlueTable] = {
    "cola": GlueTable(("sentence", None), "matthews", ("unacceptable", "acceptable")),
    "sst2": GlueTable(("sentence", None), "accuracy", ("negative", "positive")),
    "mrpc": GlueTable(("sentence1", "sentence2"), "f1", ("not_equivalent", "equivalent")),
    "stsb": GlueTable(("sentence1", "sentence2"), "pearson", ()),
    "qqp": GlueTable(("question1", "question2"), "f1", ("not_duplicate", "duplicate")),
    "mnli": GlueTable(
        ("premise", "hypothesis"),
        "accuracy",
        ("entailment", "neutral", "contradiction"),
        test_split="validation_matched",
    ),
    "qnli": GlueTable(("question", "sentence"), "accuracy", _ENTAILED),
    "rte": GlueTable(("sentence1", "sentence2"), "accuracy", _ENTAILED),
    "wnli": GlueTable(("sentence1", "sentence2"), "accuracy", ("not_entailment", "entailment")),
}
"""By the names of the hub's configurations."""
