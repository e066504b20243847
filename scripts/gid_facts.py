"""What the gradients' dimensions look like on three kinds of text, as Markdown and CSV.

    python scripts/gid_facts.py measure GSM8K.jsonl COLA.tsv --out runs/gid
    python scripts/gid_facts.py tables runs/gid --csv docs/results/gid.csv

GSM8K as lines of `question` and `answer` (openai/gsm8k), CoLA as tab-separated lines with the
sentence last (nyu-mll/glue, cola); source code is Python's standard library. All texts are packed
into sequences of 128 tokens, so that they differ in content and not in length. A profile that is
already in the folder is not measured again. Needs the extra `compare` (scipy).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import rankwise as rw
from rankwise.experiments.smollm2 import smollm2_folder
from rankwise.experiments.stdlib_text import write_stdlib_text
from rankwise.profiling.loss import BatchLoss, model_loss
from rankwise.spectra import energy_rank, participation_ratio, stable_rank, threshold_rank
from rankwise.targets import layer_position
from rankwise.training.config import DataConfig
from rankwise.training.data import load_token_data

LENGTH, BATCH_SIZE = 128, 4
RUNS = {0: 128, 1: 16}
"""Seed of the draw -> batches; the first also measures convergence and Fisher information."""
TEXTS = {"gsm8k": "GSM8K", "code": "source code", "cola": "CoLA"}
THRESHOLDS = (1e-1, 1e-3, 1e-5)
LONG = "gsm8k-long"
LONG_BATCHES = 512
"""One text is measured for much longer, for its convergence alone."""


def measure(gsm8k: Path, cola: Path, out: Path) -> None:
    """Profile SmolLM2 on every text and seed."""
    folder = smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    files = _files(gsm8k, cola, out)
    todo = [
        (f"{text}-{seed}", file, seed, batches, ["mean"] if seed else ["convergence", "fisher"])
        for (text, file), (seed, batches) in itertools.product(files.items(), RUNS.items())
    ]
    todo.append((LONG, files["gsm8k"], 0, LONG_BATCHES, ["convergence"]))
    for name, file, seed, batches, statistics in todo:
        target = out / name
        if target.exists():
            continue
        data = DataConfig(train=str(file), max_length=LENGTH, packing=True)
        loader = load_token_data(data, tokenizer, seed=0).loader(BATCH_SIZE, seed=seed)
        losses: list[float] = []

        def loss_fn(
            network: nn.Module, batch: Mapping[str, Any], seen: list[float] = losses
        ) -> BatchLoss:
            result = model_loss(network, batch)
            seen.append(float(result.loss.detach()))
            return result

        profile = rw.profile_gradients(
            model, loader, batches=batches, loss_fn=loss_fn, statistics=statistics
        )
        target.with_suffix(".json").write_text(json.dumps({"loss": float(np.mean(losses))}))
        profile.save(target)
        print(f"{target}: {profile.provenance.seconds:.0f} s, loss {np.mean(losses):.3f}")


def _files(gsm8k: Path, cola: Path, out: Path) -> dict[str, Path]:
    """One file of JSON lines per text."""
    out.mkdir(parents=True, exist_ok=True)
    problems = [json.loads(line) for line in gsm8k.read_text().splitlines()]
    texts = {
        "gsm8k": [f"{row['question']}\n{row['answer']}" for row in problems],
        "cola": [line.split("\t")[-1] for line in cola.read_text().splitlines()],
    }
    files = {"code": write_stdlib_text(out / "code", max_bytes=3_000_000).train}
    for name, rows in texts.items():
        files[name] = out / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return files


class Run:
    """One saved profile with what the tables ask of it."""

    def __init__(self, folder: Path) -> None:
        self.profile = rw.GradientProfile.load(folder)
        self.loss = json.loads(folder.with_suffix(".json").read_text())["loss"]
        self.names = list(self.profile.modules)
        self.places = [layer_position(name) for name in self.names]
        self.kinds = list(dict.fromkeys(place.kind for place in self.places))
        self.gid = np.array([self.profile.gid[name] for name in self.names])
        self.layers = 1 + max(place.index or 0 for place in self.places)

    def of_kind(self, kind: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which modules are of a kind."""
        return np.array([place.kind == kind for place in self.places])

    def third(self, part: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which modules lie in the lower (0), middle (1) or upper (2) third of the layers."""
        return np.array([3 * (place.index or 0) // self.layers == part for place in self.places])

    def spectra(self, scale: float = 1.0) -> Iterator[torch.Tensor]:
        """Singular values of every module, as a loss `scale` times as large would have them."""
        return (self.profile.singular_values[name] * scale for name in self.names)


def tables(folder: Path, csv_file: Path | None) -> None:
    """Print every table from the saved profiles; write the heatmap's numbers if asked to."""
    runs = {
        (text, seed): Run(folder / f"{text}-{seed}")
        for text, seed in itertools.product(TEXTS, RUNS)
        if (folder / f"{text}-{seed}").exists()
    }
    first = {text: runs[text, 0] for text in TEXTS if (text, 0) in runs}
    _by_text(runs)
    _by_kind(first)
    _by_depth(first)
    _by_batches("Convergence", first)
    if (folder / LONG).exists():
        _by_batches("Longer", {"gsm8k": Run(folder / LONG)})
    _estimators(first)
    _fisher(first)
    if csv_file is not None:
        _heatmap(first, csv_file)


def _heading(text: str) -> None:
    print(f"\n### {text}\n")


def _row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def _header(*cells: str) -> None:
    _row(*cells)
    _row(*["---"] * len(cells))


def _by_text(runs: Mapping[tuple[str, int], Run]) -> None:
    _heading("Mean GID by text")
    _header("text", "draw", "N", "tokens", "loss of the model", "mean GID", "lowest", "highest")
    for (text, seed), run in runs.items():
        p = run.profile.provenance
        spread = [f"{value:.0f}" for value in (run.gid.mean(), run.gid.min(), run.gid.max())]
        _row(TEXTS[text], seed, p.batches, f"{p.tokens:,}", f"{run.loss:.3f}", *spread)
    _heading("Rank correlation (Spearman) of the modules' GIDs between texts and between draws")
    _header("", *(f"{TEXTS[text]} {seed}" for text, seed in runs))
    for (text, seed), a in runs.items():
        cells = [f"{spearmanr(a.gid, b.gid).statistic:.2f}" for b in runs.values()]
        _row(f"{TEXTS[text]} {seed}", *cells)


def _by_kind(first: Mapping[str, Run]) -> None:
    _heading("Mean GID by module kind, and in parentheses as a share of the largest possible")
    _header("kind", *(TEXTS[text] for text in first))
    some = next(iter(first.values()))
    limits = np.array([m.shape.max_rank for m in some.profile.modules.values()])
    for kind in some.kinds:
        chosen = some.of_kind(kind)
        cells = [
            f"{run.gid[chosen].mean():.0f} ({(run.gid / limits)[chosen].mean():.2f})"
            for run in first.values()
        ]
        _row(kind, *cells)
    attention = [kind for kind in some.kinds if "attn" in kind]
    output = attention.index("self_attn.o_proj")
    _heading("Layers in which o_proj has the highest GID of the four attention projections")
    _header("text", "layers")
    for text, run in first.items():
        grid = np.array([run.gid[run.of_kind(kind)] for kind in attention])
        _row(TEXTS[text], f"{int((grid.argmax(0) == output).sum())} of {grid.shape[1]}")


def _by_depth(first: Mapping[str, Run]) -> None:
    _heading("Mean GID by depth")
    _header("text", "lower third", "middle third", "upper third", "highest layer", "lowest layer")
    for text, run in first.items():
        layers = [
            np.mean([g for g, place in zip(run.gid, run.places, strict=True) if place.index == i])
            for i in range(run.layers)
        ]
        thirds = [f"{run.gid[run.third(part)].mean():.0f}" for part in range(3)]
        _row(TEXTS[text], *thirds, int(np.argmax(layers)), int(np.argmin(layers)))


def _by_batches(title: str, first: Mapping[str, Run]) -> None:
    counts = next(iter(first.values())).profile.convergence_batches
    _heading(f"{title}: mean GID after N batches, and its Spearman correlation with the last")
    _header("text", *(f"N = {n}" for n in counts))
    for text, run in first.items():
        assert run.profile.convergence is not None
        grid = torch.stack([run.profile.convergence[name] for name in run.names]).numpy()
        _row(TEXTS[text], *(f"{value:.0f}" for value in grid.mean(0)))
        ranks = [spearmanr(grid[:, i], grid[:, -1]).statistic for i in range(len(counts))]
        _row("", *(f"{value:.2f}" for value in ranks))
        print(f"<!-- {run.profile.convergence_verdict()} -->")


def _dimensions(run: Run, scale: float = 1.0) -> dict[str, np.ndarray[Any, Any]]:
    spectra = list(run.spectra(scale))
    found: dict[str, list[float]] = {
        "entropy (GID)": [float(rw_gid) for rw_gid in run.gid],
        "participation ratio": [participation_ratio(s) for s in spectra],
        "stable rank": [stable_rank(s) for s in spectra],
        "energy 0.9 of the matrix": [energy_rank(s**2) for s in spectra],
        "above 0.01 of the largest": [threshold_rank(s, 1e-2, relative=True) for s in spectra],
    }
    for eps in THRESHOLDS:
        found[f"above {eps:g}"] = [threshold_rank(s, eps) for s in spectra]
    return {name: np.array(values, dtype=float) for name, values in found.items()}


def _estimators(first: Mapping[str, Run]) -> None:
    _heading("Estimators: mean over modules; then for a loss ten times smaller; then blocks at r=8")
    _header(
        "estimator",
        *(TEXTS[text] for text in first),
        *(f"{TEXTS[text]}, loss / 10" for text in first),
        "modules with 1 block / most blocks (32), GSM8K",
        "Spearman with GID, GSM8K",
    )
    plain = {text: _dimensions(run) for text, run in first.items()}
    scaled = {text: _dimensions(run, 0.1) for text, run in first.items()}
    some = next(iter(first))
    for name in plain[some]:
        values = plain[some][name]
        exponent = np.clip(np.floor(np.log2(np.maximum(values, 1) / 8)), 0, 5)
        blocks = f"{int((exponent == 0).sum())} / {int((exponent == 5).sum())}"
        means = [f"{part[text][name].mean():.0f}" for part in (plain, scaled) for text in first]
        constant = float(np.ptp(values)) == 0
        relation = spearmanr(values, plain[some]["entropy (GID)"])
        _row(name, *means, blocks, "constant" if constant else f"{relation.statistic:+.2f}")


def _fisher(first: Mapping[str, Run]) -> None:
    _heading("GID against Fisher information over layers: Pearson log F, Pearson 1/F, Spearman")
    some = next(iter(first.values()))
    _header("kind", *(TEXTS[text] for text in first))
    for kind in some.kinds:
        cells = []
        for run in first.values():
            chosen = run.of_kind(kind)
            fisher = np.array([run.profile.modules[name].fisher for name in run.names], float)
            gid, fisher = run.gid[chosen], fisher[chosen]
            logs = pearsonr(gid, np.log(fisher)).statistic
            inverse = pearsonr(gid, 1 / fisher).statistic
            cells.append(f"{logs:+.2f}, {inverse:+.2f}, {spearmanr(gid, fisher).statistic:+.2f}")
        _row(kind, *cells)


def _heatmap(first: Mapping[str, Run], file: Path) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["text", "layer", "kind", "gid", "stable_rank", "gradient_norm"])
        for text, run in first.items():
            for name, place, gid in zip(run.names, run.places, run.gid, strict=True):
                stable = stable_rank(run.profile.singular_values[name])
                norm = run.profile.modules[name].gradient_norm
                cells = [f"{gid:.2f}", f"{stable:.3f}", f"{norm:.4g}"]
                writer.writerow([text, place.index, place.kind, *cells])


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    first = commands.add_parser("measure", help="profile every text")
    first.add_argument("gsm8k", type=Path)
    first.add_argument("cola", type=Path)
    first.add_argument("--out", type=Path, required=True)
    second = commands.add_parser("tables", help="print what was found")
    second.add_argument("folder", type=Path)
    second.add_argument("--csv", type=Path, help="write the heatmaps' numbers")
    chosen = parser.parse_args()
    if chosen.command == "measure":
        measure(chosen.gsm8k, chosen.cola, chosen.out)
    else:
        tables(chosen.folder, chosen.csv)


if __name__ == "__main__":
    main()
