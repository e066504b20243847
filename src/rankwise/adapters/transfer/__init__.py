"""Learned elementwise functions of a low-rank matrix, and linear layers through them.

`bases.py` holds the formulas, `grids.py` the grids, `expansion.py` the way to a cost that does not
grow with K, `evaluators.py` and `compiled.py` what runs over the entries, `passes.py` the layer's
forward and backward pass (in memory of `scratch.py`), `function.py` and, in traces, `operator.py`
their autograd, `factorised.py` the layer for small ranges, which forms no matrix of the size of W.
"""

from rankwise.adapters.transfer.bases import BASES, BasisName, ParameterGradients, Transfer
from rankwise.adapters.transfer.factorised import (
    Factorised,
    factorisation,
    factorised_linear,
)
from rankwise.adapters.transfer.function import evaluate, gradients, transfer_linear
from rankwise.adapters.transfer.grids import GridKind, grid_points
from rankwise.adapters.transfer.passes import Evaluation, evaluator, largest_norms

__all__ = [
    "BASES",
    "BasisName",
    "Evaluation",
    "Factorised",
    "GridKind",
    "ParameterGradients",
    "Transfer",
    "evaluate",
    "evaluator",
    "factorisation",
    "factorised_linear",
    "gradients",
    "grid_points",
    "largest_norms",
    "transfer_linear",
]
