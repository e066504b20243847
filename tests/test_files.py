from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest

import rankwise.files as files
from rankwise.errors import FileError
from rankwise.files import (
    check_replaceable,
    new_folder,
    parse_json,
    read_json_lines,
    read_tensors,
    read_text,
    write_text,
)


@dataclass
class Point:
    x: int
    label: str = ""


def full_disk(*_args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestReading:
    def test_text(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("grüße", encoding="utf-8")
        assert read_text(tmp_path / "a", "note") == "grüße"

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileError, match=r"note .*nowhere: no such file; check the path"):
            read_text(tmp_path / "nowhere", "note")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileError, match="is a folder; name a file in it"):
            read_text(tmp_path, "note")

    def test_too_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "MAX_TEXT_BYTES", 3)
        (tmp_path / "a").write_text("abc")
        assert read_text(tmp_path / "a", "note") == "abc"
        (tmp_path / "a").write_text("abcd")
        with pytest.raises(FileError, match="4 bytes; at most 3 are read"):
            read_text(tmp_path / "a", "note")

    def test_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"\xff")
        with pytest.raises(FileError, match="UTF-8"):
            read_text(tmp_path / "a", "note")

    def test_json(self) -> None:
        assert parse_json('{"x": 3}', Point, path=Path("p"), what="point") == Point(3)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"x": "3"}', r"^point p: x: .*integer; received '3'\.$"),
            ("{}", r"^point p: x: Field required"),
            ("[1", r"^point p: the top level: Invalid JSON"),
            ('{"x": 1.5, "label": 2}', r"\(and 1 more\)\.$"),
        ],
    )
    def test_json_that_is_something_else(self, text: str, message: str) -> None:
        with pytest.raises(FileError, match=message):
            parse_json(text, Point, path=Path("p"), what="point")

    def test_long_values_are_cut(self) -> None:
        with pytest.raises(FileError) as info:
            parse_json(f'{{"x": "{"y" * 5000}"}}', Point, path=Path("p"), what="point")
        assert len(str(info.value)) < 200

    def test_schema_version(self) -> None:
        newer = '{"x": 3, "schema_version": 2, "a_key_of_tomorrow": 1}'
        with pytest.raises(FileError, match=r"schema_version 2; this version of rankwise reads 1"):
            parse_json(newer, Point, path=Path("p"), what="point", version=1)
        assert parse_json(newer, Point, path=Path("p"), what="point", version=2) == Point(3)

    def test_pickle_is_not_read(self, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(b"\x80\x04\x95" + bytes(200))
        with pytest.raises(FileError, match="not a whole safetensors file"):
            read_tensors(tmp_path / "a.safetensors", "weights")


class TestWritingText:
    def test_new_and_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "a.txt"
        write_text(path, "one")
        write_text(path, "zwei ü")
        assert path.read_text(encoding="utf-8") == "zwei ü"
        assert [p.name for p in path.parent.iterdir()] == ["a.txt"]

    def test_permissions_are_those_of_any_new_file(self, tmp_path: Path) -> None:
        (tmp_path / "plain").touch()
        write_text(tmp_path / "ours", "text")
        modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")}
        assert len(modes) == 1

    @pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        path = tmp_path / "a.txt"
        write_text(path, "one")
        monkeypatch.setattr(os, call, full_disk)
        with pytest.raises(FileError, match=r"a\.txt: cannot be written \(No space left"):
            write_text(path, "two")
        assert path.read_text() == "one"
        assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]

    def test_interrupt_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(_descriptor: int) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_text(tmp_path / "a.txt", "two")
        assert list(tmp_path.iterdir()) == []

    def test_folder_and_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        with pytest.raises(FileError, match="cannot be written"):
            write_text(tmp_path / "folder", "text")
        (tmp_path / "file").write_text("text")
        with pytest.raises(FileError, match="cannot be written"):
            write_text(tmp_path / "file" / "a.txt", "text")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


class TestNewFolder:
    def test_appears_at_the_end(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "result"
        with new_folder(path, marker="m") as new:
            (new / "m").write_text("1")
            (new / "sub").mkdir()
            (new / "sub" / "x").write_text("2")
            assert not path.exists()
        assert (path / "sub" / "x").read_text() == "2"
        assert [p.name for p in path.parent.iterdir()] == ["result"]

    def test_replaces_all_of_an_earlier_one(self, tmp_path: Path) -> None:
        path = tmp_path / "result"
        for name in ("old", "new"):
            with new_folder(path, marker="m") as new:
                (new / "m").write_text(name)
                (new / name).touch()
        assert sorted(p.name for p in path.iterdir()) == ["m", "new"]
        assert [p.name for p in tmp_path.iterdir()] == ["result"]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_error_in_the_block(self, tmp_path: Path, error: type[BaseException]) -> None:
        path = tmp_path / "result"
        with new_folder(path, marker="m") as new:
            (new / "m").write_text("1")
        with pytest.raises(error), new_folder(path, marker="m") as new:
            (new / "m").write_text("2")
            raise error
        assert (path / "m").read_text() == "1"
        assert [p.name for p in tmp_path.iterdir()] == ["result"]

    def test_every_file_reaches_the_disk_first(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: list[int] = []
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(descriptor))
        with new_folder(tmp_path / "result", marker="m") as new:
            (new / "m").write_text("1")
            (new / "sub").mkdir()
            (new / "sub" / "x").write_text("2")
        assert len(synced) == 2

    def test_what_is_not_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("text")
        (tmp_path / "folder").mkdir()
        check_replaceable(tmp_path / "folder", marker="m")
        check_replaceable(tmp_path / "nowhere", marker="m")
        (tmp_path / "folder" / "other").touch()
        with pytest.raises(FileError, match="is a file; name a folder"):
            check_replaceable(tmp_path / "file", marker="m")
        with (
            pytest.raises(FileError, match="holds no m, so it is not replaced"),
            new_folder(tmp_path / "folder", marker="m"),
        ):
            pytest.fail("the block must not run")


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    assert read_json_lines(path) == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'
    path.write_text('{"a": ')
    assert read_json_lines(path) == []
