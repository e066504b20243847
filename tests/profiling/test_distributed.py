"""Two workers (gloo, CPU) end with one profile, that of one process, and fail together."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankwise.errors import ProfileError
from rankwise.profiling import GradientProfile, profile_gradients
from tiny_folder import save_tiny_llama, write_texts
from tiny_models import tiny_llama, token_batch

SCRIPT = Path(__file__).with_name("worker_process.py")
_spec = importlib.util.spec_from_file_location("worker_process", SCRIPT)
assert _spec is not None and _spec.loader is not None
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)

Found = dict[str, Any]
ARRAYS = ("singular_values", "gradients", "gram", "convergence")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two workers have left what they found."""
    place = tmp_path_factory.mktemp("workers")
    save_tiny_llama(place / "model")
    write_texts(place / "train.jsonl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(SCRIPT.parents[1]), *filter(None, sys.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(port), place],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in workers]
    finally:
        for process in workers:
            process.kill()
    assert [process.returncode for process in workers] == [0, 3], errors
    return place


@pytest.fixture(scope="module")
def found(folder: Path) -> list[Found]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same_bits(one: Found, other: Found) -> None:
    assert one["modules"] == other["modules"]
    assert one["provenance"] == other["provenance"]
    assert one["seconds"] == other["seconds"]
    for kind in ARRAYS:
        assert (one[kind] is None) == (other[kind] is None)
        for name, array in (one[kind] or {}).items():
            assert torch.equal(array, other[kind][name]), (kind, name)


def assert_close(found: Found, expected: Found) -> None:
    assert found["provenance"] == expected["provenance"]
    assert list(found["modules"]) == list(expected["modules"])
    for name, module in expected["modules"].items():
        for key, value in module.items():
            near = value if value is None else pytest.approx(value, rel=1e-5)
            assert found["modules"][name][key] == near, (name, key)
    for kind in ARRAYS:
        assert (found[kind] is None) == (expected[kind] is None), kind
        for name, array in (expected[kind] or {}).items():
            error = (found[kind][name] - array).norm()
            assert float(error) <= 1e-5 * float(array.norm()), (kind, name)


@pytest.mark.parametrize("name", worker.EQUAL)
def test_equals_one_process(name: str, found: list[Found]) -> None:
    assert_same_bits(found[0][name], found[1][name])
    assert_close(found[0][name], worker.contents(worker.EQUAL[name]()))


@pytest.mark.parametrize("name", ["sharded", "wrapped"])
def test_other_ways_to_the_same_profile(name: str, found: list[Found]) -> None:
    for one in found:
        assert_same_bits(one[name] | {"seconds": 0}, found[0]["all-sweep"] | {"seconds": 0})


def test_a_distributed_sampler_is_recognised(found: list[Found]) -> None:
    batches = [token_batch([6], seed=i) for i in range(4)]
    expected = profile_gradients(tiny_llama(), batches, batches=4, keep_gradients=True)
    assert_same_bits(found[0]["sampler"], found[1]["sampler"])
    assert_close(found[0]["sampler"], worker.contents(expected))


def test_all_give_up_the_sweep_when_one_does(found: list[Found]) -> None:
    assert found[0]["all-sweep"]["provenance"]["engine"] == "sweep"
    for one in found:
        assert one["one_unsuitable"]["provenance"]["engine"] == "hooks"
    assert_same_bits(found[0]["one_unsuitable"], found[1]["one_unsuitable"])


def test_a_batch_dropped_anywhere_is_counted_everywhere(found: list[Found]) -> None:
    for one in found:
        assert one["dropped-hooks"]["provenance"]["dropped_batches"] == [5]
        assert one["dropped-sweep"]["provenance"]["dropped_batches"] == [5]
        assert one["mean-sweep"]["provenance"]["dropped_batches"] == [2]
        assert one["unlabelled"]["provenance"]["unlabelled_batches"] == [0, 3]


def test_the_first_worker_writes(found: list[Found], folder: Path) -> None:
    written = worker.contents(GradientProfile.load(folder / "saved"))
    assert_same_bits(written, found[0]["on_disk"])
    assert found[1]["on_disk"]["gradients"] is None
    for name, gradient in found[0]["all-sweep"]["gradients"].items():
        assert torch.equal(written["gradients"][name], gradient)


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("loss", ["worker 1 failed.*a loss that fails", "ValueError: a loss that fails"]),
        ("loss-sweep", ["ValueError: a loss that fails", "worker 0 failed.*a loss that fails"]),
        ("targets", ["worker 1 failed.*nothing", "TargetError"]),
        ("settings", ["worker 1 has batches 5, worker 0 has 4"] * 2),
        ("model", ["worker 1 has model '.*', worker 0 has '"] * 2),
        ("loader", ["worker 0 and worker 1 give different batches.*distributed='sharded'"] * 2),
        ("too-many-dropped", ["more than 10%.*batch 1, 4"] * 2),
        ("zero", ["none of the 4 batches has a labelled item"] * 2),
        ("fsdp", ["sharded over workers.*profile before the model is sharded"] * 2),
        ("disk", ["is a file; name a folder", "worker 0 failed.*is a file; name a folder"]),
    ],
)
def test_all_fail_together(name: str, messages: list[str], found: list[Found]) -> None:
    for one, message in zip(found, messages, strict=True):
        with pytest.raises(ProfileError, match=message):
            raise ProfileError(one[name])


def test_the_command_prints_and_saves_once(found: list[Found], folder: Path) -> None:
    profile = GradientProfile.load(folder / "command")
    assert profile.provenance.batches == 3
    assert found[0]["cli"].strip() == str(profile)
    assert found[1]["cli"] == ""


def test_they_are_in_step_after_failures(found: list[Found]) -> None:
    assert_same_bits(found[0]["again"] | {"seconds": 0}, found[1]["mean-hooks"] | {"seconds": 0})


def test_a_worker_that_dies_is_an_error_for_the_other(folder: Path) -> None:
    assert "connection to another worker broke" in (folder / "survivor.txt").read_text()


class FullyShardedDataParallel(nn.Module):
    """Has the name of torch's wrapper, which cannot be made without workers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class TestWithoutAGroup:
    def test_fsdp_is_refused(self) -> None:
        with pytest.raises(ProfileError, match="profile before wrapping it"):
            profile_gradients(FullyShardedDataParallel(tiny_llama()), [token_batch([5])])

    def test_workers_without_a_process_group(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ProfileError, match=r"WORLD_SIZE=2 and no process group.*'off'"):
            profile_gradients(tiny_llama(), [token_batch([5])])
        profile = profile_gradients(tiny_llama(), [token_batch([5])], distributed="off")
        assert profile.provenance.batches == 1

    def test_unknown_or_impossible_wishes(self) -> None:
        with pytest.raises(ProfileError, match=r"distributed='splt'.*did you mean 'split'"):
            profile_gradients(tiny_llama(), [token_batch([5])], distributed="splt")  # type: ignore
        with pytest.raises(ProfileError, match="no process group"):
            profile_gradients(tiny_llama(), [token_batch([5])], distributed="split")
