"""Comparisons as the report shows them: the file's numbers, in order, with what its tests say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankwise.artifacts import recognise
from rankwise.errors import FileError
from rankwise.report import write_report
from report_samples import Page, numbers
from training_samples import make_results


def report_of(folder: Path, results: Any) -> tuple[Page, Any, str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    text = write_report([folder], folder / "page.html")
    return Page(folder / "page.html"), json.loads((folder / "page.json").read_text()), text


def test_the_page_and_the_json_hold_the_file(tmp_path: Path) -> None:
    results = make_results()
    page, document, text = report_of(tmp_path / "compare", results)
    [shown] = document["comparisons"]
    assert page.data("report") == document
    assert set(page.values) <= numbers(document)
    for row, given in zip(shown["rows"], results["rows"], strict=True):
        for key, value in row.items():
            if key not in ("against", "parameters"):
                assert value == given.get(key, value), key
        if given.get("against"):
            for key, value in row["against"].items():
                assert value == given["against"][key]
    assert (
        "small comparison: 40 of 40 runs finished, 1.25 hours of computing on a processor" in text
    )
    assert "cola at the budget of r = 2: the best mean matthews is 0.6328 (slow <b>one</b>)" in text
    assert "sums at the budget of r = 8: the best mean loss is 0.5312 (lora)" in text
    assert "1 of 2 methods differ from lora after Holm's correction (p < 0.05): RaLoRA." in text
    assert "widen the grid of learning rates, at whose edge slow <b>one</b> ended" in text
    assert "MoRA: not available: no code." in page.text
    assert page.source.count("slow <b>one</b>") == 0


def test_rows_are_in_order_of_the_mean(tmp_path: Path) -> None:
    page, _, _ = report_of(tmp_path / "compare", make_results())
    heads = [part.split("</th>")[0] for part in page.source.split('<th scope="row">')[1:]]
    assert heads[:3] == ["slow &lt;b&gt;one&lt;/b&gt;", "RaLoRA", "lora"]  # higher is better
    assert heads[6:9] == ["lora", "RaLoRA", "slow &lt;b&gt;one&lt;/b&gt;"]


def test_the_plot_draws_means_and_intervals_over_the_budgets(tmp_path: Path) -> None:
    page, document, _ = report_of(tmp_path / "compare", make_results())
    variants = page.data("figures")["plots"]["parameters"]
    assert [v["label"] for v in variants] == ["cola", "sums"]
    rows = document["comparisons"][0]["rows"]
    traces = variants[0]["figure"]["data"]
    assert [t["name"] for t in traces] == ["lora", "RaLoRA", "slow &lt;b&gt;one&lt;/b&gt;"]
    for trace, label in zip(traces, ("lora", "RaLoRA", "slow <b>one</b>"), strict=True):
        own = [r for r in rows if (r["task"], r["label"]) == ("cola", label)]
        assert [size for _, size in trace["customdata"]] == [r["parameters"] for r in own]
        assert trace["x"] == pytest.approx([r["parameters"] for r in own], rel=0.04)
        assert trace["y"] == [r["summary"]["mean"] for r in own]
        assert trace["error_y"]["array"] == trace["error_y"]["arrayminus"] == [0.03125] * 2
    shifted = [math.log(t["x"][0] / t["customdata"][0][1]) for t in traces]
    assert shifted == pytest.approx([-0.03, 0, 0.03]), "intervals of one size hide each other"
    assert "higher is better" in variants[0]["reading"]
    assert "lower is better" in variants[1]["reading"]


def test_every_seed_and_mean_stands_in_its_methods_row(tmp_path: Path) -> None:
    page, document, _ = report_of(tmp_path / "compare", make_results())
    variants = page.data("figures")["plots"]["methods"]
    assert [v["label"] for v in variants] == [
        "cola, r = 2",
        "cola, r = 8",
        "sums, r = 2",
        "sums, r = 8",
    ]
    rows = [r for r in document["comparisons"][0]["rows"] if (r["task"], r["rank"]) == ("cola", 8)]
    goal, seeds, means = variants[1]["figure"]["data"]
    named = {row["label"].replace("<", "&lt;").replace(">", "&gt;"): row for row in rows}
    assert [means["y"][0], len(means["y"])] == ["slow &lt;b&gt;one&lt;/b&gt;", 3]
    for label, mean, up in zip(means["y"], means["x"], means["error_x"]["array"], strict=True):
        summary = named[label]["summary"]
        assert (mean, up) == (summary["mean"], summary["high"] - summary["mean"])
    expected = {(s, label, v) for label, row in named.items() for s, v in row["values"].items()}
    assert set(zip(seeds["customdata"], seeds["y"], seeds["x"], strict=True)) == expected
    assert goal["x"] == [named["lora"]["summary"]["mean"]] * 2
    low, high = variants[1]["figure"]["layout"]["xaxis"]["range"]
    assert low < min(seeds["x"]) and max(seeds["x"]) < high
    assert variants[1]["figure"]["layout"]["yaxis"]["categoryarray"][-1] == means["y"][0]


def test_one_budget_has_no_plot_of_parameters(tmp_path: Path) -> None:
    results = make_results()
    results["rows"] = [row for row in results["rows"] if row["rank"] == 8]
    page, _, _ = report_of(tmp_path / "compare", results)
    assert "parameters" not in page.data("figures")["plots"]
    assert len(page.data("figures")["plots"]["methods"]) == 2


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    results = make_results(seeds=1)
    results["finished"] = 39
    page, document, text = report_of(tmp_path / "compare", results)
    assert "rankwise compare experiment.yaml" in text
    trace = page.data("figures")["plots"]["parameters"][0]["figure"]["data"][0]
    assert trace["error_y"]["array"] == [0.0, 0.0]
    assert [span for span, _ in trace["customdata"]] == ["one seed", "one seed"]
    assert document["comparisons"][0]["rows"][0]["summary"]["low"] is None


def test_a_file_or_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(make_results()))
    assert recognise(tmp_path) == recognise(path) == "comparison"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=2), "schema_version 2"),
        (lambda d: d.update(rows=[]), "holds no row"),
        (lambda d: d["rows"][0].update(rank="2"), r"rows\.0\.rank"),
        (lambda d: d["rows"][1]["summary"].pop("mean"), "mean"),
    ],
)
def test_a_malformed_file_is_refused(
    tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    results = make_results()
    change(results)
    with pytest.raises(FileError, match=message):
        report_of(tmp_path, results)


def test_a_method_of_one_size_at_two_budgets_has_its_curve(tmp_path: Path) -> None:
    results = make_results()
    for row in results["rows"]:
        if row["label"] == "RaLoRA":
            row["parameters"] = row["trainable"] = 960
    page, _, _ = report_of(tmp_path / "compare", results)
    curves = [v["figure"]["data"] for v in page.data("figures")["plots"]["parameters"]]
    assert all(len(set(round(x / 960, 1) for x in data[1]["x"])) == 1 for data in curves)


def test_what_is_not_tested_yet_is_not_said_to_be_level(tmp_path: Path) -> None:
    results = make_results()
    for row in results["rows"]:
        if row["label"] == "RaLoRA":
            row["against"]["holm_p"] = row["against"]["t_p"] = None
        if row["label"] == "slow <b>one</b>":
            row["wanted"] = 5
    _, _, text = report_of(tmp_path / "compare", results)
    assert "the best mean matthews is 0.6328 (slow <b>one</b>, 3 of 5 seeds)." in text
    assert (
        "0 of 1 methods differ from lora after Holm's correction (p < 0.05). 1 have too few" in text
    )
