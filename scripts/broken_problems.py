"""Which rows of the test part a run broke, and where its attention sinks are, as Markdown.

    python scripts/broken_problems.py experiments/main/gsm8k.yaml gsm8k--ralora--r8--lr0.003--seed0

Trains a finished cell of language modelling again and lists the rows with the largest losses: after
training, before it, and after training with each `--start` in front of the row. A *sink* is a token
whose hidden state in some layer is at least half as long as the first token's ever gets (massive
activations: Sun et al. 2024); attention that has nothing to attend to goes there. Below, the
untrained model's loss on the validation part behind nothing and behind each start.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F

from rankwise.experiments.bench import Bench
from rankwise.experiments.board import Board
from rankwise.experiments.config import load_experiment
from rankwise.experiments.running import train_cell
from rankwise.profiling.loss import IGNORED_LABEL
from rankwise.training.evaluate import held_out_loss


@dataclass(frozen=True)
class Seen:
    """A row's mean loss, and the places of its sinks."""

    loss: float
    sinks: list[int]


def look(model: nn.Module, row: dict[str, Any], start: list[int]) -> Seen:
    """Loss and sinks of one row behind `start`; places count from the row's own first token."""
    whole = behind(row, start)
    labels = torch.tensor(whole["labels"])
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor([whole["input_ids"]]), use_cache=False, output_hidden_states=True
        )
    loss = F.cross_entropy(output.logits[0, :-1], labels[1:], ignore_index=IGNORED_LABEL)
    # the last state is normalised, so the layers' own are the ones before it
    longest = torch.stack([state[0].norm(dim=-1) for state in output.hidden_states[:-1]]).amax(0)
    sinks = (longest >= longest[0] / 2).nonzero()[:, 0] - len(start)
    return Seen(float(loss), sinks.tolist())


def behind(row: dict[str, Any], start: list[int]) -> dict[str, Any]:
    """The row behind tokens that are read and not learned."""
    return {
        "input_ids": start + row["input_ids"],
        "labels": [IGNORED_LABEL] * len(start) + row["labels"],
    }


def main() -> None:
    """Train each cell again and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("cells", nargs="+", help="names of finished cells")
    parser.add_argument(
        "--start", nargs="+", default=["\n"], help="texts to put in front; default: a line break"
    )
    parser.add_argument("--rows", type=int, default=3, help="how many; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    board = Board(load_experiment(given.experiment))
    for name in given.cells:
        cell = board.find(name)
        record = board.record(cell) if cell is not None else None
        if cell is None or record is None or record.test is None:
            parser.error(f"{name}: no such cell, or it has no test loss")
        with tempfile.TemporaryDirectory(prefix="rankwise-") as scratch:
            bench = Bench(Path(scratch), torch.device("cpu"))
            trained = train_cell(cell, bench)
        show(name, trained.adapted.model, bench.data(cell.task).data, given)
        assert trained.test is not None
        print(f"\nTest loss {trained.test['loss']:.6f}, recorded {record.test['loss']:.6f}.\n")


def show(name: str, model: nn.Module, data: Any, given: argparse.Namespace) -> None:
    """The rows with the largest losses, worst first, and the untrained model behind each start."""
    model.eval()
    starts = {text: data.processor(text)["input_ids"] for text in given.start}
    seen = [look(model, row, []) for row in data.test]
    order = sorted(range(len(seen)), key=lambda i: -seen[i].loss)[: given.rows]
    rows = [data.test[i] for i in order]
    untrained = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    with untrained:
        before = [look(model, row, []) for row in rows]
        losses = {
            text: held_out_loss(
                model, data.batches([behind(row, ids) for row in data.validation], 16), step=0
            ).loss
            for text, ids in {"": [], **starts}.items()
        }
    print(f"{name}, {len(seen)} rows, median loss {median(s.loss for s in seen):.4f}\n")
    columns = ["loss", "sinks", "untrained", "its sinks", *(f"behind {text!r}" for text in starts)]
    print("| row begins with |", " | ".join(columns), "|")
    print("|---|---:|---|---:|---|" + "---:|" * len(starts))
    for place, row, base in zip(order, rows, before, strict=True):
        tokens = [data.processor.decode(token) for token in row["input_ids"][:4]]
        own = seen[place]
        after = [f"{look(model, row, ids).loss:.3f}" for ids in starts.values()]
        print(
            f"| {' '.join(f'`{token}`' for token in tokens)} | {own.loss:.3f} | {own.sinks} | "
            f"{base.loss:.3f} | {base.sinks} | {' | '.join(after)} |"
        )
    told = ", ".join(f"{loss:.4f} behind {text!r}" for text, loss in losses.items())
    print(f"\nUntrained, on the validation part: {told}.")


if __name__ == "__main__":
    main()
