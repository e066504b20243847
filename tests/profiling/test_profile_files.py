from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rankwise.profiling.profile as profile_module
from adapter_fuzzer import fuzz_files
from rankwise.errors import FileError
from rankwise.profiling import GradientProfile, profile_gradients
from tiny_models import tiny_llama, token_batch

NAME = "model.layers.0.self_attn.k_proj"


@pytest.fixture(scope="module")
def profile() -> GradientProfile:
    return profile_gradients(
        tiny_llama(), [token_batch([9, 6])], ["k_proj", "up_proj"], batches=1, keep_gradients=True
    )


@pytest.fixture
def folder(profile: GradientProfile, tmp_path: Path) -> Path:
    profile.save(tmp_path / "profile")
    return tmp_path / "profile"


def assert_equal(first: GradientProfile, second: GradientProfile) -> None:
    assert first.modules == second.modules
    assert list(first.modules) == list(second.modules)
    assert first.provenance == second.provenance
    assert first.gid == second.gid
    for name, values in first.singular_values.items():
        assert torch.equal(values, second.singular_values[name])
        assert values.dtype == second.singular_values[name].dtype
    assert (first.gradients is None) == (second.gradients is None)
    for name, gradient in (first.gradients or {}).items():
        assert second.gradients is not None
        assert torch.equal(gradient, second.gradients[name])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class TestRoundtrip:
    def test_with_gradients(self, profile: GradientProfile, folder: Path) -> None:
        assert_equal(profile, GradientProfile.load(folder))
        assert sorted(contents(folder)) == [
            "gradients.safetensors", "profile.json", "spectra.safetensors",
        ]  # fmt: skip

    def test_without_gradients(self, profile: GradientProfile, tmp_path: Path) -> None:
        plain = GradientProfile(profile.modules, profile.singular_values, profile.provenance)
        plain.save(str(tmp_path / "a" / "b"))
        assert_equal(plain, GradientProfile.load(str(tmp_path / "a" / "b")))

    def test_replacing_leaves_nothing_of_the_earlier_one(
        self, profile: GradientProfile, folder: Path
    ) -> None:
        plain = GradientProfile(profile.modules, profile.singular_values, profile.provenance)
        plain.save(folder)
        assert_equal(plain, GradientProfile.load(folder))
        assert sorted(contents(folder)) == ["profile.json", "spectra.safetensors"]
        assert [p.name for p in folder.parent.iterdir()] == ["profile"]

    def test_saving_twice_gives_the_same_bytes(
        self, profile: GradientProfile, folder: Path
    ) -> None:
        before = contents(folder)
        GradientProfile.load(folder).save(folder)
        assert contents(folder) == before

    def test_empty_folder_is_used(self, profile: GradientProfile, tmp_path: Path) -> None:
        (tmp_path / "new").mkdir()
        profile.save(tmp_path / "new")
        assert_equal(profile, GradientProfile.load(tmp_path / "new"))


class TestWhatIsNotOverwritten:
    def test_folder_of_something_else(self, profile: GradientProfile, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(FileError, match=r"holds no profile\.json, so it is not replaced"):
            profile.save(tmp_path)
        assert contents(tmp_path) == {"thesis.tex": b"years of work"}

    def test_profile_to_which_something_was_added(
        self, profile: GradientProfile, folder: Path
    ) -> None:
        (folder / "plan.json").write_text("mine")
        before = contents(folder)
        with pytest.raises(FileError, match=r"holds plan\.json, which rankwise did not write"):
            profile.save(folder)
        assert contents(folder) == before

    def test_file(self, profile: GradientProfile, tmp_path: Path) -> None:
        path = tmp_path / "profile"
        path.write_text("text")
        with pytest.raises(FileError, match="is a file; name a folder"):
            profile.save(path)
        assert path.read_text() == "text"


def full_disk(*_args: object, **_kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestFullDisk:
    @pytest.mark.parametrize("call", ["save_file", "fsync", "write_text", "mkdtemp"])
    @pytest.mark.parametrize("earlier", [False, True])
    def test_everything_stays_as_it_was(
        self,
        profile: GradientProfile,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        call: str,
        earlier: bool,
    ) -> None:
        folder = tmp_path / "profile"
        if earlier:
            profile.save(folder)
        before = contents(tmp_path)
        where: dict[str, Any] = {
            "save_file": profile_module,
            "fsync": os,
            "write_text": Path,
            "mkdtemp": "tempfile",
        }
        if call == "mkdtemp":
            monkeypatch.setattr("tempfile.mkdtemp", full_disk)
        else:
            monkeypatch.setattr(where[call], call, full_disk)
        with pytest.raises(FileError, match=r"No space left.*nothing was changed.*Free some space"):
            profile.save(folder)
        monkeypatch.undo()
        assert contents(tmp_path) == before
        assert [p.name for p in tmp_path.iterdir()] == (["profile"] if earlier else [])
        if earlier:
            assert_equal(profile, GradientProfile.load(folder))

    @pytest.mark.parametrize("failing", [0, 1])
    def test_failing_rename_puts_the_earlier_one_back(
        self,
        profile: GradientProfile,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        failing: int,
    ) -> None:
        before, rename, calls = contents(folder), os.rename, iter(range(10))

        def fail_once(source: Any, target: Any) -> None:
            if next(calls) == failing:
                full_disk()
            rename(source, target)

        monkeypatch.setattr(os, "rename", fail_once)
        with pytest.raises(FileError, match="No space left"):
            profile.save(folder)
        assert contents(folder) == before
        assert [p.name for p in folder.parent.iterdir()] == ["profile"]

    def test_interrupt_leaves_no_temporary_files(
        self, profile: GradientProfile, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_args: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(profile_module, "save_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            profile.save(folder)
        assert [p.name for p in folder.parent.iterdir()] == ["profile"]
        assert_equal(profile, GradientProfile.load(folder))


def edit_json(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "profile.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_arrays(folder: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    arrays = load_file(folder / file)
    change(arrays)
    save_file(arrays, folder / file)


def test_broken_bytes_give_our_errors_only(folder: Path, tmp_path: Path) -> None:
    outcomes = fuzz_files(GradientProfile.load, folder, tmp_path / "broken", runs=150, seed=0)
    assert outcomes["FileError"] > 90
    assert set(outcomes) <= {"FileError", "loaded"}


class TestBadFiles:
    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileError, match=r"profile\.json: no such file"):
            GradientProfile.load(tmp_path / "nowhere")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda d: d.update(schema_version=1), "schema_version 1; .*reads 2"),
            (lambda d: d.update(extra=1), "extra: Unexpected keyword"),
            (lambda d: d.pop("provenance"), "provenance: Field required"),
            (lambda d: d["provenance"].update(colour="red"), r"provenance\.colour: Unexpected"),
            (lambda d: d["provenance"].update(batches=0), r"provenance\.batches: .*greater than 0"),
            (lambda d: d["provenance"].update(tokens="7"), r"provenance\.tokens: .*integer"),
            (lambda d: d["provenance"].update(model=None), r"provenance\.model: .*string"),
            (lambda d: d["modules"][NAME].update(d_in=0), rf"modules\.{NAME}\.d_in: "),
            (lambda d: d["modules"][NAME].update(d_in=17), "(?s)k_proj.*shape"),
            (lambda d: d["modules"][NAME].update(sensitivity=float("nan")), r"sensitivity: "),
            (lambda d: d["modules"][NAME].update(gradient_norm=float("inf")), r"gradient_norm: "),
            (lambda d: d["modules"][NAME].update(sensitivity=-1.0), r"sensitivity: "),
            (lambda d: d["modules"][NAME].update(rank=3), r"rank: Unexpected"),
            (lambda d: d["modules"][NAME].pop("rows"), r"rows: Field required"),
            (lambda d: d["modules"].clear(), "names no module; profile again"),
            (lambda d: d["modules"].pop(NAME), f"unknown module '{NAME}'"),
            (lambda d: d["modules"].update(ghost=d["modules"][NAME]), "no array for module ghost"),
        ],
    )
    def test_document(
        self, folder: Path, change: Callable[[dict[str, Any]], object], message: str
    ) -> None:
        edit_json(folder, change)
        before = contents(folder)
        with pytest.raises(FileError, match=message) as info:
            GradientProfile.load(folder)
        assert str(folder) in str(info.value)
        assert "\n" not in str(info.value)
        assert contents(folder) == before

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"schema_version": 1}'])
    def test_text_that_is_no_profile(self, folder: Path, text: str) -> None:
        (folder / "profile.json").write_text(text)
        with pytest.raises(FileError, match=r"profile\.json: "):
            GradientProfile.load(folder)

    def test_text_that_is_no_utf8(self, folder: Path) -> None:
        (folder / "profile.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(FileError, match="UTF-8"):
            GradientProfile.load(folder)

    @pytest.mark.parametrize("file", ["spectra.safetensors", "gradients.safetensors"])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda a: a[NAME].view(-1)[0].fill_(float("nan")), "not finite"),
            (lambda a: a[NAME].view(-1)[0].fill_(float("inf")), "not finite"),
            (lambda a: a.update({NAME: a[NAME].long()}), "holds no floats"),
            (lambda a: a.update({NAME: a[NAME][:-1].clone()}), r"has shape \(.*, expected \("),
            (lambda a: a.update({NAME: a[NAME][None].clone()}), r"has shape \(1, .*, expected \("),
            (lambda a: a.pop(NAME), f"no array for module {NAME}"),
            (lambda a: a.update(ghost=torch.zeros(2)), "unknown module 'ghost'"),
        ],
    )
    def test_arrays(
        self, folder: Path, file: str, change: Callable[[dict[str, Any]], object], message: str
    ) -> None:
        edit_arrays(folder, file, change)
        with pytest.raises(FileError, match=message) as info:
            dict(GradientProfile.load(folder).gradients or {})  # values are checked when read
        assert str(folder / file) in str(info.value)

    def test_negative_singular_value(self, folder: Path) -> None:
        edit_arrays(folder, "spectra.safetensors", lambda a: a[NAME][-1].fill_(-1.0))
        with pytest.raises(FileError, match="negative"):
            GradientProfile.load(folder)

    @pytest.mark.parametrize("file", ["spectra.safetensors", "gradients.safetensors"])
    @pytest.mark.parametrize("size", [0, 4, 8, 40, -1])
    def test_truncated_arrays(self, folder: Path, file: str, size: int) -> None:
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[:size])
        with pytest.raises(FileError, match="not a whole safetensors file"):
            GradientProfile.load(folder)

    def test_over_long_header(self, folder: Path) -> None:
        path = folder / "spectra.safetensors"
        path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
        with pytest.raises(FileError, match="not a whole safetensors file"):
            GradientProfile.load(folder)

    def test_missing_arrays(self, folder: Path) -> None:
        (folder / "spectra.safetensors").unlink()
        with pytest.raises(FileError, match=r"spectra\.safetensors: no such file"):
            GradientProfile.load(folder)
