"""RankCallback under Trainer and TRL's SFTTrainer: events, logs, resume, best model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import rankwise as rw
from dynamic_runs import Rows, attached, trainer_run
from rankwise.adapters.factors import lora_factors
from rankwise.dynamic.checkpoint import WINDOW_FILE, saved_in
from rankwise.errors import DynamicError, FileError, RankwiseError
from tiny_models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")


def final(trainer: Trainer, callback: rw.RankCallback) -> dict[str, Any]:
    """Everything that a resumed run must share with one that was never stopped."""
    optimizer = trainer.optimizer.state_dict()["state"]
    moments = {
        f"optimizer {i} {k}": torch.as_tensor(v) for i, s in optimizer.items() for k, v in s.items()
    }
    weights = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    state = callback.ranks.saved()
    return {"tensors": weights | moments, "losses": losses, "state": state}


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["state"] == two["state"]
    assert one["losses"] == two["losses"]
    assert one["tensors"].keys() == two["tensors"].keys()
    assert all(torch.equal(t, two["tensors"][k]) for k, t in one["tensors"].items())


@pytest.mark.parametrize("mode", ["masked", "resize"])
def test_a_resumed_run_is_bit_equal_wherever_it_stopped(tmp_path: Path, mode: str) -> None:
    """Before, in the middle of, at and after windows and events; with dropout and accumulation."""
    settings: dict[str, Any] = {
        "mode": mode, "compact": False, "save_strategy": "steps", "save_steps": 1,
        "gradient_accumulation_steps": 2, "max_steps": 7,
    }  # fmt: skip
    trainer, callback = trainer_run(tmp_path, **settings)
    trainer.train()
    assert [event.step for event in callback.ranks.events] == [5]
    assert any(move.before != move.after for move in callback.ranks.events[0].moves)
    expected = final(trainer, callback)
    with_window = [s for s in range(1, 8) if (tmp_path / f"checkpoint-{s}" / WINDOW_FILE).exists()]
    assert with_window == [3, 4]
    for step in (2, 4, 5) if mode == "masked" else (4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        again, other = trainer_run(tmp_path / "again", resume_from=folder, **settings)
        again.train(resume_from_checkpoint=str(folder))
        assert_same(final(again, other), expected)


class _MemoryRunsOut(TrainerCallback):  # type: ignore[misc]
    """Twice, in the first batch."""

    left = 2

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.left:
            self.left -= 1
            raise RuntimeError("CUDA out of memory.")


def test_steps_count_once_after_a_smaller_batch_size_was_found(tmp_path: Path) -> None:
    trainer, callback = trainer_run(
        tmp_path,
        callbacks=[_MemoryRunsOut()],
        auto_find_batch_size=True,
        per_device_train_batch_size=8,
    )
    trainer.train()
    assert trainer.state.global_step == callback.ranks.steps == 12
    assert [(event.step, event.batches) for event in callback.ranks.events] == [(5, 3), (10, 3)]


def test_masked_and_resized_trainers_agree(tmp_path: Path) -> None:
    runs = {}
    for mode in ("masked", "resize"):
        trainer, callback = trainer_run(tmp_path / mode, mode=mode, lr_scheduler_type="cosine")
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs[mode] = losses, callback.ranks.state.ranks
    assert runs["masked"][1] == runs["resize"][1]
    assert runs["masked"][0] == pytest.approx(runs["resize"][0], abs=1e-5)


def test_training_ends_as_plain_lora(tmp_path: Path) -> None:
    trainer, callback = trainer_run(tmp_path, activation_checkpointing=True)
    trainer.train()
    ranks = {n: r for n, r in callback.ranks.state.ranks.items() if r}
    assert len(set(ranks.values())) > 1
    trainer.save_model(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert type(trainer.model.peft_config["default"]) is LoraConfig
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))
    assert {n: f.slots for n, f in lora_factors(loaded).items()} == ranks
    for name, factors in lora_factors(trainer.model).items():
        assert torch.equal(factors.a, lora_factors(loaded)[name].a)
    assert sum(p.numel() for n, p in loaded.named_parameters() if "lora_" in n) <= (
        callback.ranks.controller.budget
    )


def test_the_best_model_comes_with_its_own_ranks(tmp_path: Path) -> None:
    """The best is declared to be the highest loss, which is that of the first evaluation."""
    trainer, callback = trainer_run(
        tmp_path, options={"interval": 3, "window": 1}, load_best_model_at_end=True,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        greater_is_better=True, max_steps=6, metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    events = callback.ranks.events
    assert [e.step for e in events] == [3] and any(m.before != m.after for m in events[0].moves)
    assert set(callback.ranks.state.ranks.values()) == {4}
    assert {f.slots for f in lora_factors(trainer.model).values()} == {4}


def test_events_are_logged_as_scalars(tmp_path: Path) -> None:
    trainer, callback = trainer_run(tmp_path, max_steps=6)
    trainer.train()
    (entry,) = [e for e in trainer.state.log_history if "rank_event/moved" in e]
    assert entry["step"] == 5
    ranks = callback.ranks.state.ranks
    assert {n: entry[f"rank/{n}"] for n in ranks} == ranks
    assert all(f"estimate/{n}" in entry for n in ranks)


class Reporter(TrainerCallback):
    """Stands for a tool that `report_to` names; every Trainer makes its own."""

    seen: ClassVar[list[dict[str, float]]] = []

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.seen.append(logs)


def test_events_go_to_what_report_to_names_and_not_to_the_console(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Reporter)
    monkeypatch.setattr(Reporter, "seen", [])
    trainer, callback = trainer_run(
        tmp_path, max_steps=6, method=rw.LoraGid(r=4), report_to=["tensorboard"]
    )
    trainer.train()
    (entry,) = [logs for logs in Reporter.seen if "rank_event/moved" in logs]
    assert entry["epoch"] == 5 / 32
    assert {n: entry[f"rank/{n}"] for n in callback.ranks.state.ranks} == callback.ranks.state.ranks
    assert all(entry[f"gid/{n}"] >= 1 for n in callback.ranks.state.ranks)
    # the event does not stand in for the loss of its step
    losses = [e["step"] for e in trainer.state.log_history if "loss" in e]
    assert losses == [1, 2, 3, 4, 5, 6] and sum("loss" in logs for logs in Reporter.seen) == 6
    printed = capsys.readouterr()
    assert "loss" in printed.out and "rank" not in printed.out + printed.err


def test_without_a_trainer_scalars_are_said_to_be_lost(caplog: pytest.LogCaptureFixture) -> None:
    model, plan = attached()
    arguments = TrainingArguments(use_cpu=True, report_to="none")
    rw.RankCallback(plan).on_init_end(arguments, TrainerState(), TrainerControl(), model=model)
    assert "its scalars are not reported" in caplog.text


def test_a_finished_run_that_is_resumed_takes_one_step_more_as_any_trainer_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What docs/train.md warns of is transformers' own: it asks whether to stop after a step."""
    steps = []
    for dynamic in (False, True):
        folder = tmp_path / str(dynamic)
        for resume in (None, str(folder / "checkpoint-3")):
            trainer, callback = trainer_run(
                folder, max_steps=3, save_strategy="steps", save_steps=3, compact=False
            )
            if not dynamic:
                trainer.remove_callback(callback)
            trainer.train(resume_from_checkpoint=resume)
        steps.append(trainer.state.global_step)
    assert steps == [4, 4]
    assert "one step more than the 3 asked for" in caplog.text


def test_trl_trains_with_the_callback(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tiny_folder import save_tiny_llama

    model, plan = attached()
    callback = rw.RankCallback(plan, rw.WaterFill(r=4, r_max=8), rw.DynamicOptions(interval=2))
    config = SFTConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="no", bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True}, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"input_ids": Rows()[i]["input_ids"].tolist()} for i in range(8)]
    SFTTrainer(
        model, config, train_dataset=Dataset.from_list(rows), callbacks=[callback],
        processing_class=AutoTokenizer.from_pretrained(save_tiny_llama(tmp_path / "base")),
    ).train()  # fmt: skip
    assert [event.step for event in callback.ranks.events] == [2]  # not at the last step
    assert any(m.before != m.after for event in callback.ranks.events for m in event.moves)


@pytest.fixture(name="checkpoints", scope="module")
def checkpoints_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer, _ = trainer_run(folder, save_strategy="steps", save_steps=1, max_steps=5)
    trainer.train()
    return folder


def resumed(folder: Path, **settings: Any) -> None:
    trainer, _ = trainer_run(folder, **settings)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))


@pytest.fixture(name="copied")
def copied_fixture(checkpoints: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoints, tmp_path / "run")
    return tmp_path / "run"


def edit_state(folder: Path, edit: Any) -> None:
    path = folder / "checkpoint-4" / "trainer_state.json"
    document = json.loads(path.read_text())
    edit(document["stateful_callbacks"])
    path.write_text(json.dumps(document))


def test_a_checkpoint_without_our_state_is_an_error(copied: Path) -> None:
    edit_state(copied, lambda callbacks: callbacks.pop("RankCallback"))
    with pytest.raises(DynamicError, match="holds no state of a RankCallback"):
        resumed(copied)


def test_a_state_of_another_version_is_an_error(copied: Path) -> None:
    def newer(callbacks: dict[str, Any]) -> None:
        callbacks["RankCallback"]["attributes"]["saved"]["schema_version"] = 99

    edit_state(copied, newer)
    with pytest.raises(FileError, match="schema_version 99; this version of rankwise reads 1"):
        resumed(copied)


def test_a_malformed_state_is_an_error(copied: Path) -> None:
    def broken(callbacks: dict[str, Any]) -> None:
        callbacks["RankCallback"]["attributes"]["saved"]["steps"] = "four"

    edit_state(copied, broken)
    with pytest.raises(FileError, match=r"steps: .* received 'four'"):
        resumed(copied)


def test_other_settings_on_resume_are_an_error(copied: Path) -> None:
    with pytest.raises(DynamicError, match=r"made with another options: .*'beta': 0.8"):
        resumed(copied, options={"beta": 0.5})


def test_a_window_that_is_not_there_is_an_error(copied: Path) -> None:
    (copied / "checkpoint-4" / WINDOW_FILE).unlink()
    with pytest.raises(DynamicError, match=r"their window is not in .*checkpoint-4"):
        resumed(copied)


def test_weights_of_other_ranks_than_the_state_says_are_an_error(copied: Path) -> None:
    def lower(callbacks: dict[str, Any]) -> None:
        ranks = callbacks["RankCallback"]["attributes"]["saved"]["controller"]["ranks"]
        ranks[next(iter(ranks))] = 1

    edit_state(copied, lower)
    with pytest.raises(DynamicError, match="a slot beyond its rank 1 is not empty"):
        resumed(copied)


def test_the_last_whole_checkpoint_is_found(copied: Path) -> None:
    assert rw.last_checkpoint(copied) == copied / "checkpoint-5"
    state = copied / "checkpoint-5" / "trainer_state.json"
    state.write_text(state.read_text()[:100])  # killed while writing it
    assert rw.last_checkpoint(copied) == copied / "checkpoint-4"
    (copied / "checkpoint-4" / WINDOW_FILE).unlink()  # killed before the window was written
    assert rw.last_checkpoint(copied) == copied / "checkpoint-3"
    window = copied / "checkpoint-3" / WINDOW_FILE
    window.write_bytes(window.read_bytes()[:-4])
    assert rw.last_checkpoint(copied) == copied / "checkpoint-2"
    assert rw.last_checkpoint(copied / "nothing") is None
    with pytest.raises(DynamicError, match="is not whole"):
        saved_in(copied / "checkpoint-5")


def test_misuse_is_explained(tmp_path: Path) -> None:
    trainer, _ = trainer_run(tmp_path, max_steps=1)
    trainer.train()
    with pytest.raises(DynamicError, match="has trained before"):
        trainer.train()
    _, plan = attached()
    with pytest.raises(DynamicError, match="pass it to the constructor"):
        _ = rw.RankCallback(plan).ranks
    with pytest.raises(DynamicError, match="LlamaForCausalLM without adapters"):
        Trainer(tiny_llama(), trainer.args, callbacks=[rw.RankCallback(plan)])
    with pytest.raises(DynamicError, match="restores itself"):
        trainer_run(tmp_path, restore_callback_states_from_checkpoint=True)
    with pytest.raises(RankwiseError, match="mode='resize' cannot"):
        trainer_run(
            tmp_path, mode="resize", load_best_model_at_end=True, eval_strategy="steps",
            save_strategy="steps", eval_steps=1, save_steps=1,
        )[0].train()  # fmt: skip
