"""Two thousand modules, with spectra as long as a real model's."""

from __future__ import annotations

import time
from pathlib import Path

from rankwise.methods import LsLora, RaLora
from rankwise.report import write_report
from report_samples import make_profile, save_adapter, save_run


def test_two_thousand_modules_are_quick_and_small(tmp_path: Path) -> None:
    profile = make_profile(layers=667, more=True, size=16)
    assert len(profile.modules) == 2002
    plan = RaLora(r=4).plan(profile)
    save_run(tmp_path / "run", plan, profile)
    save_adapter(tmp_path / "run" / "adapter", plan)
    LsLora(r=4).plan(profile).save(tmp_path / "ls.json")
    out = tmp_path / "report.html"
    started = time.process_time()
    write_report([tmp_path / "run", tmp_path / "ls.json"], out)
    assert time.process_time() - started < 10
    assert out.stat().st_size < 12_000_000
