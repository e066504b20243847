"""Profiling and training steps of SmolLM2-135M on the standard library's source text."""

from __future__ import annotations

from torch import nn

import rankwise as rw
from benchmarks import adapters
from benchmarks.text import LENGTH, Batch, frozen_model, text_batches
from benchmarks.timing import Row, at_most, interleaved
from rankwise.profiling import GradientProfile
from rankwise.profiling.capture import capture_gradients


def measure(*, quick: bool) -> list[Row]:
    """The profile against frozen passes, and training steps with adapters."""
    base = frozen_model()
    count, size, runs = (2, 4, 3) if quick else (8, 8, 7)
    batches = text_batches(count, size)
    profile, rows = _profile(base, batches, 1 if quick else 2)
    return rows + adapters.measure_steps(base, profile, batches[0], runs=runs)


def _profile(base: nn.Module, batches: list[Batch], runs: int) -> tuple[GradientProfile, list[Row]]:
    """Whole profile against the bare forward and backward of the same batches."""

    def frozen_pass() -> None:
        with capture_gradients(base, [], lambda *_: None):
            for batch in batches:
                base(**batch, use_cache=False).loss.backward()

    profiles: list[GradientProfile] = []

    def profile() -> None:
        profiles.append(rw.profile_gradients(base, batches, batches=len(batches), progress=False))

    seconds = interleaved(runs, frozen=frozen_pass, profile=profile)
    frozen = seconds["frozen"]
    shape = f"{len(batches)} x ({batches[0]['input_ids'].shape[0]} x {LENGTH})"
    return profiles[-1], [
        at_most(
            f"SmolLM2 profile with GIDs, {shape}",
            seconds["profile"] / frozen,
            1.45,
            "of frozen passes",
        ),
        Row(f"SmolLM2 frozen passes, {shape}", frozen, "s"),
    ]
