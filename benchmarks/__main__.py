"""`python -m benchmarks [--quick]`: measure, print a table, write benchmarks/results.json."""

from __future__ import annotations

import sys

import torch

from benchmarks import adapters, dynamic, gradients, lr_lora, planning, smollm2, spectra
from benchmarks.timing import write

MODULES = (spectra, planning, gradients, adapters, smollm2, lr_lora, dynamic)


def main() -> None:
    """Run every benchmark; --quick takes fewer and smaller ones."""
    quick = "--quick" in sys.argv[1:]
    torch.manual_seed(0)
    rows = [row for module in MODULES for row in module.measure(quick=quick)]
    print(write(rows, "make bench-quick" if quick else "make bench"))


if __name__ == "__main__":
    main()
