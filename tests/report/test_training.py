"""What happened while training, as the report shows it: number for number, and refused if wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise.errors import FileError
from rankwise.methods import Lora
from rankwise.plan import RankPlan
from rankwise.report import write_report
from rankwise.report.load import load_report
from rankwise.report.update_view import view_of_adapter
from rankwise.report.words import short
from report_samples import Page, make_profile, numbers, save_run
from training_samples import (
    make_analysis,
    save_events,
    save_landscape,
    save_lr_adapter,
    save_tracking,
)


def save_everything(folder: Path, layers: int = 2, **profile: Any) -> RankPlan:
    """A run folder with every file that a run can leave."""
    plan = Lora(r=4).plan(made := make_profile(layers=layers, **profile))
    save_run(folder, plan, made)
    save_lr_adapter(folder / "adapter", plan)
    save_tracking(folder, list(plan.modules))
    save_events(folder, plan)
    save_landscape(folder)
    (folder / "analysis.json").write_text(json.dumps(make_analysis(list(plan.modules))))
    return plan


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("training")
    save_everything(folder / "run")
    write_report([folder / "run"], folder / "report.html")
    document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return folder, Page(folder / "report.html"), document


def test_the_json_is_what_the_run_recorded(made: tuple[Path, Page, dict[str, Any]]) -> None:
    folder, page, document = made
    assert page.data("report") == document
    assert set(page.values) <= numbers(document)
    [run] = document["runs"]
    read = {
        name: json.loads((folder / "run" / f"{name}.json").read_text())
        for name in ("tracking", "landscape", "analysis", "rank_events")
    }
    for i, step in enumerate(read["tracking"]["steps"]):
        assert run["tracking"]["steps"][i] == step["step"]
        for name, values in step["modules"].items():
            assert {k: v[i] for k, v in run["tracking"]["modules"][name].items()} == values
    for i, step in enumerate(read["analysis"]["steps"]):
        assert run["learned"]["steps"][i] == step["step"]
        for name, values in step["modules"].items():
            for key, curve in run["learned"]["modules"][name].items():
                assert curve[i] == values[key]
    assert run["learned"]["factorised"] == pytest.approx(4 / 7)  # the start is left out
    for shown, function in zip(
        run["learned"]["functions"], read["analysis"]["functions"], strict=True
    ):
        assert (shown["module"], shown["step"]) == (function["module"], function["step"])
        assert (shown["u"], shown["f"]) == (function["u"], function["f"])
        assert {key: shown[key] for key in ("edges", "counts")} == function["histogram"]
        at = run["learned"]["steps"].index(shown["step"])
        assert shown["f0"] == run["learned"]["modules"][shown["module"]]["f0"][at]
        assert shown["bends"][0] is None
        assert shown["bends"][1:] == [value - shown["f0"] for value in shown["f"][1:]]
    for key in ("at", "loss", "seed", "parameters", "tokens", "cosine", "parameter_norm"):
        assert run["landscape"][key] == read["landscape"][key]
    assert run["landscape"]["solution"] == run["landscape"]["lowest"] == 2.5
    assert [event["step"] for event in run["events"]] == [3, 7]
    assert all((e["grew"], e["shrank"], e["discarded"]) == (1, 1, 0.25) for e in run["events"])


def test_means_by_kind_are_means(made: tuple[Path, Page, dict[str, Any]]) -> None:
    _, _, document = made
    [run] = document["runs"]
    for part in ("tracking", "learned"):
        for key, kinds in run[part]["mean_by_kind"].items():
            for kind, means in kinds.items():
                members = [v[key] for n, v in run[part]["modules"].items() if n.endswith(kind)]
                for i, mean in enumerate(means):
                    assert mean == pytest.approx(sum(m[i] for m in members) / len(members))


def test_rank_history_walks_back_from_the_final_ranks(
    made: tuple[Path, Page, dict[str, Any]],
) -> None:
    folder, _, document = made
    history = document["runs"][0]["rank_history"]
    plan = RankPlan.load(folder / "run/plan.json")
    first, second, *others = plan.modules
    assert history["steps"] == [0, 3, 7, 10]
    assert history["modules"][first] == [2, 3, 4, 4]
    assert history["modules"][second] == [6, 5, 4, 4]
    assert all(history["modules"][name] == [4, 4, 4, 4] for name in others)
    assert history["mean_by_kind"]["attn.q_proj"] == [3, 3.5, 4, 4]


def test_plots_draw_the_json(made: tuple[Path, Page, dict[str, Any]]) -> None:
    _, page, document = made
    plots = page.data("figures")["plots"]
    assert {"tracking", "history", "functions", "learned", "landscape"} <= set(plots)
    known = numbers(document)
    for name in ("tracking", "history", "functions", "learned", "landscape"):
        for variant in plots[name]:
            assert variant["reading"].endswith(".")
            assert variant["figure"]["data"]
            for trace in variant["figure"]["data"]:
                if name != "landscape" or "z" in trace:
                    assert numbers(trace.get("z", trace["y"])) <= known, name
    assert [v["label"] for v in plots["tracking"]] == [
        "GID", "stable rank", "energy rank", "gradient norm",
    ]  # fmt: skip
    [run] = document["runs"]
    names = [trace["name"] for trace in plots["tracking"][0]["figure"]["data"]]
    assert names[:2] == ["layer 0 q_proj", "layer 0 k_proj"]
    assert [s["x0"] for s in plots["tracking"][0]["figure"]["layout"]["shapes"]] == [3, 7]
    marks = [t for t in plots["loss"][0]["figure"]["data"] if t["meta"]["part"] == "events"]
    losses = {point["step"]: point["loss"] for point in run["train_loss"]}
    assert [dict(zip(t["x"], t["y"], strict=True)) for t in marks] == [{3: losses[3], 7: losses[7]}]
    bars, *lines = plots["functions"][0]["figure"]["data"]
    assert bars["y"] == [20, 80, 7] and sum(bars["width"]) == 2
    assert [trace["name"] for trace in lines] == ["f, step 0", "f, step 10"]
    _check_bends(plots["functions"], run["learned"]["functions"])
    assert plots["landscape"][0]["figure"]["data"][0]["z"] == run["landscape"]["loss"]


def _check_bends(variants: list[Any], functions: list[dict[str, Any]]) -> None:
    """Each module's f is followed by the same without f(0), over the same bars."""
    plain, bent = variants[0], variants[1]
    name = functions[0]["module"]
    assert [v["label"] for v in variants[:2]] == [name, f"{name}, without f(0)"]
    (bars, *_), (same, *lines) = (v["figure"]["data"] for v in (plain, bent))
    assert bars == same
    own = [f for f in functions if f["module"] == name]
    assert [trace["y"] for trace in lines] == [f["bends"] for f in own]
    assert [trace["name"] for trace in lines] == ["f − f(0), step 0", "f − f(0), step 10"]
    assert f"which is {short(own[-1]['f0'])} at step 10" in bent["reading"]
    assert bent["figure"]["layout"]["yaxis2"]["title"]["text"] == "f(u) − f(0)"


def test_a_function_whose_constant_was_not_recorded_is_shown_with_it(tmp_path: Path) -> None:
    save_everything(tmp_path / "run")
    path = tmp_path / "run" / "analysis.json"
    analysis = json.loads(path.read_text())
    for step in analysis["steps"]:
        for module in step["modules"].values():
            module["f0"] = None
    path.write_text(json.dumps(analysis))
    write_report([tmp_path / "run"], tmp_path / "report.html")
    variants = Page(tmp_path / "report.html").data("figures")["plots"]["functions"]
    names = list(dict.fromkeys(f["module"] for f in analysis["functions"]))
    assert [v["label"] for v in variants] == names


def test_many_modules_are_shown_by_kind(tmp_path: Path) -> None:
    save_everything(tmp_path / "run", layers=9)
    write_report([tmp_path / "run"], tmp_path / "report.html")
    plots = Page(tmp_path / "report.html").data("figures")["plots"]
    for name in ("tracking", "learned"):
        traces = plots[name][0]["figure"]["data"]
        assert [trace["name"] for trace in traces] == ["q_proj", "k_proj", "down_proj", "projector"]
        assert "means over the 28 modules" in plots[name][0]["reading"]


def slow_lr_update(tensors: dict[str, Tensor], key: str, points: int, shift: float = 0.0) -> Tensor:
    """`s f(B A)` with `f(u) = sum_k a_k sinc(w_k (u - g_k))`, written out in fp64."""
    a, b, amplitude, v = (
        tensors[f"{key}_{part}.weight"].double() for part in ("A", "B", "amplitude", "bandwidth")
    )
    widths = v.exp().log1p()
    u = b @ a
    total = torch.zeros_like(u)
    for k, point in enumerate(torch.linspace(-3, 3, points, dtype=torch.float64)):
        total += amplitude[k] * torch.sinc(widths[k] * (u - point - shift))
    return 2 * total


@pytest.mark.parametrize(
    ("constant", "options", "shift"),
    [(True, {}, 0.0), (False, {}, 0.0), (True, {"init": "grid_shift"}, 0.25 * 6 / 5)],
)
def test_lr_lora_updates_are_f_of_the_factors(
    tmp_path: Path, constant: bool, options: dict[str, Any], shift: float
) -> None:
    plan = Lora(r=4).plan(make_profile(layers=1))
    folder = save_lr_adapter(tmp_path / "adapter", plan, constant=constant, **options)
    tensors = load_file(folder / "adapter_model.safetensors")
    view = view_of_adapter(folder)
    assert view.kind == "lrlora" and view.other_tensors == 0
    assert view.modules.keys() == plan.modules.keys()
    for name, module in view.modules.items():
        key = f"base_model.model.{name}.lrlora"
        update = slow_lr_update(tensors, key, 6, shift)
        if not constant:
            tensors[f"{key}_B.weight"].zero_()
            update = update - slow_lr_update(tensors, key, 6)
        values = torch.linalg.svdvals(update)
        assert module.update_norm == pytest.approx(float(update.norm()), rel=1e-5)
        at = view.sampled_at[str(min(module.d_in, module.d_out))]
        expected = [float(values[place - 1]) for place in at]
        assert module.singular_values == pytest.approx(expected, abs=1e-5 * expected[0])
        assert (module.rank, module.condition_number) == (4, None)


def test_conditioning_goes_to_the_modules(made: tuple[Path, Page, dict[str, Any]]) -> None:
    folder, page, document = made
    recorded = json.loads((folder / "run/analysis.json").read_text())["conditioning"]
    [update] = document["updates"]
    for name, module in update["modules"].items():
        assert module["condition_number"] == recorded[name]["condition_number"]
        assert module["precise_directions"] == 5
    views = [v["key"] for v in page.data("figures")["heatmaps"][-1]["views"]]
    assert views[-2:] == ["condition_number", "precise_directions"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.pop(next(k for k in t if "lrlora_A" in k)), "has no factors A and B"),
        (lambda t, c: c.update(points=7), "points=7 asks for"),
        (lambda t, c: c.update(basis="cosine"), "is not LR-LoRA's"),
        (lambda t, c: c.update(r="four"), "is not LR-LoRA's"),
        (lambda t, c: next(iter(t.values())).fill_(math.nan), "not finite"),
        (lambda t, c: t.clear(), "holds no lrlora factors"),
        (
            lambda t, c: t.update({k: v[:3] for k, v in t.items() if k.endswith("width.weight")}),
            "are not those of its configuration",
        ),
    ],
)
def test_a_broken_lr_lora_adapter_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    folder = save_lr_adapter(tmp_path / "adapter", Lora(r=4).plan(make_profile(layers=1)))
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    change(tensors, config)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FileError, match=message):
        view_of_adapter(folder)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("rank_events", lambda d: d[1]["moves"][0].update(after=9), "belong to different runs"),
        ("rank_events", lambda d: d[0].update(step=-1), "step"),
        ("tracking", lambda d: d["steps"][1]["modules"].popitem(), "has other modules"),
        ("tracking", lambda d: d.update(schema=2), "schema"),
        ("landscape", lambda d: d["loss"].pop(), "must be 5 rows"),
        ("landscape", lambda d: d.update(at=[1.0, 0.0]), "ascending"),
        ("analysis", lambda d: d["functions"][0]["u"].pop(), "4 values of u, 5 of f"),
        ("analysis", lambda d: d["functions"][0]["histogram"]["counts"].pop(), "one more than"),
        ("analysis", lambda d: d["steps"][0].update(step="0"), "step"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, file: str, change: Any, message: str) -> None:
    save_everything(tmp_path / "run", layers=1)
    path = tmp_path / "run" / f"{file}.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(FileError, match=message):
        load_report([tmp_path / "run"])


def test_full_fine_tuning_has_no_plan(tmp_path: Path) -> None:
    plan = Lora(r=4).plan(make_profile())
    run = save_run(tmp_path / "run", plan, None, ranks={}, blocks={}, method="full")
    (run / "plan.json").unlink()
    save_tracking(run, list(plan.modules))
    write_report([run], tmp_path / "report.html")
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["plans"] == [] and document["runs"][0]["ranks"] is None
    page = Page(tmp_path / "report.html")
    assert set(page.data("figures")["plots"]) == {"loss", "tracking"}
