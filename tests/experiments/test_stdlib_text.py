from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankwise.errors import DataError
from rankwise.experiments.stdlib_text import FILE_BYTES, TextFiles, write_stdlib_text

BODY = "x = 1  # padding\n" * 100


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def modules(files: TextFiles) -> tuple[list[str], list[str]]:
    train, held_out = ([row["module"] for row in rows(path)] for path in files)
    return train, held_out


def top_level(names: list[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "library"
    for name in ("abc", "ast", "bdb", "cmd", "copy", "csv", "dis", "glob", "gzip", "heapq", "json"):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text(f"# {name}\n{BODY}")
        (root / name / "inner.py").write_text(f"# {name}.inner\n{BODY}")
    return root


def test_no_module_is_on_both_sides(tmp_path: Path) -> None:
    train, held_out = modules(write_stdlib_text(tmp_path))
    assert len(train) > 300
    assert len(held_out) > 10
    assert not top_level(train) & top_level(held_out)
    assert "json.decoder" in train + held_out
    assert len(set(train + held_out)) == len(train + held_out)


def test_tests_tables_and_installed_packages_are_left_out(tmp_path: Path) -> None:
    train, held_out = modules(write_stdlib_text(tmp_path))
    unwanted = {"test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "pytest"}
    assert not [name for name in train + held_out if unwanted & set(name.split("."))]


def test_rows_hold_the_source_text(tmp_path: Path, library: Path) -> None:
    files = write_stdlib_text(tmp_path, held_out_fraction=0.5, source=library)
    texts = {row["module"]: row["text"] for path in files for row in rows(path)}
    assert len(texts) == 22
    assert texts["json"] == f"# json\n{BODY}"
    assert texts["json.inner"] == f"# json.inner\n{BODY}"


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_split(
    tmp_path: Path, library: Path
) -> None:
    def written(folder: str, seed: int) -> list[bytes]:
        files = write_stdlib_text(
            tmp_path / folder, held_out_fraction=0.5, max_bytes=30_000, seed=seed, source=library
        )
        return [path.read_bytes() for path in files]

    assert written("a", 0) == written("b", 0) != written("c", 1)


def test_max_bytes_bounds_the_source_text_of_each_side(tmp_path: Path) -> None:
    files = write_stdlib_text(tmp_path, held_out_fraction=0.2, max_bytes=500_000)
    train, held_out = (sum(len(row["text"].encode()) for row in rows(path)) for path in files)
    assert 300_000 < train <= 400_000
    assert 50_000 < held_out <= 100_000


def test_a_limit_drops_files_without_moving_one_to_the_other_side(
    tmp_path: Path, library: Path
) -> None:
    everything = modules(write_stdlib_text(tmp_path, held_out_fraction=0.5, source=library))
    some = modules(
        write_stdlib_text(tmp_path, held_out_fraction=0.5, max_bytes=20_000, source=library)
    )
    assert set(some[0]) < set(everything[0])
    assert set(some[1]) < set(everything[1])


def test_unusable_files_are_skipped(tmp_path: Path, library: Path) -> None:
    (library / "json" / "latin.py").write_bytes(b"# caf\xe9\n" + BODY.encode())
    (library / "json" / "short.py").write_text("x = 1\n")
    (library / "json" / "table.py").write_text("x = 1\n" * FILE_BYTES.stop)
    (library / "json" / "tests").mkdir()
    (library / "json" / "tests" / "case.py").write_text(BODY)
    (library / "sitecustomize.py").write_text(BODY)
    (library / "site-packages").mkdir()
    (library / "site-packages" / "json.py").write_text(BODY)
    train, held_out = modules(write_stdlib_text(tmp_path, held_out_fraction=0.5, source=library))
    assert len(train + held_out) == 22


def test_a_folder_without_sources_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 source files to train on and 0 to hold out"):
        write_stdlib_text(tmp_path / "out", source=tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_outside_0_and_1_is_refused(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ValueError, match="held_out_fraction"):
        write_stdlib_text(tmp_path, held_out_fraction=fraction)


def test_a_limit_that_is_not_positive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_bytes=0"):
        write_stdlib_text(tmp_path, max_bytes=0)
