"""Memory of profiling a model of SmolLM2-1.7B's dimensions, against the formula.

Each point runs in a fresh process: a model of random weights is loaded, the peak of the resident
memory is reset, and profiling runs; the extra memory is the new peak less what the loaded model
took. A spectrum of these dimensions takes many seconds and its workspace is the same in every
point, so that it is measured once, by itself, and left out of the points, of the formula as well.
Linux only (it reads /proc). Then the formula, whole, extrapolates to larger models.

    python scripts/profile_memory.py --out runs/profile_memory.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rankwise.profiling import profile_gradients
from rankwise.profiling.memory import MemoryEstimate, estimate_memory, spectra_bytes
from rankwise.spectra import singular_values
from rankwise.targets import LinearShape

Engine = Literal["hooks", "sweep"]
SHAPES: dict[str, dict[str, int]] = {
    "1.7B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 49152,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
"""Dimensions of SmolLM2-1.7B and of Llama 3."""


@dataclass(frozen=True)
class Point:
    """One measurement."""

    layers: int
    engine: Engine
    batches: int
    gram: bool
    samples: int = 4
    length: int = 128

    @property
    def statistics(self) -> tuple[str, ...]:
        """What is measured besides the mean."""
        return ("gram",) if self.gram else ()


ENGINES: tuple[Engine, ...] = ("hooks", "sweep")
POINTS = [
    *(
        Point(layers, engine, batches, gram=False)
        for batches in (2, 4)
        for layers in (2, 4)
        for engine in ENGINES
    ),
    *(Point(2, engine, 2, gram=True) for engine in ENGINES),
    Point(2, "sweep", 6, gram=True),
    Point(2, "sweep", 6, gram=False),
]
QUIET_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""Freed blocks go back to the system at once, so that the peak is of what was alive."""


def build(shape: str, layers: int | None = None) -> LlamaForCausalLM:
    """A model of random weights in those dimensions."""
    settings: dict[str, Any] = {**SHAPES[shape], "tie_word_embeddings": shape == "1.7B"}
    if layers is not None:
        settings["num_hidden_layers"] = layers
    return LlamaForCausalLM(LlamaConfig(**settings))


def predict(model: LlamaForCausalLM, point: Point) -> MemoryEstimate:
    """The formula's answer."""
    return estimate_memory(
        model,
        batches=point.batches,
        tokens=point.samples * point.length,
        samples=point.samples,
        statistics=point.statistics,
        engine=point.engine,
    )


def measure(point: Point) -> dict[str, Any]:
    """Profile in this process; extra bytes."""
    torch.manual_seed(0)
    model = build("1.7B", point.layers)
    batches = []
    for _ in range(point.batches):
        ids = torch.randint(SHAPES["1.7B"]["vocab_size"], (point.samples, point.length))
        batches.append({"input_ids": ids, "labels": ids.clone()})
    with torch.no_grad():
        model(input_ids=batches[0]["input_ids"][:, :4])  # libraries allocate on the first call
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    with patch("rankwise.profiling.reduce.singular_values", lambda matrix: matrix[:, 0].abs()):
        profile = profile_gradients(
            model,
            batches,
            batches=point.batches,
            statistics=point.statistics,  # type: ignore[arg-type]
            engine=point.engine,
            progress=False,
        )
    return {
        "measured": resident("VmHWM") - before,
        "engine_used": profile.provenance.engine,
        "seconds": profile.provenance.seconds,
    }


def measure_spectrum() -> dict[str, Any]:
    """Extra bytes of the spectrum of one MLP gradient of rank 512, and the formula's."""
    torch.manual_seed(0)
    shape = LinearShape(SHAPES["1.7B"]["hidden_size"], SHAPES["1.7B"]["intermediate_size"])
    gradient = torch.randn(shape.d_out, 512) @ torch.randn(512, shape.d_in)
    torch.linalg.eigh(torch.eye(64, dtype=torch.float64))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    singular_values(gradient)
    return {"measured": resident("VmHWM") - before, "predicted": spectra_bytes(shape)}


def resident(key: str) -> int:
    """Bytes of resident memory, now (VmRSS) or at the peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A process of its own, that gives back what it frees."""
    environment = os.environ | QUIET_HEAP
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment)


def table_of_points(rows: list[dict[str, Any]]) -> str:
    """Measured against predicted, as Markdown."""
    lines = [
        "| layers | engine | batches | Gram | measured, MB | formula, MB | formula / measured |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        point = Point(**{key: row[key] for key in Point.__dataclass_fields__})
        with torch.device("meta"):
            model = build("1.7B", point.layers)
        with patch("rankwise.profiling.memory.spectra_bytes", lambda _: 0):
            predicted = predict(model, point).total
        lines.append(
            f"| {row['layers']} | {row['engine']} | {row['batches']} | "
            f"{'yes' if row['gram'] else 'no'} | {row['measured'] / 1e6:,.0f} | "
            f"{predicted / 1e6:,.0f} | {predicted / row['measured']:.2f} |"
        )
    return "\n".join(lines)


def table_of_models(samples: int = 4, length: int = 512, batches: int = 16) -> str:
    """What larger models need, by formula, as Markdown."""
    lines = [
        f"Batches of {samples} x {length} tokens, {batches} of them, weights and activations in "
        "bfloat16.",
        "",
        "| model | weights, GB | hooks | hooks, Gram | sweep | sweep, Gram |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for shape in SHAPES:
        with torch.device("meta"):
            model = build(shape).to(torch.bfloat16)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        cells = [
            f"{predict(model, Point(0, engine, batches, gram, samples, length)).total / 1e9:,.0f}"
            for engine in ("hooks", "sweep")
            for gram in (False, True)
        ]
        lines.append(f"| {shape} | {weights / 1e9:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every point that is not in the file yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/profile_memory.json"))
    parser.add_argument("--point", help=argparse.SUPPRESS)
    parser.add_argument("--spectrum", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.spectrum:
        print(json.dumps(measure_spectrum()))
        return
    if arguments.point is not None:
        print(json.dumps(measure(Point(**json.loads(arguments.point)))))
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
    for point in POINTS:
        if any(all(row[k] == v for k, v in vars(point).items()) for row in rows):
            continue
        command = [sys.executable, __file__, "--point", json.dumps(vars(point))]
        done = run(command)
        rows.append(vars(point) | json.loads(done.stdout.splitlines()[-1]))
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
        print(rows[-1], file=sys.stderr)
    print(table_of_points(rows))
    command = [sys.executable, __file__, "--spectrum"]
    done = run(command)
    spectrum = json.loads(done.stdout.splitlines()[-1])
    print(
        f"\nSpectrum of one MLP gradient: measured {spectrum['measured'] / 1e6:,.0f} MB, formula "
        f"{spectrum['predicted'] / 1e6:,.0f} MB.\n"
    )
    print(table_of_models())


if __name__ == "__main__":
    main()
