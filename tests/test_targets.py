from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankwise.errors import TargetError
from rankwise.targets import (
    LayerPosition,
    LinearShape,
    exact_target_modules,
    find_targets,
    layer_position,
    linear_shape,
    linear_weight,
)
from tiny_models import (
    tiny_bert_classifier,
    tiny_bert_mlm,
    tiny_gpt2,
    tiny_mamba,
    tiny_phi3,
    tiny_qwen3,
    tiny_t5,
    tiny_vit,
)

LLAMA_KINDS = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (16, 8),
    "self_attn.v_proj": (16, 8),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (16, 24),
    "mlp.up_proj": (16, 24),
    "mlp.down_proj": (24, 16),
}
GPT2_KINDS = {
    "attn.c_attn": (16, 48),
    "attn.c_proj": (16, 16),
    "mlp.c_fc": (16, 64),
    "mlp.c_proj": (64, 16),
}
BERT_KINDS = {
    "attention.self.query": (16, 16),
    "attention.self.key": (16, 16),
    "attention.self.value": (16, 16),
    "attention.output.dense": (16, 16),
    "intermediate.dense": (16, 24),
    "output.dense": (24, 16),
}


def pairs(found: object) -> dict[str, tuple[int, int]]:
    return {name: (s.d_in, s.d_out) for name, s in found.items()}  # type: ignore[attr-defined]


def stack(prefix: str, kinds: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"{prefix}.{i}.{kind}": shape for i in range(2) for kind, shape in kinds.items()}


class TestAllLinear:
    def test_llama(self, tiny_llama: PreTrainedModel) -> None:
        found = find_targets(tiny_llama)
        assert pairs(found) == stack("model.layers", LLAMA_KINDS)
        assert found.left_out == {"lm_head": "the output head"}

    def test_gpt2_and_its_transposed_weights(self, tiny_gpt2: PreTrainedModel) -> None:
        found = find_targets(tiny_gpt2)
        assert pairs(found) == stack("transformer.h", GPT2_KINDS)
        assert list(found.left_out) == ["lm_head"]
        assert "tied" in found.left_out["lm_head"]
        assert "transformer.wte" in found.left_out["lm_head"]

    def test_bert_for_masked_words(self) -> None:
        found = find_targets(tiny_bert_mlm())
        assert pairs(found) == stack("bert.encoder.layer", BERT_KINDS)
        assert set(found.left_out) == {
            "cls.predictions.transform.dense",
            "cls.predictions.decoder",
        }

    def test_bert_classifier(self) -> None:
        found = find_targets(tiny_bert_classifier())
        pooler = {"bert.pooler.dense": (16, 16)}
        assert pairs(found) == stack("bert.encoder.layer", BERT_KINDS) | pooler
        assert found.left_out == {"classifier": "a task head, outside the model body"}

    def test_t5(self) -> None:
        found = find_targets(tiny_t5())
        attention = {"q": (16, 20), "k": (16, 20), "v": (16, 20), "o": (20, 16)}
        feed_forward = {"wi": (16, 24), "wo": (24, 16)}
        expected = {}
        for i in range(2):
            for side, uses in (
                ("encoder", ["layer.0.SelfAttention"]),
                ("decoder", ["layer.0.SelfAttention", "layer.1.EncDecAttention"]),
            ):
                for use in uses:
                    for kind, shape in attention.items():
                        expected[f"{side}.block.{i}.{use}.{kind}"] = shape
                last = f"{side}.block.{i}.layer.{len(uses)}.DenseReluDense"
                expected |= {f"{last}.{kind}": shape for kind, shape in feed_forward.items()}
        assert pairs(found) == expected
        assert list(found.left_out) == ["lm_head"]

    def test_qwen3_heads_of_another_size(self) -> None:
        found = find_targets(tiny_qwen3())
        assert found["model.layers.1.self_attn.q_proj"] == LinearShape(16, 24)
        assert found["model.layers.1.self_attn.v_proj"] == LinearShape(16, 6)
        assert "tied" in found.left_out["lm_head"]

    def test_phi3_fused_projections(self) -> None:
        kinds = {
            "self_attn.o_proj": (16, 16),
            "self_attn.qkv_proj": (16, 32),
            "mlp.gate_up_proj": (16, 48),
            "mlp.down_proj": (24, 16),
        }
        assert pairs(find_targets(tiny_phi3())) == stack("model.layers", kinds)

    def test_vit(self) -> None:
        found = find_targets(tiny_vit())
        assert len(found) == 12
        # neither the class token nor the positions, which have three axes, pass for experts
        assert found.left_out == {"classifier": "a task head, outside the model body"}

    def test_mamba_reads_weights_without_calling_their_layers(self) -> None:
        model = tiny_mamba()
        found = find_targets(model)
        assert pairs(found) == stack(
            "backbone.layers", {"mixer.in_proj": (16, 64), "mixer.x_proj": (32, 11)}
        )
        for part in ("dt_proj", "out_proj"):
            reason = found.left_out[f"backbone.layers.0.mixer.{part}"]
            assert reason == "read by a Mamba mixer without calling it"
            with pytest.raises(TargetError, match=rf"mixer\.{part} .*Mamba mixer"):
                find_targets(model, ["in_proj", part])

    def test_order_is_the_models(self, tiny_llama: PreTrainedModel) -> None:
        names = [name for name, _ in tiny_llama.named_modules()]
        found = list(find_targets(tiny_llama))
        assert found == sorted(found, key=names.index)

    def test_untied_heads_are_left_out_too(self) -> None:
        found = find_targets(tiny_gpt2(tie_word_embeddings=False))
        assert found.left_out == {"lm_head": "the output head"}

    def test_plain_module(self) -> None:
        model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), Conv1D(7, 5), nn.LayerNorm(7))
        assert pairs(find_targets(model)) == {"0": (3, 5), "2": (5, 7)}

    def test_expert_stacks_are_reported(self) -> None:
        config = MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
        )
        model = MixtralForCausalLM(config)
        found = find_targets(model)
        assert {name.rsplit(".", 1)[-1] for name in found} == {
            "q_proj", "k_proj", "v_proj", "o_proj",
        }  # fmt: skip
        experts = {name for name, reason in found.left_out.items() if "expert" in reason}
        assert experts == {
            "model.layers.0.mlp.experts.gate_up_proj",
            "model.layers.0.mlp.experts.down_proj",
        }
        with pytest.raises(TargetError, match=r"layers\.0\.mlp\.experts is a MixtralExperts"):
            find_targets(model, ["q_proj", "experts"])
        with pytest.raises(TargetError, match=r"layers\.0\.mlp\.experts is a MixtralExperts"):
            find_targets(model, r".*(q_proj|experts)")

    def test_multihead_attention_reads_a_weight_without_calling_its_layer(self) -> None:
        model = nn.TransformerEncoderLayer(8, 2, 16)
        found = find_targets(model)
        assert set(found) == {"linear1", "linear2"}
        assert found.left_out == {
            "self_attn.out_proj": "read by MultiheadAttention without calling it"
        }
        with pytest.raises(TargetError, match=r"self_attn\.out_proj .*MultiheadAttention"):
            find_targets(model, ["out_proj"])

    def test_nothing_linear(self) -> None:
        with pytest.raises(TargetError, match="no linear layer of Conv2d"):
            find_targets(nn.Conv2d(1, 1, 3))

    def test_only_a_head(self) -> None:
        embedding, head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        head.weight = embedding.weight
        with pytest.raises(TargetError, match="1 were found and all are heads or unusable"):
            find_targets(nn.Sequential(embedding, head))

    def test_text_says_what_was_left_out_and_why(self, tiny_llama: PreTrainedModel) -> None:
        assert str(find_targets(tiny_llama)) == (
            "14 target modules\nleft out: lm_head (the output head)"
        )
        named = str(find_targets(tiny_llama, ["q_proj"]))
        assert "and 10 more (not named in targets)" in named


class TestNames:
    @pytest.mark.parametrize(
        "names",
        [
            ["q_proj"],
            ["q_proj", "down_proj"],
            ["self_attn.q_proj"],
            ["layers.1.mlp.up_proj"],
            ["model.layers.0.self_attn.k_proj"],
        ],
    )
    def test_list_means_what_it_means_in_peft(
        self, tiny_llama: PreTrainedModel, names: list[str]
    ) -> None:
        config = LoraConfig(target_modules=names)
        all_names = [name for name, _ in tiny_llama.named_modules()]
        peft = [name for name in all_names if check_target_module_exists(config, name)]
        assert peft
        assert list(find_targets(tiny_llama, names)) == peft

    def test_list_does_not_match_inside_a_part(self, tiny_llama: PreTrainedModel) -> None:
        with pytest.raises(TargetError, match="'proj' matches no linear layer"):
            find_targets(tiny_llama, ["proj"])

    def test_left_out_are_those_not_named(self, tiny_llama: PreTrainedModel) -> None:
        found = find_targets(tiny_llama, ["q_proj"])
        assert len(found) == 2
        assert len(found.left_out) == 13
        assert found.left_out["lm_head"] == "not named in targets"

    def test_head_can_be_named(self, tiny_llama: PreTrainedModel) -> None:
        assert pairs(find_targets(tiny_llama, ["lm_head"])) == {"lm_head": (16, 61)}

    @pytest.mark.parametrize(
        "names", [["lm_head"], ["c_attn", "lm_head"], r"lm_head", r".*(c_attn|head)"]
    )
    def test_tied_head_is_refused(self, tiny_gpt2: PreTrainedModel, names: str | list[str]) -> None:
        with pytest.raises(TargetError, match=r"lm_head .*tied.*transformer\.wte"):
            find_targets(tiny_gpt2, names)

    @pytest.mark.parametrize(
        "names", [["embed_tokens"], r"model\.(embed_tokens|layers\.0\..*proj)"]
    )
    def test_embedding_is_refused(
        self, tiny_llama: PreTrainedModel, names: str | list[str]
    ) -> None:
        with pytest.raises(TargetError, match=r"model\.embed_tokens is a Embedding"):
            find_targets(tiny_llama, names)

    def test_unknown_name_proposes_the_nearest(self, tiny_llama: PreTrainedModel) -> None:
        with pytest.raises(TargetError, match=r"'q_porj' .*did you mean 'q_proj'\?"):
            find_targets(tiny_llama, ["up_proj", "q_porj"])
        with pytest.raises(TargetError, match=r"known: .*down_proj.*v_proj"):
            find_targets(tiny_llama, ["xyz"])

    @pytest.mark.parametrize("names", [["mlp"], ["q_proj", "mlp"], ["q_proj", "act_fn"]])
    def test_container_is_not_dropped_in_silence(
        self, tiny_llama: PreTrainedModel, names: list[str]
    ) -> None:
        with pytest.raises(TargetError, match=f"'{names[-1]}' matches no linear layer"):
            find_targets(tiny_llama, names)

    @pytest.mark.parametrize("names", [[], [""], ["q_proj", ""], [3], [None]])
    def test_list_of_something_else(self, tiny_llama: PreTrainedModel, names: list[str]) -> None:
        with pytest.raises(TargetError, match="non-empty list"):
            find_targets(tiny_llama, names)


class TestRegularExpressions:
    def test_full_match(self, tiny_llama: PreTrainedModel) -> None:
        found = find_targets(tiny_llama, r"model\.layers\.1\..*(q|up)_proj")
        assert list(found) == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]

    def test_the_end_of_a_name_is_not_enough(self, tiny_llama: PreTrainedModel) -> None:
        with pytest.raises(
            TargetError, match=r"whole names, such as 'model.*Write '\.\*\(q_proj\)"
        ):
            find_targets(tiny_llama, "q_proj")
        with pytest.raises(TargetError, match=r"matches no linear layer .* did you mean 'q_proj'"):
            find_targets(tiny_llama, "q_prj")

    def test_malformed(self, tiny_llama: PreTrainedModel) -> None:
        with pytest.raises(TargetError, match=r"'\(q_proj' is not a regular expression"):
            find_targets(tiny_llama, "(q_proj")

    def test_only_containers(self, tiny_llama: PreTrainedModel) -> None:
        with pytest.raises(TargetError, match="no full name of a linear layer"):
            find_targets(tiny_llama, r".*mlp")


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], r".*q_proj"])
def test_model_with_adapters_is_refused(
    tiny_llama: PreTrainedModel, targets: str | list[str]
) -> None:
    adapted = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TargetError, match=r"q_proj already carries an adapter.*unload"):
        find_targets(adapted, targets)
    assert len(find_targets(adapted.unload())) == 14


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (["a.b"], ["x.a.b"]),
        (["q"], ["encoder.q", "decoder.q"]),
        (["block.q", "x.block.q"], ["y.block.q", "block.qq"]),
        (["a+b", "a.b"], ["aab", "x.a.b"]),
        (["a.b"], ["a.c", "ab", "x.a.bb"]),
    ],
)
def test_exact_target_modules_match_nothing_else(names: list[str], others: list[str]) -> None:
    config = LoraConfig(target_modules=exact_target_modules(names, [*names, *others]))
    matched = [name for name in [*names, *others] if check_target_module_exists(config, name)]
    assert matched == names


def test_exact_target_modules_are_plain_names_where_they_can_be() -> None:
    assert exact_target_modules(["a.q", "b.q"], ["", "a", "a.q", "b.q", "b.k"]) == ["a.q", "b.q"]


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("model.layers.3.mlp.up_proj", LayerPosition("model.layers", 3, "mlp.up_proj")),
        ("encoder.block.1.layer.0.q", LayerPosition("encoder.block", 1, "layer.0.q")),
        ("bert.pooler.dense", LayerPosition("", None, "bert.pooler.dense")),
        ("0", LayerPosition("", None, "0")),
    ],
)
def test_layer_position(name: str, position: LayerPosition) -> None:
    assert layer_position(name) == position


def test_shape_numbers() -> None:
    shape = LinearShape(d_in=4096, d_out=1024)
    assert (shape.rank_cost, shape.max_rank) == (5120, 1024)


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 5), lambda: Conv1D(5, 3)])
def test_weight_maps_inputs_to_outputs(make: Callable[[], nn.Module]) -> None:
    module = make()
    assert linear_shape(module) == LinearShape(d_in=3, d_out=5)
    x = torch.randn(2, 3)
    weight = linear_weight(module)
    torch.testing.assert_close(x @ weight.T + module.bias, module(x))
    assert not weight.requires_grad


def test_other_modules_have_no_linear_shape() -> None:
    assert linear_shape(nn.Embedding(3, 5)) is None
    assert linear_shape(nn.Conv1d(3, 5, 1)) is None


def test_parametrised_weights_are_no_tied_ones() -> None:
    """They are a new tensor each time, whose place in memory another may take."""
    layers = [nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)) for _ in range(4)]
    found = find_targets(nn.Sequential(*layers, nn.Linear(8, 8)))
    assert "4" in found
    assert not any("tied" in reason for reason in found.left_out.values())
