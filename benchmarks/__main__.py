"""`python -m benchmarks [--quick] [NAME...]`: measure and print a table.

Names are modules of this package; without any, all of them are measured. A full benchmark writes
what it found to `benchmarks/results.json`.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import adapters, dynamic, gradients, lr_lora, planning, smollm2, spectra
from benchmarks.timing import table, write

MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (spectra, planning, gradients, adapters, smollm2, lr_lora, dynamic)
}


def main() -> None:
    """Run the benchmarks that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller ones")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MODULES))
    chosen = parser.parse_args()
    unknown = set(chosen.names) - set(MODULES)
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(MODULES)}")
    for name in chosen.names or MODULES:
        torch.manual_seed(0)
        rows = MODULES[name].measure(quick=chosen.quick)
        print(table(rows), flush=True)
        if not chosen.quick:
            write(rows, f"python -m benchmarks {name}")


if __name__ == "__main__":
    main()
