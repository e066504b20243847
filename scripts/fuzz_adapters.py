"""Load thousands of broken adapters; anything but an error of ours, in time, ends it.

    python scripts/fuzz_adapters.py [runs of each kind] [seed]

The suite does the same with some hundreds (tests/adapters/test_loading.py).
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "adapters")]

from test_loading import TwoLayers, make_lora, make_ralora  # noqa: E402

from adapter_fuzzer import fuzz  # noqa: E402


def main(runs: int = 5000, seed: int = 1) -> None:
    """Fuzz both kinds of adapters."""
    for make in (make_ralora, make_lora):
        with tempfile.TemporaryDirectory() as scratch:
            make(Path(scratch) / "original")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            started = time.perf_counter()
            outcomes = fuzz(
                TwoLayers,
                Path(scratch) / "original",
                Path(scratch) / "broken",
                runs=runs,
                seed=seed,
            )
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            seconds = time.perf_counter() - started
        print(
            f"{make.__name__}: {runs} broken adapters in {seconds:.0f} s, {dict(outcomes)}, "
            f"peak memory grew by {grown:.0f} MiB"
        )


if __name__ == "__main__":
    main(*(int(value) for value in sys.argv[1:3]))
