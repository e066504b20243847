"""Image classification: a vision transformer with a new head, and CLIP against its own prompts."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    PretrainedConfig,
    PreTrainedModel,
)

from rankwise.errors import DataError
from rankwise.experiments.tasks import scores
from rankwise.experiments.tasks.base import Collate, Task, TaskData, logits_of
from rankwise.experiments.tasks.clip import ClipForPrompts
from rankwise.experiments.tasks.idx import read_idx
from rankwise.experiments.tasks.reading import Row, label_of, load_rows


@dataclass(frozen=True)
class ImageTask(Task):
    """Images and labels on a vision transformer with a new head.

    Images are kept as they are stored and made ready batch by batch by the model's own image
    processor, without augmentation.

    Attributes:
        train: A hub data set id, or a folder of IDX files (`train-images-idx3-ubyte`, perhaps
            `.gz`).
        test: Likewise (`t10k-images-idx3-ubyte`).
        image_column: Of a hub data set.
        label_column: Likewise; a whole number from 0.
        classes: Use only images of these labels, numbered anew in this order; default: all.
        labels: How many classes; with `classes`, their number.
    """

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss")
    keep: ClassVar[tuple[str, ...]] = ("classifier",)

    image_column: str = "image"
    label_column: str = "label"
    classes: list[int] = field(default_factory=list)
    labels: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.classes)) < len(self.classes):
            raise DataError(f"classes={self.classes} holds a label twice.")
        if self.classes:
            object.__setattr__(self, "labels", len(self.classes))
        if self.labels < 2:
            raise DataError(f"labels={self.labels}: say how many classes there are, at least 2.")

    def load_model(self) -> PreTrainedModel:
        """A vision transformer whose head, if of other classes, is drawn anew."""
        names = {label: str(label) for label in range(self.labels)}
        model = AutoModelForImageClassification.from_pretrained(
            self.model,
            dtype=torch.float32,
            id2label=names,
            label2id={name: label for label, name in names.items()},
            ignore_mismatched_sizes=True,
        )
        assert isinstance(model, PreTrainedModel)
        return model

    def blank_model(self, config: PretrainedConfig) -> PreTrainedModel:
        """From its configuration alone."""
        config.num_labels = self.labels
        model = AutoModelForImageClassification.from_config(config)
        assert isinstance(model, PreTrainedModel)
        return model

    def evaluate(self, model: nn.Module, data: TaskData, rows: Sequence[Row]) -> dict[str, float]:
        """Share of images whose class is the likeliest, and the cross-entropy in nats."""
        logits, true = logits_of(model, data, rows), [row["labels"] for row in rows]
        return {
            "accuracy": scores.accuracy(logits.argmax(-1).tolist(), true),
            "loss": float(nn.functional.cross_entropy(logits, torch.tensor(true))),
        }

    def _processor(self) -> Any:
        return AutoImageProcessor.from_pretrained(self.model)

    def _rows(self) -> tuple[list[Row], list[Row]]:
        train = self._images(self.train, self.subset, self.train_split)
        return train, self._images(self.test, self.test_subset or self.subset, self.test_split)

    def _images(self, source: str, subset: str | None, split: str) -> list[Row]:
        folder = Path(source).expanduser()
        if folder.is_dir() and any(folder.glob("*-ubyte*")):
            rows = read_idx(folder, split)
        else:
            rows = self._hub_images(source, subset, split)
        if not self.classes:
            return rows
        places = {label: place for place, label in enumerate(self.classes)}
        return [row | {"label": places[row["label"]]} for row in rows if row["label"] in places]

    def _hub_images(self, source: str, subset: str | None, split: str) -> list[Row]:
        """Encoded images, as the data set stores them, so that many fit into memory."""
        import datasets

        rows = load_rows(source, subset, split)
        for column in (self.image_column, self.label_column):
            if column not in rows.column_names:
                raise DataError(f"{source}: no column {column!r}; it has {rows.column_names}.")
        rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        return [
            {"image": _stored(row[self.image_column]), "label": row[self.label_column]}
            for row in rows
        ]

    def _encode(self, row: Mapping[str, Any], processor: Any) -> Row:
        made = {"image": row["image"], "labels": label_of(row, "label", self.labels)}
        return made | ({"size": row["size"]} if "size" in row else {})

    def _collate(self, processor: Any) -> Collate:
        def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
            images = [_decode(row) for row in rows]
            pixels = processor(images, return_tensors="pt")["pixel_values"]
            return {
                "pixel_values": pixels,
                "labels": torch.tensor([row["labels"] for row in rows]),
            }

        return collate


@dataclass(frozen=True)
class ClipTask(ImageTask):
    """Image classification by CLIP: the image is compared with a prompt for each class.

    Nothing is added to the model: the text tower is run once on the prompts, and the vision tower
    is what adapters adapt. Before training this is CLIP's zero-shot classification.

    Attributes:
        template: A prompt, `{}` standing for the name of a class.
        names: Names of the classes in the labels' order; default: those of the hub data set, with
            spaces for underscores.
    """

    keep: ClassVar[tuple[str, ...]] = ()

    template: str = "a photo of a {}."
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.labels and not self.classes:
            object.__setattr__(self, "labels", len(self.names))
        super().__post_init__()
        if self.names and len(self.names) != self.labels:
            raise DataError(f"names: {len(self.names)} for {self.labels} classes.")
        if "{}" not in self.template:
            raise DataError(f"template={self.template!r} needs a {{}} for the name of a class.")

    def load_model(self) -> PreTrainedModel:
        """CLIP's vision tower, and the features of the prompts as a buffer."""
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        prompts = [self.template.format(name) for name in self.names or self._hub_names()]
        whole = CLIPModel.from_pretrained(self.model, dtype=torch.float32).eval()
        with torch.no_grad():
            pooled = whole.text_model(**tokenizer(prompts, padding=True, return_tensors="pt"))
            features = whole.text_projection(pooled.pooler_output)
        model = ClipForPrompts.from_pretrained(self.model, dtype=torch.float32)
        model.set_prompts(features)
        return model

    def blank_model(self, config: PretrainedConfig) -> PreTrainedModel:
        """From its configuration alone; it knows no prompts."""
        assert isinstance(config, CLIPConfig)
        return ClipForPrompts(config)

    def _hub_names(self) -> list[str]:
        """The names that the data set has for its labels, of `classes` only if there are any."""
        features = load_rows(self.train, self.subset, self.train_split).features
        names = getattr(features.get(self.label_column), "names", None)
        if names is None:
            raise DataError(f"{self.train}: has no names for its labels; give names=.")
        chosen = [names[i] for i in self.classes] if self.classes else list(names)
        if len(chosen) != self.labels:
            raise DataError(f"{self.train}: names {len(chosen)} classes; labels={self.labels}.")
        return [name.replace("_", " ") for name in chosen]


def _stored(image: Any) -> bytes:
    if not isinstance(image, dict):
        raise DataError(f"an image is a {type(image).__name__}, not an image feature.")
    if image.get("bytes") is not None:
        return bytes(image["bytes"])
    return Path(image["path"]).read_bytes()


def _decode(row: Row) -> Any:
    """An RGB image of encoded bytes, or of grey pixels where a size is given."""
    from PIL import Image

    if "size" in row:
        height, width = row["size"]
        return Image.frombytes("L", (width, height), row["image"]).convert("RGB")
    return Image.open(io.BytesIO(row["image"])).convert("RGB")
