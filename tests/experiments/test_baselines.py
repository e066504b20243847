import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import AdamW
from transformers import T5Config, T5ForConditionalGeneration

from rankwise.errors import ConfigError
from rankwise.experiments.baselines import (
    BASELINES,
    NOT_AVAILABLE,
    find_baseline,
    full_fine_tuning,
)
from rankwise.experiments.methods import make_entry
from rankwise.experiments.sizing import Job
from rankwise.targets import LinearShape, find_targets
from tiny_models import tiny_llama

STEPS = 12


def _batches(count=3):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 61, (4, 10), generator=generator) for _ in range(count)]
    return [
        {"input_ids": i, "labels": i.clone(), "attention_mask": torch.ones_like(i)} for i in ids
    ]


def _job(rank=4, steps=STEPS):
    model = tiny_llama()
    targets = find_targets(model)
    budget = rank * sum(shape.rank_cost for shape in targets.values())
    return Job(model, targets, budget, _batches(), steps, task_type="CAUSAL_LM")


def _trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def _count(model):
    return sum(p.numel() for p in _trainable(model))


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.filterwarnings("ignore:.*(EVA|svd|redistribution).*")
def test_a_baseline_trains_with_the_parameters_it_was_solved_for(name):
    job = _job()
    adapted = BASELINES[name].adapt(job)
    if name == "adalora":  # it starts with half as many again and prunes
        assert _count(adapted.model) > adapted.size.parameters
    else:
        assert _count(adapted.model) == adapted.size.parameters
    if adapted.make_optimizer is None:
        optimizer = AdamW(_trainable(adapted.model), lr=1e-2)
    else:
        optimizer = adapted.make_optimizer(adapted.model, 1e-2, 0.0)
    batch = job.batches[0]
    losses = []
    for step in range(STEPS):
        loss = adapted.model(**batch).loss
        loss.backward()
        optimizer.step()
        if name == "adalora":
            adapted.model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1e-3


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "pissa", "olora", "lora+", "hira"])
def test_ranks_of_a_module_each_meet_any_budget_to_one_unit(name):
    job = _job()
    for budget in (job.budget, job.budget + 101, 3 * job.budget // 2):
        size = BASELINES[name].solve(job.targets, budget)
        assert 0 <= budget - size.parameters < max(s.rank_cost for s in job.targets.values())


def test_uneven_ranks_keep_one_scaling():
    baseline = BASELINES["dora"]
    adapted = baseline.adapt(_job())
    layers = [m for m in adapted.model.modules() if hasattr(m, "lora_A") and len(m.lora_A)]
    assert {layer.r["default"] for layer in layers} == {3, 4}
    assert {layer.scaling["default"] for layer in layers} == {2.0}


def test_lora_fa_trains_no_a():
    adapted = BASELINES["lora-fa"].adapt(_job())
    names = [name for name, p in adapted.model.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_B" in name for name in names)


def test_loraplus_gives_b_sixteen_times_the_rate():
    adapted = BASELINES["lora+"].adapt(_job())
    optimizer = adapted.make_optimizer(adapted.model, 1e-3, 0.0)
    rates = {group["lr"] for group in optimizer.param_groups if group["params"]}
    assert rates == {1e-3, 1.6e-2}


def test_ia3_cannot_be_matched_and_says_so():
    size = BASELINES["ia3"].solve(_job().targets, 100_000)
    assert not size.matched
    assert "-" in str(size)


@given(
    dims=st.lists(st.tuples(st.integers(8, 300), st.integers(8, 300)), min_size=1, max_size=9),
    budget=st.integers(1, 60_000),
)
@settings(max_examples=200)
def test_a_solved_size_is_the_best_there_is(dims, budget):
    targets = {f"m{i}": LinearShape(a, b) for i, (a, b) in enumerate(dims)}
    largest = min(shape.max_rank for shape in targets.values())
    size = BASELINES["adalora"].solve(targets, budget)
    totals = [
        r * sum(shape.rank_cost + 1 for shape in targets.values()) for r in range(1, largest + 1)
    ]
    assert abs(size.parameters - budget) == min(abs(total - budget) for total in totals)
    spread = BASELINES["lora"].solve(targets, budget)
    least = sum(shape.rank_cost for shape in targets.values())
    assert spread.parameters <= max(budget, least)
    for name, rank in spread.values.items():
        assert 1 <= rank <= targets[name].max_rank


def test_unknown_and_unavailable_names():
    for name in NOT_AVAILABLE:
        with pytest.raises(ConfigError, match="no kept library"):
            find_baseline(name)
    with pytest.raises(ConfigError, match="pissa"):
        find_baseline("pisa")
    with pytest.raises(ConfigError, match="budget=0"):
        BASELINES["lora"].solve(_job().targets, 0)


def test_sizes_are_printed():
    size = BASELINES["dora"].solve(_job().targets, _job().budget)
    assert "size 3-4" in str(size)
    assert size.matched
    assert math.isclose(size.parameters, _job().budget, rel_tol=0.02)


def test_full_fine_tuning_trains_the_targets_and_what_is_kept():
    job = replace(_job(), keep=("lm_head",))
    model = full_fine_tuning(job).model
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{target}.weight" for target in job.targets} | {"lm_head.weight"}
    model(**job.batches[0]).loss.backward()
    assert all(p.grad is not None for p in _trainable(model))


@pytest.mark.parametrize("name", ["vera", "randlora", "fourierft"])
def test_what_is_drawn_and_not_trained_follows_the_seed(name):
    def outputs(seed):
        torch.manual_seed(0)  # what is trained starts alike
        job = replace(_job(), seed=seed)
        model = BASELINES[name].adapt(job).model
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad and ("lambda" in key or "spectrum" in key):
                    parameter.fill_(0.1)  # otherwise the update is zero
            return model(**job.batches[0]).logits

    assert torch.equal(outputs(1), outputs(1))
    assert not torch.equal(outputs(1), outputs(2))


@pytest.mark.parametrize("name", ["lora", "fourierft", "randlora", "vera", "gralora"])
def test_training_starts_from_the_base(name):
    job = _job()
    base = job.model(**job.batches[0]).logits.detach()
    started = BASELINES[name].adapt(job).model.eval()(**job.batches[0]).logits
    torch.testing.assert_close(started, base, rtol=1e-5, atol=1e-5)


def test_randloras_scaling_does_not_follow_its_rank():
    for budget in (1, 4):
        job = replace(_job(), budget=_job().budget * budget)
        config = BASELINES["randlora"].adapt(job).model.peft_config["default"]
        assert config.randlora_alpha == 20 * config.r


@pytest.mark.filterwarnings("ignore:.*(EVA|eva|svd|redistribution).*")
def test_eva_may_look_at_prompts():
    """PEFT's EVA counts the tokens with labels alone, of which short answers have too few."""
    batches = [dict(batch) for batch in _batches()]
    for batch in batches:
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        batch["labels"][:, -1] = 1
    with pytest.raises(ConfigError, match="let prompts count"):
        BASELINES["eva"].adapt(replace(_job(), batches=batches))
    contestant = make_entry({"name": "eva", "eva_config": {"use_label_mask": False}}).contestant
    job = replace(_job(), batches=batches)
    config = contestant.adapt(job, None).model.peft_config["default"]
    assert config.eva_config.use_label_mask is False and config.eva_config.rho == 2.0
    with pytest.raises(ConfigError, match=r"eva\.eva_config\.rhoo: .*did you mean 'rho'"):
        make_entry({"name": "eva", "eva_config": {"rhoo": 1}})


@pytest.mark.filterwarnings("ignore:.*(EVA|eva|svd|redistribution).*")
def test_eva_on_an_encoder_decoder_is_refused():
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
            decoder_start_token_id=0,
        )
    )  # fmt: skip
    job = replace(_job(), model=model, targets=find_targets(model), task_type="SEQ_2_SEQ_LM")
    with pytest.raises(ConfigError, match=r"eva: .* no encoder-decoders"):
        BASELINES["eva"].adapt(job)
