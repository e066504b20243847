import pytest

from rankwise.errors import ConfigError
from rankwise.experiments.architectures import ARCHITECTURES, known_config, meta_model
from rankwise.experiments.tasks import (
    ClassificationTask,
    ClipTask,
    CompletionTask,
    GlueTextTask,
    ImageTask,
)
from rankwise.targets import count_parameters, find_targets

# published sizes, in millions
SIZES = {
    "meta-llama/Llama-3.1-8B": 8030.3,
    "Qwen/Qwen2-0.5B": 494.0,
    "microsoft/Phi-3-mini-4k-instruct": 3821.1,
    "EleutherAI/pythia-1.4b": 1414.6,
    "EleutherAI/pythia-2.8b": 2775.2,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134.5,
}
ENCODERS = {
    "FacebookAI/roberta-base": 124.6,
    "FacebookAI/roberta-large": 355.4,
    "sentence-transformers/all-MiniLM-L6-v2": 22.7,
}


def _millions(task):
    return count_parameters(meta_model(task)) / 1e6


@pytest.mark.parametrize("name", SIZES)
def test_decoders_have_their_published_size(name):
    task = CompletionTask(model=name, train="a", test="b")
    assert _millions(task) == pytest.approx(SIZES[name], rel=1e-3)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_have_their_published_size_but_for_the_head(name):
    task = ClassificationTask(model=name, train="a", test="b")
    assert _millions(task) == pytest.approx(ENCODERS[name], rel=0.01)


def test_t5_has_its_published_size():
    task = GlueTextTask(model="google-t5/t5-base", subset="sst2")
    assert _millions(task) == pytest.approx(222.9, rel=1e-3)


@pytest.mark.parametrize(("patch", "size"), [(16, 86.2), (32, 87.8)])
def test_clip_is_its_vision_tower_and_projection(patch, size):
    task = ClipTask(model=f"openai/clip-vit-base-patch{patch}", train="a", test="b", labels=3)
    assert _millions(task) == pytest.approx(size, rel=5e-3)


def test_dinov2_and_the_small_vit():
    dino = ImageTask(model="facebook/dinov2-base", train="a", test="b", labels=2)
    assert _millions(dino) == pytest.approx(86.6, rel=1e-2)
    small = ImageTask(model="models/small-vit", train="a", test="b", labels=4)
    assert _millions(small) < 0.4


def test_llama_attention_costs_what_the_paper_prints():
    model = meta_model(CompletionTask(model="meta-llama/Llama-3.1-8B", train="a", test="b"))
    targets = find_targets(model, ["q_proj", "k_proj", "v_proj", "o_proj"])
    cost = sum(shape.rank_cost for shape in targets.values())
    assert [r * cost for r in (8, 200, 380)] == [6_815_744, 170_393_600, 323_747_840]


def test_a_local_folder_is_known_by_its_name():
    assert known_config("models/all-MiniLM-L6-v2/").hidden_size == 384


def test_an_unknown_model():
    with pytest.raises(ConfigError, match=r"'some/model'.*Qwen2-0\.5B"):
        known_config("some/model")
    assert len(ARCHITECTURES) > 10
