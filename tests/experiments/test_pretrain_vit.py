"""The script that pretrains a small vision transformer, on noise and for two steps."""

import importlib.util
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from rankwise.experiments.tasks import ImageTask

SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain_vit.py"


def _write(folder, prefix, count):
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    header = struct.pack(">4B3I", 0, 0, 8, 3, *images.shape)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    labels = (np.arange(count) % 10).astype(np.uint8)
    header = struct.pack(">4BI", 0, 0, 8, 1, count)
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("pretrain_vit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_folder_is_a_model_for_the_other_classes(script, tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "data", tmp_path / "vit"
    data.mkdir()
    _write(data, "train", 800)
    _write(data, "t10k", 50)
    counts = {"steps": 2, "adapt-steps": 1, "batch": 16, "width": 8, "layers": 1, "max-test": 10}
    options = [text for key, value in counts.items() for text in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["pretrain_vit.py", str(data), str(out), *options])
    script.main()
    printed = capsys.readouterr().out
    assert "pretraining" in printed
    assert "head and LoRA r=4: test accuracy" in printed
    task = ImageTask(
        model=str(out), train=str(data), test=str(data), classes=script.REST, max_test=10
    )
    model = task.load_model()
    assert model.classifier.out_features == 4
    assert set(script.LEARNED) | set(script.REST) == set(range(10))
    found = task.evaluate(model, task.load(), task.load().test)
    assert 0 <= found["accuracy"] <= 1
