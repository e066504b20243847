"""How much of a gradient LoRA and diagonal blocks of its size can hold, as Markdown.

    python scripts/compression_facts.py [GSM8K.jsonl] [--batches N]

RaLoRA's Eq. 24 and Eq. 28, computed exactly for matrices of known spectra, for the gradients of
SmolLM2-135M and for the first step that Adam makes of them, on source code of Python's standard
library and, if its file is named, on GSM8K (lines of `question` and `answer`). Needs the extras
`demo` and `compare`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import rankwise as rw
from rankwise.experiments.smollm2 import smollm2_folder
from rankwise.experiments.stdlib_text import write_stdlib_text
from rankwise.spectra import block_energy, effective_rank
from rankwise.targets import layer_position
from rankwise.training.config import DataConfig
from rankwise.training.data import load_token_data

RANK, LENGTH, BATCH_SIZE = 8, 128, 4
BLOCKS = (2, 4, 8, 16, 32)
SIDE = 512
Energies = Mapping[int, Tensor]


@dataclass(frozen=True)
class Module:
    """One gradient: its GID and, by n, what n blocks of rank 1, 2, ... hold."""

    name: str
    gid: float
    energies: Energies

    def held(self, n: int, rank: int = RANK) -> float:
        """The part that n blocks of a rank hold; of smaller blocks, all that is in them."""
        return float(self.energies[n][:rank][-1])

    def gain(self, n: int) -> float:
        """What n blocks hold, over what LoRA of the same parameters holds."""
        return self.held(n) / self.held(1)

    def alignment(self, n: int) -> float:
        """Energy on the n diagonal blocks over 1/n, its share of the area; by chance 1."""
        return float(self.energies[n][-1]) * n

    def planned(self) -> int:
        """RaLoRA's n by the GID."""
        return 2 ** int(np.clip(np.floor(np.log2(self.gid / RANK)), 0, np.log2(BLOCKS[-1])))


def module(name: str, matrix: Tensor) -> Module:
    """Measure one matrix."""
    energies = {n: block_energy(matrix, n) for n in (1, *BLOCKS)}
    steps = energies[1].diff(prepend=torch.zeros(1, dtype=torch.float64))
    return Module(name, effective_rank(steps.clamp_min(0).sqrt()), energies)


def known_spectra() -> Iterator[Module]:
    """Square matrices with random singular vectors, from flat to steep; and noise."""
    generator = torch.Generator().manual_seed(0)

    def rotation() -> Tensor:
        drawn = torch.randn(SIDE, SIDE, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(drawn)
        return q * r.diagonal().sign()

    at = torch.arange(1, SIDE + 1, dtype=torch.float64)
    for power in (0.0, 0.1, 0.2, 0.3, 0.5, 1.0):
        name = "flat" if not power else f"sigma_i = i^-{power:g}"
        yield module(name, rotation() * at**-power @ rotation())
    yield module(
        "Gaussian noise", torch.randn(SIDE, SIDE, generator=generator, dtype=torch.float64)
    )


def gradients(rows: Path, batches: int) -> Mapping[str, Tensor]:
    """Mean gradients of all linear layers over packed batches."""
    folder = smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = DataConfig(train=str(rows), max_length=LENGTH, packing=True)
    tokens = load_token_data(data, AutoTokenizer.from_pretrained(folder), seed=0)
    profile = rw.profile_gradients(
        model, tokens.loader(BATCH_SIZE, seed=0), batches=batches, keep_gradients=True
    )
    assert profile.gradients is not None
    return profile.gradients


def spectrum_table(modules: list[Module]) -> str:
    """One line a spectrum."""
    lines = [
        "| spectrum | effective rank | LoRA holds | "
        + " | ".join(f"n = {n}" for n in BLOCKS)
        + " |",
        "|---|---|---|" + "---|" * len(BLOCKS),
    ]
    for each in modules:
        gains = " | ".join(f"{each.gain(n):.2f}" for n in BLOCKS)
        lines.append(f"| {each.name} | {each.gid:.0f} | {each.held(1):.1%} | {gains} |")
    return "\n".join(lines)


def gradient_table(modules: list[Module]) -> str:
    """One line a number of blocks, over all modules."""
    lines = [
        "| n | held, median | of LoRA's, median | of LoRA's, best module | modules where blocks "
        "lose less | energy on the diagonal, by chance 1 | Spearman of GID and gain |",
        "|---|---|---|---|---|---|---|",
        f"| 1 (LoRA) | {np.median([m.held(1) for m in modules]):.1%} | 1 | 1 | | 1 | |",
    ]
    gids = [each.gid for each in modules]
    for n in BLOCKS:
        gains = np.array([each.gain(n) for each in modules])
        held = np.median([each.held(n) for each in modules])
        aligned = np.median([each.alignment(n) for each in modules])
        lines.append(
            f"| {n} | {held:.1%} | {np.median(gains):.2f} | {gains.max():.2f} | "
            f"{(gains > 1).sum()} of {len(modules)} | {aligned:.2f} | "
            f"{spearmanr(gids, gains).statistic:.2f} |"
        )
    planned = np.array([each.gain(each.planned()) for each in modules if each.planned() > 1])
    lines.append(
        f"\nWith RaLoRA's own n, more than 1 in {len(planned)} modules, blocks hold "
        f"{np.median(planned):.2f} of what LoRA holds (median) and more than it in "
        f"{(planned > 1).sum()}."
        if len(planned)
        else "\nRaLoRA's own n is 1 in every module."
    )
    return "\n".join(lines)


def kind_table(modules: list[Module], n: int = 8) -> str:
    """One line a kind of module."""
    lines = [
        f"| kind | GID | LoRA holds | n = {n} holds | energy on {n} diagonal blocks, by chance 1 |",
        "|---|---|---|---|---|",
    ]
    kinds: dict[str, list[Module]] = {}
    for each in modules:
        kinds.setdefault(layer_position(each.name).kind, []).append(each)
    for kind, members in kinds.items():
        numbers = [
            np.median([value(m) for m in members])
            for value in (lambda m: m.gid, lambda m: m.held(1), lambda m: m.held(n))
        ]
        aligned = np.median([m.alignment(n) for m in members])
        gid, lora, blocks = numbers
        lines.append(f"| {kind} | {gid:.0f} | {lora:.1%} | {blocks:.1%} | {aligned:.2f} |")
    return "\n".join(lines)


def texts(gsm8k: Path | None, scratch: Path) -> dict[str, Path]:
    """One file of JSON lines per text."""
    files = {"source code": write_stdlib_text(scratch, max_bytes=1_000_000).train}
    if gsm8k is not None:
        rows = [json.loads(line) for line in gsm8k.read_text().splitlines()]
        found = [{"text": f"{row['question']}\n{row['answer']}"} for row in rows]
        files["GSM8K"] = scratch / "gsm8k.jsonl"
        files["GSM8K"].write_text("".join(json.dumps(row) + "\n" for row in found))
    return files


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "the mean gradient": lambda g: g,
    "Adam's first step, the gradient's signs": torch.sign,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gsm8k", nargs="?", type=Path, help="a file of GSM8K")
    parser.add_argument("--batches", type=int, default=8)
    chosen = parser.parse_args()
    print(f"### Known spectra, {SIDE} x {SIDE}, r = {RANK}\n\n{spectrum_table([*known_spectra()])}")
    with tempfile.TemporaryDirectory() as scratch:
        for text, rows in texts(chosen.gsm8k, Path(scratch)).items():
            found = gradients(rows, chosen.batches)
            for form, change in FORMS.items():
                if form != next(iter(FORMS)) and text != "source code":
                    continue
                modules = [module(name, change(g)) for name, g in found.items()]
                title = f"{text}: {form}, {len(modules)} modules, N = {chosen.batches}, r = {RANK}"
                print(f"\n### {title}\n\n{gradient_table(modules)}\n", flush=True)
                print(kind_table(modules), flush=True)


if __name__ == "__main__":
    main()
