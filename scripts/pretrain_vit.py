r"""A small vision transformer, pretrained on part of Fashion-MNIST, to be adapted to the rest.

    python scripts/pretrain_vit.py /usr/share/datasets/fashion-mnist OUT [--steps 800]

The data are the four IDX files of Fashion-MNIST; Debian's package dataset-fashion-mnist has them in
the folder above. Six of the ten classes are learned: trousers, dresses, sandals, sneakers, bags and
boots. OUT is then a transformers folder that an experiment takes as `model`, for a task of the kind
`image` with the other four, `classes: [0, 2, 4, 6]`: T-shirts, pullovers, coats and shirts, which
are hard to tell apart. At the end a new head alone, and one with LoRA of rank 4, are trained on
those for `--adapt-steps`, so that one sees what adapters can gain there.

With the defaults about four minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from rankwise.experiments.architectures import SMALL_VIT
from rankwise.experiments.tasks import ImageTask, TaskData
from rankwise.files import new_folder
from rankwise.targets import find_targets

LEARNED = [1, 3, 5, 7, 8, 9]
REST = [0, 2, 4, 6]
SIDE = SMALL_VIT["image_size"]
MEAN, STD = 0.286, 0.353
"""Of Fashion-MNIST's training pixels, in units of white."""


def small_vit(width: int, layers: int) -> ViTForImageClassification:
    """Patches of 4 x 4, four heads, an MLP of twice the width."""
    changes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    config = ViTConfig(**(dict(SMALL_VIT) | changes), num_labels=len(LEARNED))
    return ViTForImageClassification(config)


def batches(data: TaskData, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Shuffled passes over the training rows, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data.train), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield data.collate([data.train[i] for i in order[start : start + size]])


def train(model: nn.Module, rows: Iterable[dict[str, Tensor]], steps: int, rate: float) -> None:
    """AdamW with a cosine schedule after a tenth of warm-up; prints the loss ten times."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    warmup, recent, started = max(1, steps // 10), [], time.perf_counter()
    model.train()
    for step, batch in enumerate(itertools.islice(rows, steps), 1):
        done = max(0.0, (step - warmup) / max(1, steps - warmup))
        factor = min(step / warmup, 0.5 * (1 + math.cos(math.pi * done)))
        optimizer.param_groups[0]["lr"] = rate * factor
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent.append(float(loss.detach()))
        if step % max(1, steps // 10) == 0:
            seconds = time.perf_counter() - started
            print(
                f"  step {step}: loss {sum(recent) / len(recent):.4f}, {seconds:.0f} s", flush=True
            )
            recent = []
    model.eval()


def pretrain(options: argparse.Namespace) -> None:
    """Learn the first classes and save the model with its image processor."""
    torch.manual_seed(options.seed)
    model = small_vit(options.width, options.layers)
    processor = ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    with new_folder(options.out, marker="config.json") as folder:
        processor.save_pretrained(folder)
        task = image_task(options, folder, LEARNED)
        data = task.load()
        parameters = sum(p.numel() for p in model.parameters())
        print(f"pretraining {parameters:,} parameters on {len(data.train):,} images")
        train(model, batches(data, options.batch, options.seed), options.steps, options.rate)
        found = task.evaluate(model, data, data.test)
        print(f"the learned classes: test accuracy {found['accuracy']:.4f}")
        model.save_pretrained(folder)


def adapt(options: argparse.Namespace) -> None:
    """A new head, alone and with LoRA, on the other classes."""
    task = image_task(options, options.out, REST)
    data = task.load()
    for name in ("head alone", "head and LoRA r=4"):
        torch.manual_seed(options.seed)
        model: nn.Module = task.load_model()
        if name == "head alone":
            for key, parameter in model.named_parameters():
                parameter.requires_grad_(key.startswith("classifier."))
        else:
            targets = list(find_targets(model, "all-linear"))
            keep = list(task.keep)
            config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=keep)
            model = get_peft_model(model, config)
        print(f"{name}, {len(data.train):,} images")
        train(model, batches(data, options.batch, options.seed), options.adapt_steps, options.rate)
        found = task.evaluate(model, data, data.test)
        print(f"{name}: test accuracy {found['accuracy']:.4f}")


def image_task(options: argparse.Namespace, model: Path, classes: list[int]) -> ImageTask:
    """Some classes of the data."""
    data = str(options.data)
    return ImageTask(
        model=str(model), train=data, test=data, classes=classes, max_test=options.max_test
    )


def main() -> None:
    """Read the options; pretrain, then adapt."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder of the IDX files")
    parser.add_argument("out", type=Path, help="folder for the model")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--adapt-steps", type=int, default=200, help="0: do not adapt")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-test", type=int, default=2000, help="test images of each part")
    options = parser.parse_args()
    pretrain(options)
    if options.adapt_steps:
        adapt(options)


if __name__ == "__main__":
    main()
