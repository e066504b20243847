"""Paired differences of a comparison's losses, from tiny records."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean

import pytest
import yaml
from scipy import stats

from rankwise.experiments.cell_records import CellRecord
from rankwise.experiments.compare import run_experiment
from rankwise.experiments.config import make_experiment
from script_modules import load_script
from tiny_experiment import write_experiment


def _run(folder: Path, start: str) -> tuple[str, dict[tuple[str, int], CellRecord]]:
    folder.mkdir()
    document = write_experiment(folder, methods=["lora", "rslora"], seeds=[0, 1])
    document["tasks"][0]["start"] = start
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(document))
    records = run_experiment(make_experiment(document)).records()
    return str(file), {(r.label, r.seed): r for r in records if r.phase == "final"}


def test_each_method_less_the_reference_or_itself_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, runs = _run(tmp_path / "plain", "")
    other, started = _run(tmp_path / "started", "the ")
    script = load_script("metric_differences")

    def printed(*more: str) -> dict[str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["metric_differences", file, "lines", "2", *more])
        script.main()
        lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
        return {cells[0]: cells[1:] for cells in lines[2:]}

    def less(label: str, references: dict[tuple[str, int], CellRecord], reference: str) -> float:
        return fmean(
            (runs[label, seed].test or {})["loss"]
            - (references[reference, seed].test or {})["loss"]
            for seed in (0, 1)
        )

    rows = printed()
    assert rows["lora"][3] == "–"
    assert float(rows["rslora"][3].split()[0]) == pytest.approx(
        less("rslora", runs, "lora"), abs=1e-4
    )
    assert rows["lora"][-2:] == ["–", "–"]
    pairs = [
        [(runs[label, seed].test or {})["loss"] for seed in (0, 1)] for label in ("rslora", "lora")
    ]
    p = float(stats.ttest_rel(*pairs).pvalue)
    assert rows["rslora"][-2:] == [f"{p:.2g}", f"{p:.2g}"]
    rows = printed("--against", other)
    uncorrected, corrected = zip(*(map(float, rows[label][-2:]) for label in rows), strict=True)
    assert min(corrected) == pytest.approx(min(1, 2 * min(uncorrected)), rel=0.06)
    for label in ("lora", "rslora"):
        expected = less(label, started, label)
        assert expected != 0
        assert float(rows[label][3].split()[0]) == pytest.approx(expected, abs=1e-4)
    rows = printed("--metric", "perplexity")
    perplexities = [(runs["rslora", seed].test or {})["perplexity"] for seed in (0, 1)]
    assert rows["rslora"][0] == f"{fmean(perplexities):.4f}"
    assert rows["rslora"][2] == f"{max(perplexities):.4f}"
    assert float(rows["rslora"][4].split()[0]) == pytest.approx(
        fmean(
            runs["rslora", seed].validation[-1].metrics["perplexity"]
            - runs["lora", seed].validation[-1].metrics["perplexity"]
            for seed in (0, 1)
        ),
        abs=1e-4,
    )
    with pytest.raises(SystemExit):
        printed("--metric", "bleu")
    assert "no record has a bleu" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        printed("--seeds", "7")
    assert "no record of every seed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        printed("--against", other, "--seeds", "7")
    assert "in both" in capsys.readouterr().err
