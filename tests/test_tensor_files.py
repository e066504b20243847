from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rankwise.tensor_files import with_metadata


def test_equal_metadata_gives_equal_bytes_and_leaves_the_tensors(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(5.0), "a": torch.ones(2, 3, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "saved", metadata={"format": "pt"})
    saved = (tmp_path / "saved").read_bytes()
    names = [f"key {i}" for i in range(9)]
    changed = with_metadata(saved, {name: "x" for name in names})
    assert changed == with_metadata(saved, {name: "x" for name in reversed(names)})
    (tmp_path / "changed").write_bytes(changed)
    with safe_open(tmp_path / "changed", framework="pt") as file:
        assert file.metadata() == dict.fromkeys(names, "x")
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), t) for name, t in tensors.items())
