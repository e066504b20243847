"""One recogniser tells plans, profiles, runs, records and adapters apart by their content."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankwise.artifacts import load_run, recognise
from rankwise.errors import FileError
from rankwise.methods import RaLora
from report_samples import make_profile, save_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    profile = make_profile()
    return save_run(tmp_path / "run", RaLora(r=4).plan(profile), profile)


def test_every_kind_is_recognised_by_content(run: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "anything.txt"
    renamed.write_bytes((run / "plan.json").read_bytes())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert recognise(run) == "run"
    assert recognise(run / "record.json") == "record"
    assert recognise(run / "profile") == "profile"
    assert recognise(renamed) == "plan"
    assert recognise(adapter) == "adapter"


def test_a_file_of_a_profile_names_its_folder(run: Path) -> None:
    with pytest.raises(FileError, match="name its folder"):
        recognise(run / "profile" / "profile.json")


def test_a_run_without_plan_and_profile_is_its_record(run: Path) -> None:
    whole = load_run(run)
    assert whole.plan is not None
    assert whole.profile is not None
    (run / "plan.json").unlink()
    (run / "profile" / "profile.json").unlink()
    bare = load_run(run)
    assert (bare.record, bare.plan, bare.profile) == (whole.record, None, None)


def test_a_missing_path_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file") as caught:
        recognise(tmp_path / "nothing")
    assert "JSON" not in str(caught.value)
