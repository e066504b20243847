from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rankwise import profile_gradients
from rankwise.adapters.block_diagonal import RaLoraLinear
from rankwise.errors import ConfigError
from rankwise.experiments.contestants import Planned
from rankwise.experiments.loop import Loop
from rankwise.experiments.methods import known_methods, make_entry
from rankwise.experiments.settings import TrainingSettings
from rankwise.experiments.sizing import Adapted, Job
from rankwise.targets import find_targets
from tiny_models import tiny_bert_classifier, tiny_llama

OURS: list[str | dict[str, Any]] = [
    "lora-gid",
    "ls-lora",
    "ralora",
    "ralora-pro",
    "gard",
    "water-fill",
    "gradient-norm",
    "depth",
    "random",
    "lr-lora",
    "sinelora",
    "melora",
    "gard-dynamic",
    "gard-early-dynamic",
    {"name": "water-fill", "adapter": "lr-lora", "points": 5},
    {"name": "water-fill", "adapter": "ralora", "n_max": 2},
    {"name": "lr-lora", "points": 6, "share": "all"},
    {"name": "lr-lora", "points": 6, "grid": "learned", "share": "grid"},
    {"name": "lr-lora", "points": 6, "basis": "polynomial"},
    {"name": "ralora", "scaling": "paper", "init_fan_in": "block"},
]
RANK, STEPS = 4, 4


def _batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 61, (4, 10), generator=generator) for _ in range(count)]
    return [
        {"input_ids": i, "labels": i.clone(), "attention_mask": torch.ones_like(i)} for i in ids
    ]


def _adapt(method: str | dict[str, Any], **job: Any) -> tuple[Adapted, Job]:
    model = tiny_llama()
    targets = find_targets(model)
    budget = RANK * sum(shape.rank_cost for shape in targets.values())
    contestant = make_entry(method).contestant
    profile = None
    if contestant.profile_batches() is not None:
        profile = profile_gradients(
            model, _batches(), batches=2, statistics=contestant.statistics(), progress=False
        )
    settings: dict[str, Any] = {"steps": STEPS, "task_type": "CAUSAL_LM"}
    made = Job(model, targets, budget, _batches(), **settings | job)
    torch.manual_seed(0)
    return contestant.adapt(made, profile), made


def _loop(adapted: Adapted, rate: float = 1e-2, steps: int = STEPS, **settings: Any) -> Loop:
    loop = Loop(adapted, TrainingSettings(**settings), steps, rate, (), lambda _: {"loss": 0.0})
    batches = _batches()
    loop.run(batches[i % len(batches)] for i in range(10**6))
    return loop


@pytest.mark.parametrize("method", OURS, ids=str)
def test_ours_keep_to_the_budget_and_learn(method: str | dict[str, Any]) -> None:
    adapted, job = _adapt(method)
    assert adapted.size is not None
    assert adapted.size.matched
    if method != "lr-lora":  # rank 1 and its functions of 100 parameters are a little above
        assert adapted.size.parameters <= job.budget
    loop = _loop(adapted, steps=8)
    trainable = sum(p.numel() for p in adapted.model.parameters() if p.requires_grad)
    assert trainable == adapted.size.parameters
    first, last = loop.curves.train_loss[0][1], loop.curves.train_loss[-1][1]
    assert last < first


def test_planned_sizes_count_the_functions_of_lr_lora() -> None:
    adapted, job = _adapt({"name": "water-fill", "adapter": "lr-lora", "points": 5})
    assert adapted.size is not None
    ranks = sum(job.targets[n].rank_cost * r for n, r in adapted.size.values.items())
    assert adapted.size.parameters == ranks + 2 * 5 * len(adapted.size.values)


@pytest.mark.parametrize("method", ["ralora", "ralora-pro", "water-fill"])
def test_planned_blocks_are_those_of_the_adapters(method: str) -> None:
    adapted, _ = _adapt(method)
    assert adapted.size is not None
    attached = {
        name.removeprefix("base_model.model."): module.blocks["default"]
        for name, module in adapted.model.named_modules()
        if isinstance(module, RaLoraLinear)
    }
    assert adapted.size.blocks == attached
    assert bool(attached) == (method != "water-fill")


def test_dynamic_ranks_move_within_the_budget_and_are_compacted() -> None:
    moving = {"name": "gard-dynamic", "dynamic": {"interval": 2, "window": 2}}
    adapted, job = _adapt(moving, steps=8)
    _loop(adapted, steps=8)
    ranks = adapted.driver.ranks()
    assert ranks is not None
    assert sum(job.targets[n].rank_cost * r for n, r in ranks.items()) <= job.budget
    # after steps 2, 4 and 6: nothing would train what the last step's event moves
    assert adapted.driver.notes()[0].startswith("3 rank events")
    held = sum(p.numel() for n, p in adapted.model.named_parameters() if "lora_" in n)
    assert held == sum(job.targets[n].rank_cost * r for n, r in ranks.items())


def test_early_dynamic_ranks_stop_moving_at_half_time() -> None:
    planned = make_entry("gard-early-dynamic").contestant
    assert isinstance(planned, Planned)
    options = planned.dynamic_options(200)
    assert (options.interval, options.freeze_after) == (20, 100)
    assert planned.dynamic_options(5000).interval == 100
    assert planned.revision == 1


def test_no_rank_moves_after_the_last_step() -> None:
    planned = make_entry("gard-dynamic").contestant
    assert isinstance(planned, Planned)
    options = planned.dynamic_options(40)
    assert [step for step in range(1, 41) if options.is_event(step)] == list(range(4, 40, 4))
    assert not any(options.is_measured(step, 4) for step in range(37, 41))
    assert planned.revision == 2  # records of runs that had that event are not taken for these


def test_adalora_is_driven_to_its_target() -> None:
    adapted, _ = _adapt("adalora", steps=20)
    before = _active(adapted)
    _loop(adapted, steps=20)
    assert _active(adapted) < before
    config = adapted.model.peft_config["default"]
    assert _active(adapted) == config.target_r * 14


def _active(adapted: Adapted) -> int:
    values = [p for n, p in adapted.model.named_parameters() if "lora_E" in n]
    masks = [bool((p != 0).any()) for p in values]
    assert len(masks) == 14
    return sum(int((p != 0).sum()) if p.any() else p.numel() for p in values)


def test_the_head_is_trained_alike_for_everyone() -> None:
    ids = torch.randint(1, 61, (4, 9))
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 1])}
    for method in ("lora", "lora+", "lora-fa", "lr-lora", "ralora", "full", "head-only"):
        model = tiny_bert_classifier()
        targets = find_targets(model)
        profile = profile_gradients(model, [batch], batches=1, progress=False)
        job = Job(model, targets, 4000, [batch], 1, keep=("classifier",), task_type="SEQ_CLS")
        adapted = make_entry(method).contestant.adapt(job, profile)
        settings = TrainingSettings(head_learning_rate=0.5, warmup=0.0, max_grad_norm=1e9)
        loop = Loop(adapted, settings, 1, 1e-3, ("classifier",), lambda _: {"accuracy": 0.0})
        name = next(
            n
            for n, p in adapted.model.named_parameters()
            if n.endswith(("classifier.weight", "default.weight"))
            and "classifier" in n
            and p.requires_grad
        )
        before = adapted.model.get_parameter(name).detach().clone()
        loop.run(iter([batch]))
        moved = (adapted.model.get_parameter(name).detach() - before).abs().max()
        # a first step of Adam moves every entry by the learning rate
        assert float(moved) == pytest.approx(0.5, rel=1e-3), method


def test_accumulated_batches_have_the_gradient_of_one_large_batch() -> None:
    batches = _batches(2)
    batches[1]["labels"][:, :7] = -100
    whole = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
    weights = []
    for settings, given in (({"gradient_accumulation": 2}, batches), ({}, [whole])):
        adapted, _ = _adapt("lora")
        training = TrainingSettings(**settings)
        Loop(adapted, training, 1, 1e-2, (), lambda _: {"loss": 0.0}).run(iter(given))
        weights.append([p.detach().clone() for p in adapted.model.parameters() if p.requires_grad])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


def test_gradients_of_adapters_and_head_are_clipped_together() -> None:
    from rankwise.experiments.loop import _step

    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for parameter, slope in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([slope])
    _step([torch.optim.SGD([p], lr=1.0) for p in parameters], 1.0)
    assert [p.item() for p in parameters] == pytest.approx([-0.6, -0.8], rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "lora+", "lora-fa", "lr-lora"])
def test_weight_decay_reaches_every_optimizer(method: str) -> None:
    from rankwise.experiments.loop import make_optimizers

    adapted, _ = _adapt(method)
    (optimizer,) = make_optimizers(adapted, 1e-2, TrainingSettings(weight_decay=0.3), ())
    assert 0.3 in {group["weight_decay"] for group in optimizer.param_groups}


@pytest.mark.parametrize(
    ("method", "ratio"),
    [
        ("lr-lora", 0.1),
        ({"name": "lr-lora", "amplitude_ratio": 0.5}, 0.5),
        ({"name": "water-fill", "adapter": "lr-lora", "points": 5}, 0.1),
    ],
)
def test_amplitudes_have_a_rate_of_their_own(method: str | dict[str, Any], ratio: float) -> None:
    adapted, _ = _adapt(method)
    assert adapted.make_optimizer is not None
    groups = adapted.make_optimizer(adapted.model, 1e-2, 0.0).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([1e-2, ratio * 1e-2])


def test_alpha_over_r_scales_every_update() -> None:
    for scale in (1.0, 4.0):
        for name in ("lora", "ralora", "lr-lora", "melora", "water-fill", "gralora"):
            own = {"scaling": "paper"} if name == "ralora" else {}
            adapted, _ = _adapt({"name": name, "alpha_over_r": scale} | own)
            scales = {
                value
                for module in adapted.model.modules()
                if isinstance(getattr(module, "scaling", None), dict)
                for value in module.scaling.values()
            }
            assert scales == {scale}, name


def test_a_random_control_draws_by_the_seed_of_the_run() -> None:
    sizes = [_adapt("random", seed=seed)[0].size for seed in (0, 0, 1)]
    assert sizes[0] is not None and sizes[1] is not None and sizes[2] is not None
    assert sizes[0].values == sizes[1].values != sizes[2].values


def test_every_name_makes_an_entry() -> None:
    for name in known_methods():
        entry = make_entry(name)
        assert entry.label == name
        assert (entry.reason is not None) == (name in ("mora", "nola", "dylora", "elalora"))
    with pytest.raises(ConfigError, match="head-only needs"):
        _adapt("head-only")


def test_the_schedule_rises_and_falls() -> None:
    from rankwise.experiments.loop import evaluation_points, rate_factor

    cosine = TrainingSettings(warmup=0.1)
    factors = [rate_factor(step, 100, cosine) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([i / 11 for i in range(1, 11)])
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2))
    assert factors[55] == pytest.approx(middle)
    linear = TrainingSettings(warmup=0.0, scheduler="linear")
    assert [rate_factor(s, 4, linear) for s in range(1, 5)] == [1.0, 0.75, 0.5, 0.25]
    constant = TrainingSettings(warmup=0.5, scheduler="constant")
    rates = [rate_factor(s, 4, constant) for s in range(1, 5)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert evaluation_points(10, 4) == {2, 5, 8, 10}


def test_a_random_grid_is_drawn_by_the_seed_of_the_run() -> None:
    for entry in ({"name": "lr-lora"}, {"name": "gard", "adapter": "lr-lora", "r_min": 0}):
        seeds = [
            _adapt(entry | {"grid": "random"}, seed=seed)[0].model.peft_config["default"].grid_seed
            for seed in (0, 3)
        ]
        assert seeds == [0, 3]
        assert _adapt(entry, seed=3)[0].model.peft_config["default"].grid_seed == 0


def test_melora_has_two_blocks_unless_told_otherwise() -> None:
    for options, blocks in (({}, 2), ({"blocks": 4}, 4)):
        adapted, _ = _adapt({"name": "melora"} | options)
        assert adapted.model.peft_config["default"].blocks == blocks
