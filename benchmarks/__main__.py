"""`python -m benchmarks [--quick]`: measure, print a table, write benchmarks/results.json."""

from __future__ import annotations

import sys

import torch

from benchmarks import gradients, smollm2, spectra
from benchmarks.timing import write


def main() -> None:
    """Run every benchmark; --quick takes fewer and smaller ones."""
    quick = "--quick" in sys.argv[1:]
    torch.manual_seed(0)
    rows = [row for module in (spectra, gradients, smollm2) for row in module.measure(quick=quick)]
    print(write(rows, "make bench-quick" if quick else "make bench"))


if __name__ == "__main__":
    main()
