"""Load thousands of broken adapters, plans and profiles; anything but our errors, in time, ends it.

    python scripts/fuzz_adapters.py [runs of each kind] [seed]

The suite does the same with some hundreds (tests/adapters/test_loading.py,
tests/test_plan.py, tests/profiling/test_profile_files.py).
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import rankwise as rw  # noqa: E402
from adapter_fuzzer import fuzz, fuzz_files  # noqa: E402
from saved_adapters import TwoLayers, make_lora, make_lr_lora, make_ralora  # noqa: E402
from tiny_models import tiny_llama, token_batch  # noqa: E402


def originals(place: Path) -> dict[str, Callable[[int, int], Counter[str]]]:
    """What is broken -> a function of runs and seed that breaks it and loads it."""
    model, batch = tiny_llama(), token_batch([9, 6])
    profile = rw.profile_gradients(
        model, [batch], ["k_proj", "up_proj"], batches=1, keep_gradients=True, progress=False
    )
    profile.save(place / "profile")
    rw.RaLoraPro(r=2).plan(profile).save(place / "plan.json")
    make_ralora(place / "ralora")
    make_lora(place / "lora")
    make_lr_lora(place / "lrlora")
    scratch = place / "broken"

    def adapters(name: str) -> Callable[[int, int], Counter[str]]:
        return lambda runs, seed: fuzz(TwoLayers, place / name, scratch, runs, seed)

    def files(name: str, load: Callable[[Path], object]) -> Callable[[int, int], Counter[str]]:
        return lambda runs, seed: fuzz_files(load, place / name, place / f"no {name}", runs, seed)

    return {
        "block-diagonal adapters": adapters("ralora"),
        "LoRA adapters": adapters("lora"),
        "LR-LoRA adapters": adapters("lrlora"),
        "plans": files("plan.json", rw.RankPlan.load),
        "profiles": files("profile", rw.GradientProfile.load),
    }


def main(runs: int = 5000, seed: int = 1) -> None:
    """Break every kind of file so many times."""
    with tempfile.TemporaryDirectory() as place:
        for name, broken in originals(Path(place)).items():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            started = time.perf_counter()
            outcomes = broken(runs, seed)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            seconds = time.perf_counter() - started
            print(
                f"{runs} broken {name} in {seconds:.0f} s: {dict(outcomes)}, "
                f"peak memory grew by {grown:.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main(*(int(value) for value in sys.argv[1:3]))
