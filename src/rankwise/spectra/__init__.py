"""From a matrix to its singular values, and from a spectrum to a dimension."""

from rankwise.spectra.compression import block_energy
from rankwise.spectra.decompose import (
    gram_eigenvalues,
    singular_values,
    token_gram,
    token_singular_values,
    top_singular,
)
from rankwise.spectra.estimators import (
    effective_rank,
    energy_crossing,
    energy_rank,
    participation_ratio,
    stable_rank,
    threshold_rank,
)

__all__ = [
    "block_energy",
    "effective_rank",
    "energy_crossing",
    "energy_rank",
    "gram_eigenvalues",
    "participation_ratio",
    "singular_values",
    "stable_rank",
    "threshold_rank",
    "token_gram",
    "token_singular_values",
    "top_singular",
]
