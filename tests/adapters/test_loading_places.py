"""Adapters in places that they should not be read from, and on bases they were not made for."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from rankwise import ModulePlan, RaLoraConfig, RankPlan, attach, export_lora, load_adapter
from rankwise.adapters import save_native
from rankwise.errors import FileError, PlanError
from saved_adapters import (
    A_NAME,
    CONFIG,
    WEIGHTS,
    TwoLayers,
    X,
    edit_config,
    edit_weights,
    make_lora,
    make_ralora,
    refused,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_ralora(tmp_path / "adapter")
    return tmp_path / "adapter"


class TestWrongPlaces:
    def test_another_base_shows_both_fingerprints(self, folder: Path) -> None:
        refused(folder, r"fingerprint \w{16}, this one has \w{16}.*allow_other_base", TwoLayers(1))
        load_adapter(TwoLayers(1), folder, allow_other_base=True)

    def test_plain_lora_of_ours_knows_its_base_too(self, folder: Path, tmp_path: Path) -> None:
        modules = {"first": ModulePlan(16, 24, 2)}
        plan = RankPlan("by hand", "lora", 2, 4.0, None, modules)
        model = attach(TwoLayers(), plan, init_lora_weights=False)
        save_native(model, tmp_path / "native")
        export_lora(model, tmp_path / "lora", example={"x": X})
        export_lora(load_adapter(TwoLayers(), folder), tmp_path / "blocks", example={"x": X})
        again = load_adapter(TwoLayers(), tmp_path / "lora")
        export_lora(again, tmp_path / "again", example={"x": X})
        for name in ("native", "lora", "blocks", "again"):
            place = tmp_path / name
            assert json.loads((place / CONFIG).read_text())["peft_type"] == "LORA"
            refused(place, r"fingerprint \w{16}, this one has \w{16}.*allow_other", TwoLayers(1))
            load_adapter(TwoLayers(1), place, allow_other_base=True)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # PEFT warns of fields it does not know
                strict = PeftModel.from_pretrained(TwoLayers(), place)
            assert torch.equal(load_adapter(TwoLayers(), place)(X), strict.eval()(X))

    @pytest.mark.parametrize("text", ["", "0" * 17, "x" * 100_000])
    def test_what_is_no_fingerprint(self, folder: Path, text: str, tmp_path: Path) -> None:
        edit_config(folder, base_fingerprint="y" + text)
        refused(folder, r"base_fingerprint='y.{0,39}' is no fingerprint")
        make_lora(tmp_path / "lora")
        path = tmp_path / "lora" / WEIGHTS
        save_file(load_file(path), path, metadata={"rankwise_base_fingerprint": "z" + text})
        refused(tmp_path / "lora", r"base_fingerprint='z.{0,39}' is no fingerprint")

    @pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
    def test_links_are_refused(self, folder: Path, name: str, tmp_path: Path) -> None:
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        refused(folder, "is a symbolic link out of the folder")

    def test_a_folder_of_the_hub_cache(self, folder: Path, tmp_path: Path) -> None:
        """snapshots/REVISION/FILE -> ../../blobs/HASH, and no further."""
        expected = load_adapter(TwoLayers(), folder)(X)
        cache = tmp_path / "models--who--what"
        snapshot = cache / "snapshots" / "0123abc"
        for place in (snapshot, snapshot / "checkpoint"):
            place.mkdir(parents=True)
            (cache / "blobs").mkdir(exist_ok=True)
            for name in (CONFIG, WEIGHTS):
                (cache / "blobs" / f"hash-{name}").write_bytes((folder / name).read_bytes())
                up = Path(*[".."] * (len(place.relative_to(cache).parts)))
                (place / name).symlink_to(up / "blobs" / f"hash-{name}")
            assert torch.equal(load_adapter(TwoLayers(), place)(X), expected)
        (cache / "secret").write_bytes((folder / CONFIG).read_bytes())
        for target in ("../../secret", "../../blobs/../secret", "../../blobs/out"):
            (cache / "blobs" / "out").unlink(missing_ok=True)
            (cache / "blobs" / "out").symlink_to(cache / "secret")
            (snapshot / CONFIG).unlink()
            (snapshot / CONFIG).symlink_to(target)
            refused(snapshot, "is a symbolic link out of the folder")

    def test_a_link_within_the_folder(self, folder: Path, tmp_path: Path) -> None:
        expected = load_adapter(TwoLayers(), folder)(X)
        (folder / WEIGHTS).rename(folder / "weights")
        (folder / WEIGHTS).symlink_to("weights")
        (tmp_path / "elsewhere").symlink_to(folder)
        assert torch.equal(load_adapter(TwoLayers(), folder)(X), expected)
        assert torch.equal(load_adapter(TwoLayers(), tmp_path / "elsewhere")(X), expected)
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).symlink_to(WEIGHTS)  # a circle
        refused(folder, "no such file|symbolic link")

    @pytest.mark.parametrize("name", ["nowhere", "a\0b"])
    def test_no_such_folder(self, name: str, tmp_path: Path) -> None:
        refused(tmp_path / name, "no such file|NUL")

    def test_a_model_that_has_adapters(self, folder: Path) -> None:
        model = load_adapter(TwoLayers(), folder)
        with pytest.raises(FileError, match="has adapters already"):
            load_adapter(model, folder)

    def test_a_module_to_save_that_is_not_there(self, folder: Path) -> None:
        edit_config(folder, modules_to_save=["head"])
        refused(folder, "modules_to_save has 'head'")

    def test_a_rank_over_the_layers(self, tmp_path: Path) -> None:
        model = get_peft_model(TwoLayers(), RaLoraConfig(r=16, target_modules=["first"]))
        model.save_pretrained(tmp_path)
        edit_config(tmp_path, r=17)
        edit_weights(
            tmp_path,
            lambda t: t.update(
                {A_NAME: torch.zeros(1, 17, 16), A_NAME.replace("_A", "_B"): torch.zeros(1, 24, 17)}
            ),
        )
        refused(tmp_path, "rank 17 of first exceeds its largest, 16")


class TestWhatPeftWouldFindOutTooLate:
    """The model is as it was, also where PEFT's own check comes after it has put adapters in."""

    @pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
    def test_a_task_that_the_model_does_not_do(self, tmp_path: Path, task: str) -> None:
        make_lora(tmp_path)
        edit_config(tmp_path, task_type=task)
        refused(tmp_path, rf"task_type='{task}', and a TwoLayers does not generate text")

    def test_factors_of_a_module_that_is_saved_whole(self, tmp_path: Path) -> None:
        make_lora(tmp_path)
        edit_config(tmp_path, modules_to_save=["first"])
        weight = TwoLayers().first
        edit_weights(
            tmp_path,
            lambda tensors: tensors.update(
                {f"base_model.model.first.{k}": v for k, v in weight.state_dict().items()}
            ),
        )
        refused(
            tmp_path, "first has factors, and modules_to_save or task_type has it trained whole"
        )


def test_a_plan_of_a_module_that_is_trained_whole_is_refused() -> None:
    parts = {"body": nn.Linear(8, 8), "classifier": nn.Sequential(nn.Linear(8, 8))}
    model = nn.ModuleDict(parts)
    modules = {name: ModulePlan(8, 8, 2) for name in ("body", "classifier.0")}
    plan = RankPlan("by hand", "lora", 2, 4.0, None, modules)
    for options, entry in (
        ({"task_type": "SEQ_CLS"}, "classifier"),
        ({"task_type": TaskType.SEQ_CLS}, "classifier"),
        ({"modules_to_save": ["body"]}, "body"),
    ):
        with pytest.raises(PlanError, match=f"trained whole: .* asks for '{entry}'"):
            attach(model, plan, **options)
        assert all("lora" not in name for name, _ in model.named_modules())
