"""Profiles written while they are measured: gradients one by one, whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import rankwise.profiling.keep as keep_module
from rankwise.errors import FileError
from rankwise.profiling import BatchLoss, GradientProfile, model_loss, profile_gradients
from rankwise.tensor_files import ArrayLayout, LazyTensors, TensorWriter
from tiny_models import Batch, tiny_llama, token_batch

BATCHES = [token_batch([6, 4], seed=i) for i in range(3)]


def measure(**options: Any) -> GradientProfile:
    settings: dict[str, Any] = {"batches": 3, "keep_gradients": True}
    return profile_gradients(tiny_llama(), BATCHES, **(settings | options))


@pytest.mark.parametrize("engine", ["hooks", "sweep"])
@pytest.mark.parametrize("keep_gradients", [True, False])
def test_equals_a_profile_saved_afterwards(
    tmp_path: Path, engine: str, keep_gradients: bool
) -> None:
    options = {"engine": engine, "keep_gradients": keep_gradients, "statistics": ("gram",)}
    streamed = measure(out=tmp_path / "streamed", **options)
    plain = measure(**options)
    plain.save(tmp_path / "plain")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert sorted(path.name for path in (tmp_path / "streamed").iterdir()) == names
    assert ("gradients.safetensors" in names) == keep_gradients
    for name in set(names) - {"profile.json"}:
        written = (tmp_path / "streamed" / name).read_bytes()
        assert written == (tmp_path / "plain" / name).read_bytes()
    assert streamed.modules == plain.modules
    assert GradientProfile.load(tmp_path / "streamed").provenance == streamed.provenance
    assert list(streamed.gradients or ()) == list(plain.gradients or ())


def test_only_one_gradient_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a module comes, those before it are on the disk and nowhere else."""
    seen: list[str] = []
    write = TensorWriter.write

    def spy(self: TensorWriter, name: str, tensor: torch.Tensor) -> None:
        seen.append(name)
        write(self, name, tensor)

    monkeypatch.setattr(TensorWriter, "write", spy)
    profile = measure(out=tmp_path / "p", engine="sweep")
    assert seen[0].startswith("model.layers.1.") and seen[-1].startswith("model.layers.0.")
    assert isinstance(profile.gradients, LazyTensors)


def interrupted_loader(error: BaseException) -> Iterator[Batch]:
    yield BATCHES[0]
    raise error


def failing_loss(error: BaseException) -> Any:
    calls = iter([0, 1])

    def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
        if next(calls):
            raise error
        return model_loss(model, batch)

    return loss_fn


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ValueError("mine"), FileNotFoundError("the user's own file")]
)
def test_a_failure_leaves_nothing(tmp_path: Path, error: BaseException, earlier: bool) -> None:
    out = tmp_path / "profile"
    if earlier:
        measure(out=out)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(type(error)):
        measure(out=out, loss_fn=failing_loss(error))
    with pytest.raises(type(error)):
        profile_gradients(
            tiny_llama(), interrupted_loader(error), batches=3, out=out, keep_gradients=True
        )
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == (["profile"] if earlier else [])


@pytest.mark.parametrize("moment", ["write", "close", "publish"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(keep_module if moment == "publish" else TensorWriter, moment, full)
    with pytest.raises(FileError, match=r"No space left.*nothing was changed"):
        measure(out=tmp_path / "profile")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_is_found_before_measuring(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileError, match=r"holds no profile\.json, so it is not replaced"):
        profile_gradients(tiny_llama(), interrupted_loader(AssertionError()), out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "profile.json").write_text("{}")
    with pytest.raises(FileError, match=r"holds thesis\.tex, which rankwise did not write there"):
        profile_gradients(tiny_llama(), interrupted_loader(AssertionError()), out=tmp_path)


class TestTensorFiles:
    LAYOUT = {  # noqa: RUF012
        "a": ArrayLayout((2, 3), torch.float32),
        "bb": ArrayLayout((3,), torch.float64),
        "empty": ArrayLayout((0, 4), torch.float32),
    }

    def test_written_in_any_order_and_again(self, tmp_path: Path) -> None:
        writer = TensorWriter(tmp_path / "x.safetensors", self.LAYOUT)
        tensors = {name: torch.randn(array.shape) for name, array in self.LAYOUT.items()}
        for name in ("bb", "a", "bb", "empty"):
            writer.write(name, torch.zeros(self.LAYOUT[name].shape))
        for name, tensor in reversed(tensors.items()):
            writer.write(name, tensor)
        writer.close()
        read = load_file(tmp_path / "x.safetensors")
        lazy = LazyTensors(tmp_path / "x.safetensors", "arrays")
        assert lazy.layout == self.LAYOUT
        for name, tensor in tensors.items():
            assert torch.equal(read[name], tensor.to(self.LAYOUT[name].dtype))
            assert torch.equal(lazy[name], read[name])

    def test_what_is_missing_or_misshapen_is_said(self, tmp_path: Path) -> None:
        writer = TensorWriter(tmp_path / "x.safetensors", self.LAYOUT)
        with pytest.raises(ValueError, match=r"a: shape \(3, 2\), laid out as \(2, 3\)"):
            writer.write("a", torch.zeros(3, 2))
        with pytest.raises(ValueError, match="not written: a, bb, empty"):
            writer.close()

    def test_a_replaced_file_is_still_the_one_that_was_opened(self, tmp_path: Path) -> None:
        first = measure(out=tmp_path / "p", targets=["k_proj"])
        name = next(iter(first.modules))
        assert first.gradients is not None
        before = first.gradients[name].clone()
        measure(out=tmp_path / "p", targets=["k_proj"], batches=1)
        again = GradientProfile.load(tmp_path / "p")
        assert again.gradients is not None
        assert torch.equal(first.gradients[name], before)
        assert not torch.equal(again.gradients[name], before)
        assert "absent" not in first.gradients
