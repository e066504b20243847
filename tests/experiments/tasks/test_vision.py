import gzip
import struct

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from rankwise.errors import DataError
from rankwise.experiments.tasks import ClipTask, ImageTask
from rankwise.experiments.tasks.idx import read_idx
from tiny_folder import save_tiny_llama

SIDE = 8


def write_idx(folder, prefix, images, labels):
    """Images and labels as MNIST's files, the labels gzipped."""
    shape = struct.pack(">4B3I", 0, 0, 8, 3, *images.shape)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(shape + images.tobytes())
    packed = gzip.compress(struct.pack(">4BI", 0, 0, 8, 1, len(labels)) + labels.tobytes())
    (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(packed)


@pytest.fixture
def images(tmp_path):
    generator = np.random.default_rng(0)
    folder = tmp_path / "idx"
    folder.mkdir()
    for prefix, count in (("train", 20), ("t10k", 10)):
        pixels = generator.integers(0, 256, (count, SIDE, SIDE), dtype=np.uint8)
        write_idx(folder, prefix, pixels, (np.arange(count) % 5).astype(np.uint8))
    return folder


def _save_processor(folder):
    ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    _save_processor(folder)
    config = ViTConfig(
        image_size=SIDE,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_tiny_llama(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _save_processor(folder)
    tower = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = tower | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 40,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
    }
    vision = tower | {"image_size": SIDE, "patch_size": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(
            CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        ).save_pretrained(folder)
    return str(folder)


class TestIdx:
    def test_pixels_and_labels(self, images):
        rows = read_idx(images, "train")
        raw = (images / "train-images-idx3-ubyte").read_bytes()[16:]
        assert b"".join(row["image"] for row in rows) == raw
        assert rows[7]["size"] == [SIDE, SIDE]
        assert [row["label"] for row in rows] == [i % 5 for i in range(20)]

    def test_what_is_broken(self, images, tmp_path):
        with pytest.raises(DataError, match="'train' and 'test'"):
            read_idx(images, "validation")
        path = images / "t10k-images-idx3-ubyte"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(DataError, match="does not fit"):
            read_idx(images, "test")
        path.write_bytes(b"PNG" + whole)
        with pytest.raises(DataError, match="no IDX"):
            read_idx(images, "test")
        path.unlink()
        with pytest.raises(DataError, match="cannot be read"):
            read_idx(images, "test")

    def test_labels_of_other_images(self, images):
        write_idx(images, "t10k", np.zeros((3, 2, 2), np.uint8), np.zeros(4, np.uint8))
        with pytest.raises(DataError, match="3 images but 4 labels"):
            read_idx(images, "test")


class TestImages:
    @pytest.fixture
    def task(self, vit, images):
        return ImageTask(
            model=vit, train=str(images), test=str(images), classes=[4, 1], validation_rows=2
        )

    def test_chosen_classes_are_numbered_anew(self, task, images):
        data = task.load()
        assert len(data.train) + len(data.validation) == 8
        expected = [row["label"] for row in read_idx(images, "test") if row["label"] in (4, 1)]
        assert [row["labels"] for row in data.test] == [[4, 1].index(label) for label in expected]

    def test_a_test_part_without_any_of_the_classes(self, task, images):
        write_idx(images, "t10k", np.zeros((3, SIDE, SIDE), np.uint8), np.zeros(3, np.uint8))
        with pytest.raises(DataError, match="holds no row to test on that this task can use"):
            task.load()

    def test_pixels_are_made_ready_by_the_models_processor(self, task):
        data = task.load()
        batch = data.collate(data.test[:2])
        pixels = torch.frombuffer(bytearray(data.test[0]["image"]), dtype=torch.uint8)
        expected = (pixels.float().view(SIDE, SIDE) / 255 - 0.5) / 0.25
        torch.testing.assert_close(batch["pixel_values"][0], expected.expand(3, -1, -1))

    def test_a_new_head_of_so_many_classes_and_its_metrics(self, task):
        data, model = task.load(), task.load_model()
        assert model.classifier.out_features == 2
        found = task.evaluate(model, data, data.test)
        batch = data.collate(data.test)
        with torch.no_grad():
            output = model.eval()(**batch)
        hits = (output.logits.argmax(-1) == batch["labels"]).float().mean()
        assert found == pytest.approx({"accuracy": float(hits), "loss": float(output.loss)})

    def test_a_hub_data_set_keeps_its_images_encoded(self, vit, images, monkeypatch):
        import datasets

        pixels = np.arange(3 * 6 * 6 * 3, dtype=np.uint8).reshape(3, 6, 6, 3)
        features = datasets.Features({"img": datasets.Image(), "fine": datasets.Value("int64")})
        made = datasets.Dataset.from_dict({"img": list(pixels), "fine": [0, 1, 0]}, features)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: made)
        task = ImageTask(
            model=vit,
            train="some/set",
            test="some/set",
            image_column="img",
            label_column="fine",
            labels=2,
            validation_rows=1,
        )
        data = task.load()
        assert all(row["image"][:4] == b"\x89PNG" for row in data.test)
        assert data.collate(data.test)["pixel_values"].shape == (3, 3, SIDE, SIDE)
        broken = ImageTask(model=vit, train="some/set", test="some/set", labels=2)
        with pytest.raises(DataError, match="no column 'image'"):
            broken.load()

    def test_classes_must_be_known(self, vit):
        with pytest.raises(DataError, match="labels=0"):
            ImageTask(model=vit, train="a", test="b")
        with pytest.raises(DataError, match="twice"):
            ImageTask(model=vit, train="a", test="b", classes=[1, 1])


class TestClip:
    @pytest.fixture
    def task(self, clip, images):
        return ClipTask(
            model=clip,
            train=str(images),
            test=str(images),
            classes=[0, 1, 2],
            names=["cat", "dog", "ship"],
            validation_rows=2,
        )

    def test_scores_are_clips_own(self, task, clip):
        data, model = task.load(), task.load_model().eval()
        batch = data.collate(data.test)
        prompts = [f"a photo of a {name}." for name in task.names]
        tokens = AutoTokenizer.from_pretrained(clip)(prompts, padding=True, return_tensors="pt")
        reference = CLIPModel.from_pretrained(clip).eval()
        with torch.no_grad():
            expected = reference(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                pixel_values=batch["pixel_values"],
            ).logits_per_image
            found = model(pixel_values=batch["pixel_values"]).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert float(expected.std()) > 0

    def test_its_loss_reaches_the_vision_tower(self, task):
        data, model = task.load(), task.load_model()
        model(**data.collate(data.train)).loss.backward()
        weight = model.vision_model.encoder.layers[0].mlp.fc1.weight
        assert float(weight.grad.abs().sum()) > 0

    def test_names_of_a_hub_data_set(self, clip, monkeypatch):
        import datasets

        label = datasets.ClassLabel(names=["red_fox", "owl", "bee"])
        features = datasets.Features({"image": datasets.Image(), "label": label})
        pixels = [np.zeros((4, 4, 3), np.uint8)] * 3
        made = datasets.Dataset.from_dict({"image": pixels, "label": [0, 1, 2]}, features)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: made)
        options = {"model": clip, "train": "some/set", "test": "some/set"}
        given = ClipTask(**options, names=["bee", "red fox"]).load_model()
        found = ClipTask(**options, classes=[2, 0]).load_model()
        torch.testing.assert_close(found.prompts, given.prompts)
        with pytest.raises(DataError, match="labels=4"):
            ClipTask(**options, labels=4).load_model()

    def test_names_and_template(self, clip):
        with pytest.raises(DataError, match="2 for 3 classes"):
            ClipTask(model=clip, train="a", test="b", classes=[0, 1, 2], names=["x", "y"])
        with pytest.raises(DataError, match="template"):
            ClipTask(model=clip, train="a", test="b", names=["x", "y"], template="a photo")
