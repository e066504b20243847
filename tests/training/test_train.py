from __future__ import annotations

import errno
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from rankwise.adapters import load_adapter
from rankwise.adapters.fuse_lora import FusedLoraLinear
from rankwise.errors import ConfigError, DataError, FileError, PlanError, RankwiseError, TargetError
from rankwise.methods import RaLora
from rankwise.plan import RankPlan
from rankwise.profiling import GradientProfile, profile_gradients
from rankwise.records import RunRecord
from rankwise.training import fit
from rankwise.training.config import RunConfig
from rankwise.training.data import load_token_data
from rankwise.training.evaluate import held_out_loss
from rankwise.training.train import load_model, own_device, train
from tiny_folder import save_tiny_llama, write_rows, write_texts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny_llama(folder / "model")
    write_texts(folder / "train.jsonl")
    write_texts(folder / "held.jsonl", 5)
    return folder


def config(place: Path, output: Path, **changes: object) -> RunConfig:
    document: dict[str, object] = {
        "model": str(place / "model"),
        "output": str(output),
        "data": {"train": str(place / "train.jsonl"), "held_out": str(place / "held.jsonl")},
        "method": {"name": "ralora", "r": 2, "n_max": 4},
        "profile": {"batches": 2},
        "training": {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "evaluate_every": 3},
    }
    return RunConfig.model_validate(document | changes)


@pytest.mark.parametrize("method", ["lora", "gard", "ralora", "ralora-pro"])
def test_a_run_learns_and_leaves_everything(place: Path, tmp_path: Path, method: str) -> None:
    run = train(config(place, tmp_path / "run", method={"name": method, "r": 2}))
    record = RunRecord.load(tmp_path / "run/record.json")
    assert record == run.record
    assert [point.step for point in record.held_out] == [0, 3, 6]
    assert record.held_out[-1].loss < record.held_out[0].loss
    assert record.trainable_parameters == run.plan.parameters
    assert RankPlan.load(tmp_path / "run/plan.json") == run.plan
    assert (method == "lora") == (not (tmp_path / "run/profile").exists())
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    loaded = PeftModel.from_pretrained(base, tmp_path / "run/adapter").eval()
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(loaded(ids).logits, run.model.eval()(ids).logits, rtol=0, atol=0)
    other = AutoModelForCausalLM.from_pretrained(place / "model")
    other.model.norm.weight.data += 1
    with pytest.raises(FileError, match=r"fingerprint \w{16}, this one has \w{16}"):
        load_adapter(other, tmp_path / "run/adapter")


def test_the_same_seed_gives_the_same_run(place: Path, tmp_path: Path) -> None:
    first, again = (train(config(place, tmp_path / name)).record for name in ("a", "b"))
    other = train(config(place, tmp_path / "c", seed=1)).record
    assert first.held_out == again.held_out
    assert first.train_loss == again.train_loss
    assert other.held_out[-1] != first.held_out[-1]
    assert other.held_out[0] == first.held_out[0]


def test_profile_is_used_instead_of_made(place: Path, tmp_path: Path) -> None:
    run = train(config(place, tmp_path / "a"))
    assert run.profile is not None
    again = train(config(place, tmp_path / "b"), profile=run.profile)
    assert again.record.held_out == run.record.held_out
    assert GradientProfile.load(tmp_path / "b/profile").gid == run.profile.gid


def test_a_saved_plan_is_used(place: Path, tmp_path: Path) -> None:
    """With its scaling and its drawing, which came from the run's method."""
    options = {"scaling": "paper", "rank_scaling": "sqrt_r", "init_fan_in": "block"}
    run = train(config(place, tmp_path / "a", method={"name": "ralora", "r": 2, **options}))
    beside = {"plan": str(tmp_path / "a/plan.json"), "method": {"name": "ralora"}}
    again = train(config(place, tmp_path / "b", **beside))
    assert again.plan == run.plan
    assert again.profile is None
    assert again.record.held_out == run.record.held_out
    for name in ("a", "b"):
        saved = json.loads((tmp_path / name / "adapter/adapter_config.json").read_text())
        assert {key: saved[key] for key in options} == options


@pytest.mark.parametrize(
    "method", [{"name": "gard"}, {"name": "gard-dynamic", "dynamic": {"interval": 2, "window": 1}}]
)
def test_plain_lora_trains_fused_to_the_same_end(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]
) -> None:
    calls = []
    forward = FusedLoraLinear.forward

    def counted(self: FusedLoraLinear, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(FusedLoraLinear, "forward", counted)
    changes = {"dynamic": method["dynamic"]} if "dynamic" in method else {}
    changes["method"] = {"name": method["name"], "r": 2}
    settings = {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "dropout": 0.1}
    runs = {}
    for fused in (True, False):
        calls.clear()
        chosen = settings | {"fuse_lora": fused}
        run = train(config(place, tmp_path / str(fused), training=chosen, **changes))
        assert bool(calls) is fused
        assert not any(isinstance(module, FusedLoraLinear) for module in run.model.modules())
        runs[fused] = run
    assert runs[True].plan.modules == runs[False].plan.modules
    for ours, theirs in zip(runs[True].record.held_out, runs[False].record.held_out, strict=True):
        assert math.isclose(ours.loss, theirs.loss, rel_tol=1e-4)


def test_gradient_accumulation_and_checkpointing_train(place: Path, tmp_path: Path) -> None:
    settings = {
        "steps": 2,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "gradient_checkpointing": True,
        "learning_rate": 0.01,
    }
    record = train(config(place, tmp_path / "run", training=settings)).record
    assert record.held_out[-1].loss < record.held_out[0].loss


def test_held_out_loss_does_not_depend_on_the_batch_size(place: Path, tmp_path: Path) -> None:
    settings = config(place, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float64).train()
    rows = [{"text": "the quick brown fox " * i} for i in range(1, 6)]
    write_rows(tmp_path / "uneven.jsonl", rows)
    data_config = settings.data.model_copy(update={"held_out": str(tmp_path / "uneven.jsonl")})
    data = load_token_data(data_config, tokenizer, seed=0)
    losses = [held_out_loss(model, data.held_out_loader(size), step=0) for size in (1, 2, 5)]
    tokens = sum(len(row["input_ids"]) - 1 for row in data.held_out)
    total = 0.0
    for row in data.held_out:
        ids = torch.tensor(row["input_ids"])[None]
        with torch.no_grad():
            log_p = model.eval()(ids).logits[0, :-1].log_softmax(-1)
        total -= float(log_p.gather(1, ids[0, 1:, None]).sum())
    for loss in losses:
        assert loss.tokens == tokens
        assert math.isclose(loss.loss, total / tokens, rel_tol=1e-6)
        assert math.isclose(loss.perplexity, math.exp(total / tokens), rel_tol=1e-5)


def _bad(place: Path) -> dict[str, tuple[dict[str, object], type[RankwiseError], str]]:
    train_file = str(place / "train.jsonl")
    write_rows(place / "columns.jsonl", [{"a": "x"}])
    (place / "empty.jsonl").write_text("")
    return {
        "no model": ({"model": str(place / "absent")}, ConfigError, "cannot be loaded"),
        "no data": ({"data": {"train": str(place / "x.jsonl")}}, DataError, "no such file"),
        "no column": ({"data": {"train": str(place / "columns.jsonl"), "held_out": train_file}},
                      DataError, "has columns a"),
        "empty": ({"data": {"train": str(place / "empty.jsonl")}}, DataError, "is empty"),
        "no target": ({"targets": ["q_prj"]}, TargetError, "did you mean 'q_proj'"),
        "large rank": ({"method": {"name": "lora", "r": 17}}, PlanError, "exceeds"),
        "no plan": ({"plan": str(place / "plan.json"), "method": {"name": "ralora"}},
                    FileError, "no such file"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "case", ["no model", "no data", "no column", "empty", "no target", "large rank", "no plan"]
)
def test_bad_input_writes_nothing(place: Path, tmp_path: Path, case: str) -> None:
    changes, error, message = _bad(place)[case]
    with pytest.raises(error, match=message):
        train(config(place, tmp_path / "run", **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_another_model_is_refused(place: Path, tmp_path: Path) -> None:
    train(config(place, tmp_path / "a"))
    save_tiny_llama(tmp_path / "other", seed=1)
    beside = {"plan": str(tmp_path / "a/plan.json"), "method": {"name": "ralora"}}
    beside["model"] = str(tmp_path / "other")
    with pytest.raises(PlanError, match=r"made for another model: .* has [0-9a-f]{16}"):
        train(config(place, tmp_path / "b", **beside))
    assert not (tmp_path / "b").exists()
    train(config(place, tmp_path / "b", allow_other_base=True, **beside))
    assert (tmp_path / "b/record.json").is_file()


def test_a_full_disk_leaves_the_earlier_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(place, tmp_path / "run"))
    before = (tmp_path / "run/record.json").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PeftModel, "save_pretrained", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(FileError, match=r"No space left on device\); nothing was changed.* Nor"):
        train(config(place, tmp_path / "run", seed=1))
    assert (tmp_path / "run/record.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_was_trained_outlives_a_failed_save(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunRecord, "save", full)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    with pytest.raises(FileError, match=r"No space left .* The trained weights are in") as failure:
        train(config(place, tmp_path / "run"))
    (kept,) = (tmp_path / "elsewhere").iterdir()
    assert str(kept) in str(failure.value)
    assert not (tmp_path / "run").exists()
    load_adapter(AutoModelForCausalLM.from_pretrained(place / "model"), kept)


def test_several_processes_are_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2: .* one process.* rankwise\.RankCallback"):
        train(config(place, tmp_path / "run", model="absent"))


def test_the_model_goes_to_the_gpu_of_its_process(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert own_device() == torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (own_device(), chosen) == (torch.device("cuda:1"), [1])
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="LOCAL_RANK=2: there are 2 GPUs"):
        own_device()
    monkeypatch.undo()
    monkeypatch.setitem(load_model.__globals__, "own_device", lambda: torch.device("meta"))
    model, _ = load_model(str(place / "model"), "float32")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_several_gpus_make_no_batch_larger(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arguments = fit._arguments(config(place, tmp_path / "run"), 1, tmp_path)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 4)


def test_a_constant_learning_rate_warms_up(place: Path, tmp_path: Path) -> None:
    training = {"steps": 8, "scheduler": "constant", "warmup": 0.5, "learning_rate": 0.01}
    arguments = fit._arguments(config(place, tmp_path / "run", training=training), 8, tmp_path)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    schedule = get_scheduler(arguments.lr_scheduler_type, optimizer, arguments.warmup_steps, 8)
    rates = []
    for _ in range(6):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01, 0.01])


class _Tool(TrainerCallback):  # type: ignore[misc]
    """Writes where TensorBoard's does."""

    def on_log(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        folder = Path(args.output_dir) / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "events").write_text("loss")


def test_what_report_to_names_is_checked_first_and_its_files_stay(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 1, "report_to": ["tensorbord"]}
    with pytest.raises(ConfigError, match=r"training\.report_to=\['tensorbord'\]: .*tensorboard"):
        train(config(place, tmp_path / "run", model="absent", training=settings))
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", _Tool)
    settings["report_to"] = ["tensorboard"]
    train(config(place, tmp_path / "run", training=settings))
    assert (tmp_path / "run/logs/runs/events").read_text() == "loss"


def test_somebody_elses_folder_is_not_replaced(place: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileError, match=r"holds no record\.json, so it is not replaced"):
        train(config(place, tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("added", ["notes.txt", "adapter/notes.txt", "adapter/lora/card.md"])
def test_a_run_to_which_something_was_added_is_not_replaced(
    place: Path, tmp_path: Path, added: str
) -> None:
    train(config(place, tmp_path / "run"))
    train(config(place, tmp_path / "run"))
    (tmp_path / "run" / added).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / added).write_text("mine")
    with pytest.raises(FileError, match=rf"holds {added}, which rankwise did not write there"):
        train(config(place, tmp_path / "run"))
    assert (tmp_path / "run" / added).read_text() == "mine"


def test_a_run_of_before_its_files_were_listed_is_replaced(place: Path, tmp_path: Path) -> None:
    train(config(place, tmp_path / "run"))
    (tmp_path / "run/files.json").unlink()
    train(config(place, tmp_path / "run"))
    (tmp_path / "run/files.json").unlink()
    (tmp_path / "run/notes.txt").write_text("mine")
    with pytest.raises(FileError, match=r"holds notes\.txt"):
        train(config(place, tmp_path / "run"))


def test_the_base_is_not_replaced(place: Path, tmp_path: Path) -> None:
    train(config(place, tmp_path / "run", method={"name": "full"}))
    before = (tmp_path / "run/model/model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="would replace the base"):
        train(config(place, tmp_path / "run", model=str(tmp_path / "run/model")))
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == before


def test_the_record_is_plain_json(place: Path, tmp_path: Path) -> None:
    train(config(place, tmp_path / "run"))
    document = json.loads((tmp_path / "run/record.json").read_text())
    assert document["config"]["training"]["scheduler"] == "cosine"
    assert set(document["seconds"]) == {"profile", "train", "evaluate"}
    document["surprise"] = 1
    (tmp_path / "bad.json").write_text(json.dumps(document))
    with pytest.raises(FileError, match="surprise"):
        RunRecord.load(tmp_path / "bad.json")


def test_the_ranks_of_any_method_carry_another_adapter(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"name": "water-fill", "r": 2, "alpha": 4.0}
    adapter = {"kind": "lr-lora", "points": 7, "span": 1.0, "amplitude_ratio": 0.5}
    rates: list[list[float]] = []
    kept = torch.optim.AdamW.__init__

    def noted(self: Any, groups: Any, **options: Any) -> None:
        rates.append([group["lr"] for group in groups])
        kept(self, groups, **options)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", noted)
    run = train(config(place, tmp_path / "run", method=method, adapter=adapter))
    assert rates == [[0.01, 0.005]]
    assert run.record.held_out[-1].loss < run.record.held_out[0].loss
    saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert run.record.method == "water-fill, lr-lora"
    assert saved["peft_type"] == "LRLORA"
    assert (saved["points"], saved["span"]) == (7, 1.0)
    plan = RankPlan.load(tmp_path / "run/plan.json")
    assert plan.adapter == "lr-lora"
    assert saved["rank_pattern"] == {name: m.rank for name, m in plan.modules.items()}
    assert run.record.trainable_parameters == plan.parameters + 2 * 7 * len(plan.modules)
    assert (tmp_path / "run/analysis.json").is_file()
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    loaded = load_adapter(base, tmp_path / "run/adapter")
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(loaded(ids).logits, run.model.eval()(ids).logits)


def test_block_updates_are_no_other_adapter(place: Path, tmp_path: Path) -> None:
    plan = RaLora(r=2, n_max=4).plan(
        profile_gradients(*_model_and_batches(place), batches=1, progress=False)
    )
    plan.save(tmp_path / "plan.json")
    asked = {"plan": str(tmp_path / "plan.json"), "method": {"name": "lora"}}
    with pytest.raises(PlanError, match=r"one block per module.* by ralora up to .*or plan with"):
        train(config(place, tmp_path / "run", adapter={"kind": "lr-lora"}, **asked))
    assert not (tmp_path / "run").exists()


def _model_and_batches(place: Path) -> tuple[PreTrainedModel, list[dict[str, torch.Tensor]]]:
    ids = torch.arange(3, 19).reshape(2, 8)
    return load_model(str(place / "model"), "float32")[0], [{"input_ids": ids, "labels": ids}]


def test_other_adapters_know_no_options_of_blocks(place: Path, tmp_path: Path) -> None:
    method = {"name": "ralora", "r": 2, "n_max": 1, "scaling": "paper"}
    train(config(place, tmp_path / "run", method=method, adapter={"kind": "lr-lora", "points": 3}))
    assert RankPlan.load(tmp_path / "run/plan.json").adapter == "lr-lora"


def test_a_plan_says_how_its_blocks_were_trained(place: Path, tmp_path: Path) -> None:
    train(config(place, tmp_path / "run", adapter={"kind": "ralora", "scaling": "paper"}))
    saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    plan = RankPlan.load(tmp_path / "run/plan.json")
    assert saved["scaling"] == plan.block_options.scaling == "paper"


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (ImportError("Using bitsandbytes needs it; run pip install"), "run pip install"),
        (OSError("You are trying to access a gated repo.\nVisit https://x"), "repo. Visit https"),
        (ValueError(), "ValueError"),
    ],
)
def test_what_keeps_a_model_from_loading_is_told_whole(
    place: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, message: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(ConfigError, match=f"cannot be loaded .*{message}.*hf auth login"):
        load_model(str(place / "model"), "float32")


def test_training_in_fp16_is_warned_of(place: Path, tmp_path: Path) -> None:
    for dtype, warned in (("float16", True), ("bfloat16", False)):
        said: list[str] = []
        settings = {"steps": 1, "batch_size": 2}
        train(
            config(
                place, tmp_path / dtype, dtype=dtype, training=settings, method={"name": "lora"}
            ),
            notify=said.append,
        )
        assert any("underflow in fp16" in line for line in said) == warned


def test_running_out_of_memory_names_what_needs_less(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fit.SFTTrainer, "training_step", full)
    with pytest.raises(ConfigError, match=r"out of memory while training.*training\.batch_size"):
        train(config(place, tmp_path / "run", method={"name": "lora"}))
    assert not (tmp_path / "run").exists()
