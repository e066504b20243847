"""Page = report.json = the records it was made from, number for number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rankwise.curve import budget_curve
from rankwise.methods import Lora, LsLora, RaLora, WaterFill
from rankwise.plan import RankPlan
from rankwise.profiling.profile import GradientProfile
from rankwise.records import RunRecord
from rankwise.report import write_report
from rankwise.report.sampling import POINTS, places
from rankwise.spectra import effective_rank, participation_ratio, stable_rank
from report_samples import Page, make_profile, numbers, save_adapter, save_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page, dict[str, Any]]:
    """A report of two runs, a profile with everything, more plans, and an adapter."""
    folder = tmp_path_factory.mktemp("numbers")
    profile = make_profile(layers=3, more=True, size=2)
    pro, lora = RaLora(r=4).plan(profile), Lora(r=4).plan(profile)
    save_run(folder / "a", pro, profile)
    save_run(folder / "b", lora, None)
    save_adapter(folder / "a" / "adapter", pro)
    save_adapter(folder / "loose", lora)
    LsLora(r=4).plan(profile).save(folder / "ls.json")
    WaterFill(r=4).plan(profile).save(folder / "fill.json")
    paths = [folder / name for name in ("a", "b", "ls.json", "fill.json", "loose")]
    write_report(paths, folder / "report.html")
    document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return folder, Page(folder / "report.html"), document


def test_the_page_holds_the_json(made: tuple[Path, Page, dict[str, Any]]) -> None:
    _, page, document = made
    assert page.data("report") == document
    assert document["schema_version"] == 3
    assert page.values
    assert set(page.values) <= numbers(document)


def test_runs_are_the_records(made: tuple[Path, Page, dict[str, Any]]) -> None:
    folder, _, document = made
    assert len(document["runs"]) == 2
    for run, name in zip(document["runs"], ("a", "b"), strict=True):
        record = RunRecord.load(folder / name / "record.json")
        assert run["trainable_parameters"] == record.trainable_parameters
        assert [(p["step"], p["loss"], p["perplexity"], p["tokens"]) for p in run["held_out"]] == [
            (p.step, p.loss, p.perplexity, p.tokens) for p in record.held_out
        ]
        assert [(p["step"], p["loss"]) for p in run["train_loss"]] == [
            (p.step, p.loss) for p in record.train_loss
        ]
        assert run["seconds"] == record.seconds
        assert run["peak_memory_mib"] == record.peak_memory_mib
        assert run["train_tokens"] == record.train_tokens
        assert run["blocks"]["max"] == max(record.blocks.values())


def test_plans_are_the_plans(made: tuple[Path, Page, dict[str, Any]]) -> None:
    folder, _, document = made
    profile = GradientProfile.load(folder / "a" / "profile")
    files = ["a/plan.json", "b/plan.json", "ls.json", "fill.json"]
    assert len(document["plans"]) == len(files)
    for view, file in zip(document["plans"], files, strict=True):
        plan = RankPlan.load(folder / file)
        assert view["parameters"] == plan.parameters
        assert view["budget"] == plan.budget
        assert view["used"] == plan.parameters / plan.budget
        assert view["modules"].keys() == plan.modules.keys()
        kept = total = 0.0
        for name, values in profile.singular_values.items():
            energy = float((values**2).sum())
            total += energy
            if name not in plan.modules:
                continue
            planned, shown = plan.modules[name], view["modules"][name]
            assert (shown["rank"], shown["blocks"]) == (planned.rank, planned.blocks)
            assert shown["reach"] == planned.rank * planned.blocks
            assert shown["parameters"] == planned.parameters
            held = float((values[: planned.rank] ** 2).sum())
            kept += held
            if plan.adapter == "lora":
                assert shown["captured"] == pytest.approx(held / energy, rel=1e-12)
        expected = None if plan.adapter != "lora" else pytest.approx(kept / total, rel=1e-12)
        assert view["captured"] == expected


def test_a_profile_is_the_profile(made: tuple[Path, Page, dict[str, Any]]) -> None:
    folder, _, document = made
    profile = GradientProfile.load(folder / "a" / "profile")
    [view] = document["profiles"]
    ranks = profile.energy_ranks(0.9)
    assert view["modules"].keys() == profile.modules.keys()
    for name, shown in view["modules"].items():
        statistics, spectrum = profile.modules[name], profile.singular_values[name]
        for key in ("d_in", "d_out", "sensitivity", "gradient_norm", "fisher", "zero_batches"):
            assert shown[key] == getattr(statistics, key)
        assert shown["gid"] == effective_rank(spectrum)
        assert shown["stable_rank"] == stable_rank(spectrum)
        assert shown["participation_ratio"] == participation_ratio(spectrum)
        assert shown["energy_rank"] == ranks[name]
        shares = np.cumsum(spectrum.numpy() ** 2) / float((spectrum**2).sum())
        assert shown["directions"] == int(np.argmax(shares >= 0.9)) + 1
        at = view["sampled_at"][str(len(spectrum))]
        assert len(at) <= min(POINTS, len(spectrum))
        for key, values in (("singular_values", spectrum.numpy()), ("energy", shares)):
            assert shown[key] == pytest.approx([values[rank - 1] for rank in at], rel=1e-6)
        assert profile.convergence is not None
        assert shown["convergence"] == profile.convergence[name].tolist()
    assert max(map(len, profile.singular_values.values())) > POINTS


def test_the_curves_of_a_profile(made: tuple[Path, Page, dict[str, Any]]) -> None:
    folder, _, document = made
    profile = GradientProfile.load(folder / "a" / "profile")
    [view] = document["profiles"]
    curve = budget_curve(profile)
    assert [
        (p["r"], p["parameters"], p["uniform"], p["water_fill"]) for p in view["curve"]["points"]
    ] == [(p.r, p.parameters, p.uniform, p.water_fill) for p in curve.points]
    assert view["curve"]["recommended_r"] == curve.knee.r
    assert profile.convergence is not None
    rows = np.array([curve.tolist() for curve in profile.convergence.values()])
    assert view["convergence"]["batches"] == [1, 2, 4]
    assert view["convergence"]["mean"] == pytest.approx(rows.mean(0).tolist(), rel=1e-12)
    gid = [module["gid"] for module in view["modules"].values()]
    fisher = [module["fisher"] for module in view["modules"].values()]
    found = view["fisher"]
    assert found["pearson_log"] == pytest.approx(stats.pearsonr(gid, np.log(fisher)).statistic)
    assert found["pearson_inverse"] == pytest.approx(
        stats.pearsonr(gid, 1 / np.array(fisher)).statistic
    )
    assert found["spearman"] == pytest.approx(stats.spearmanr(gid, fisher).statistic)
    assert (found["modules"], found["left_out"]) == (len(gid), 0)


def test_plots_draw_the_json(made: tuple[Path, Page, dict[str, Any]]) -> None:
    _, page, document = made
    plots = page.data("figures")["plots"]
    assert set(plots) == {
        "loss", "ranks", "histogram", "curve", "convergence", "fisher", "updates", "stable-ranks",
    }  # fmt: skip
    for variants in plots.values():
        assert all(variant["reading"].endswith(".") for variant in variants)
        assert all(variant["figure"]["data"] for variant in variants)
    drawn = {(t["name"], t["meta"]["part"]): t for t in plots["loss"][0]["figure"]["data"]}
    for run in document["runs"]:
        for part, key in (("training", "train_loss"), ("held-out", "held_out")):
            trace = drawn[f"{run['label']}: {part}", part]
            assert trace["x"] == [p["step"] for p in run[key]]
            assert trace["y"] == [p["loss"] for p in run[key]]
    known = numbers(document)
    for name in ("curve", "convergence", "fisher", "updates", "stable-ranks"):
        for variant in plots[name]:
            for trace in variant["figure"]["data"]:
                assert numbers(trace["y"]) <= known, name
    plans = {plan["label"]: plan for plan in document["plans"]}
    for variant in plots["ranks"]:
        plan = plans[variant["label"]]
        *lines, uniform = variant["figure"]["data"]
        assert set(uniform["y"]) == {plan["even_rank"]}
        inside = [m["reach"] for n, m in plan["modules"].items() if "layers" in n]
        assert sorted(y for trace in lines for y in trace["y"]) == sorted(inside)
    for variant in plots["histogram"]:
        plan = plans[variant["label"]]
        bars = variant["figure"]["data"]
        assert sum(sum(bar["y"]) for bar in bars) == len(plan["modules"])
        for rank, *counts in zip(bars[0]["x"], *(bar["y"] for bar in bars), strict=True):
            assert sum(counts) == sum(m["reach"] == int(rank) for m in plan["modules"].values())


def test_heatmaps_paint_the_json(made: tuple[Path, Page, dict[str, Any]]) -> None:
    _, page, document = made
    figures = page.data("figures")
    groups = figures["heatmaps"]
    assert len(groups) == 1 + 4 + 2
    for group in groups:
        kind, i = group["source"]
        modules = document[kind][i]["modules"]
        grid = figures["cells"][group["cells"]]
        assert group["views"]
        for view in group["views"]:
            base = view["base"]
            cells = {
                cell[0]: z
                for names, row in zip(grid, view["trace"]["z"], strict=True)
                for cell, z in zip(names, row, strict=True)
                if cell is not None
            }
            assert set(cells) == {name for name in modules if "layers" in name}
            for name, z in cells.items():
                value = modules[name][view["key"]]
                place = value if base is None else math.log(value, base)
                assert z == pytest.approx(place, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 576, 4096, 100_000])
def test_places_are_ranks_in_order(count: int) -> None:
    at = places(count)
    assert at[0] == 1
    assert at[-1] == count
    assert list(at) == sorted(set(at))
    assert len(at) == count if count <= POINTS else POINTS // 2 < len(at) <= POINTS
