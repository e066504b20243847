"""The reverse layer sweep measures what hooks measure, or says why not and lets them."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import rankwise.profiling.sweep as sweep_module
from rankwise.errors import ProfileError
from rankwise.profiling import BatchLoss, GradientProfile, model_loss, profile_gradients
from rankwise.profiling.batches import Job
from rankwise.profiling.hooks import gram_bytes
from rankwise.targets import find_targets
from tiny_models import ARCHITECTURES, Batch, tiny_gpt2, tiny_llama, tiny_t5, token_batch

ALL = ("mean", "gram", "fisher", "convergence")
ROWS = [[9, 6], [5, 4, 7], [3], [8, 8]]
CHECKPOINTING = [None, {"use_reentrant": True}, {"use_reentrant": False}]
CHECKPOINTING_IDS = ["plain", "reentrant", "non-reentrant"]

stacks = pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert-mlm", "bert-classifier"])
precisions = pytest.mark.parametrize(
    ("dtype", "rel"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"]
)


def model_and_batches(architecture: str, **options: Any) -> tuple[PreTrainedModel, list[Batch]]:
    make_model, make_batch = ARCHITECTURES[architecture]
    return make_model(**options), [make_batch(rows, seed=i) for i, rows in enumerate(ROWS)]


def measure(model: nn.Module, batches: Sequence[Any], **options: Any) -> GradientProfile:
    settings: dict[str, Any] = {
        "batches": len(batches),
        "statistics": ALL,
        "engine": "sweep",
        "keep_gradients": True,
    }
    return profile_gradients(model, batches, **(settings | options))


def assert_same(found: GradientProfile, expected: GradientProfile, rel: float) -> None:
    assert list(found.modules) == list(expected.modules)
    for name, entry in found.modules.items():
        other = expected.modules[name]
        assert entry.gradient_norm == pytest.approx(other.gradient_norm, rel=rel)
        assert entry.sensitivity == pytest.approx(other.sensitivity, rel=rel)
        if entry.fisher is not None:
            assert entry.fisher == pytest.approx(other.fisher, rel=rel)
        for count in ("rows", "batches", "zero_batches"):
            assert getattr(entry, count) == getattr(other, count)
    for attribute in ("gradients", "gram", "convergence"):
        arrays, others = getattr(found, attribute), getattr(expected, attribute)
        assert (arrays is None) == (others is None)
        for name in arrays or ():
            error = float((arrays[name] - others[name]).norm())
            assert error <= rel * float(others[name].norm()), (attribute, name)
    for key in ("batches", "batch_sizes", "batch_items", "tokens", "data_fingerprint",
                "dropped_batches", "unlabelled_batches"):  # fmt: skip
        assert getattr(found.provenance, key) == getattr(expected.provenance, key)


class TestAgainstHooks:
    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
    @pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=CHECKPOINTING_IDS)
    @precisions
    @stacks
    def test_every_statistic(
        self,
        architecture: str,
        dtype: torch.dtype,
        rel: float,
        checkpointing: dict[str, bool] | None,
    ) -> None:
        model, batches = model_and_batches(architecture)
        model = model.to(dtype)
        expected = measure(model, batches, engine="hooks")
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        switches = [getattr(m, "gradient_checkpointing", None) for m in model.modules()]
        found = measure(model, batches, train_mode=checkpointing is not None)
        assert (found.provenance.engine, expected.provenance.engine) == ("sweep", "hooks")
        assert_same(found, expected, rel)
        assert [getattr(m, "gradient_checkpointing", None) for m in model.modules()] == switches

    @precisions
    @stacks
    def test_mean_gradient_against_autograd(
        self, architecture: str, dtype: torch.dtype, rel: float
    ) -> None:
        model, batches = model_and_batches(architecture)
        model = model.to(dtype)
        profile = measure(model, batches, statistics=())
        reference = copy.deepcopy(model).requires_grad_(True)
        items = profile.provenance.batch_items
        expected: dict[str, Any] = dict.fromkeys(profile.modules, 0.0)
        for batch, count in zip(batches, items, strict=True):
            reference.zero_grad()
            reference(**batch).loss.backward()
            for name in expected:
                module = reference.get_submodule(name)
                grad = module.weight.grad.T if isinstance(module, Conv1D) else module.weight.grad
                expected[name] = expected[name] + grad * (count / sum(items))
        assert profile.gradients is not None
        for name, gradient in profile.gradients.items():
            error = float((gradient - expected[name]).norm())
            assert error <= rel * float(expected[name].norm())

    @pytest.mark.parametrize("targets", [r".*layers\.1\..*_proj", ["layers.0.mlp.up_proj"]])
    def test_some_targets(self, targets: Any) -> None:
        model, batches = model_and_batches("llama", num_hidden_layers=3)
        found = measure(model, batches, targets=targets)
        assert found.provenance.engine == "sweep"
        assert_same(found, measure(model, batches, targets=targets, engine="hooks"), 1e-5)

    def test_dropout_is_drawn_alike(self) -> None:
        model = tiny_gpt2(resid_pdrop=0.3, attn_pdrop=0.2)
        batches = [token_batch([9, 6], seed=i) for i in range(3)]
        torch.manual_seed(5)
        found = measure(model, batches, train_mode=True)
        torch.manual_seed(5)
        expected = measure(model, batches, train_mode=True, engine="hooks")
        assert found.provenance.engine == "sweep"
        assert_same(found, expected, 1e-5)

    def test_own_loss(self) -> None:
        def last_logit(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
            return BatchLoss(logits[:, -1, 0].mean(), len(logits))

        model, batches = model_and_batches("llama")
        found = measure(model, batches, loss_fn=last_logit)
        assert found.provenance.engine == "sweep"
        assert_same(found, measure(model, batches, loss_fn=last_logit, engine="hooks"), 1e-5)

    def test_half_precision(self) -> None:
        model, batches = model_and_batches("llama")
        model = model.to(torch.bfloat16)
        found = measure(model, batches)
        assert found.provenance.engine == "sweep"
        assert_same(found, measure(model, batches, engine="hooks"), 5e-2)

    def test_unlabelled_batches(self) -> None:
        model, batches = model_and_batches("llama")
        batches[0] = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
        found = measure(model, batches)
        assert found.provenance.unlabelled_batches == [0]
        assert_same(found, measure(model, batches, engine="hooks"), 1e-5)
        with pytest.raises(ProfileError, match="none of the 1 batches has a labelled item"):
            measure(model, batches[:1])
        with pytest.raises(ProfileError, match="gave no batch"):
            profile_gradients(model, [], engine="sweep")


class TestChoice:
    @pytest.mark.parametrize(
        ("statistics", "engine"), [(("mean",), "hooks"), (("gram",), "sweep"), (ALL, "sweep")]
    )
    def test_auto(self, statistics: Sequence[str], engine: str) -> None:
        model, batches = model_and_batches("llama")
        profile = measure(model, batches, statistics=statistics, engine="auto")
        assert profile.provenance.engine == engine

    def test_unknown(self) -> None:
        with pytest.raises(ProfileError, match="engine='sweeep'; did you mean 'sweep'"):
            measure(tiny_llama(), [token_batch([5])], engine="sweeep")


def assert_falls_back(
    model: nn.Module, batches: Sequence[Any], reason: str, caplog: Any, **options: Any
) -> None:
    for engine, level in (("auto", "INFO"), ("sweep", "WARNING")):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            found = measure(model, batches, engine=engine, **options)
        messages = [r for r in caplog.records if "the layer sweep does not fit" in r.message]
        assert [record.levelname for record in messages] == [level]
        assert reason in messages[0].message
        assert found.provenance.engine == "hooks"
        assert_same(found, measure(model, batches, engine="hooks", **options), 1e-5)


class Stack(nn.Module):
    """Linear layers in a row, with the ways out of the row that a flag asks for."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.before = nn.Linear(4, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        h = F.pad(x, (0, 2)) if self.way != "target before" else self.before(x)
        seen = []
        for layer in self.layers:
            h = layer(h)
            seen.append(h)
            if self.way == "between":
                h = torch.sin(h)
        if self.way == "twice":
            h = self.layers[0](h)
        if self.way == "from the middle":
            h = h + 0.01 * seen[0]
        return type("Output", (), {"loss": F.cross_entropy(h, labels)})


class TestFallback:
    @pytest.mark.parametrize(
        ("way", "reason"),
        [
            ("twice", "not called once each"),
            ("from the middle", "its gradient of layers.0.0 is not the one that hooks see"),
            ("between", "its gradient of layers.1.0 is not"),
            ("target before", "its gradient of before is not"),
        ],
    )
    def test_models_that_are_no_plain_stack(
        self, way: str, reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        batches = [
            {"x": torch.randn(5, 4, generator=generator), "labels": torch.arange(5)}
            for _ in range(3)
        ]
        targets = "all-linear" if way == "target before" else r"layers.*"
        assert_falls_back(Stack(way), batches, reason, caplog, targets=targets)
        profile = measure(Stack("plain"), batches, targets=r"layers.*")
        assert profile.provenance.engine == "sweep"

    def test_encoder_decoder(self, caplog: pytest.LogCaptureFixture) -> None:
        batches = model_and_batches("t5")[1]
        assert_falls_back(tiny_t5(), batches, "the targets lie in 2 stacks", caplog)

    def test_no_stack(self, caplog: pytest.LogCaptureFixture) -> None:
        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            return BatchLoss(model(batch["x"]).square().mean(), 3)

        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        batches = [{"x": torch.randn(3, 4)}]
        assert_falls_back(model, batches, "lie in 0 stacks", caplog, loss_fn=loss_fn)

    def test_error_while_comparing(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(*_args: object) -> None:
            raise RuntimeError("out of order")

        model, batches = model_and_batches("llama")
        monkeypatch.setattr(sweep_module, "_run_top", broken)
        assert_falls_back(model, batches, "RuntimeError: out of order", caplog)


def spoil_gradient(model: nn.Module, module: str, value: float) -> None:
    """A NaN or an infinity in one module's output gradient wherever three rows are in a batch."""

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        if output.requires_grad and len(output) == 3:
            output.register_hook(lambda gradient: gradient * value)

    model.get_submodule(module).register_forward_hook(hook)


class TestDroppedBatches:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize(
        ("spoiled", "named"),
        [
            ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
            ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
            ("model.norm", "model.layers.1"),
            ("lm_head", "model.layers.1"),
        ],
    )
    @pytest.mark.parametrize("bad", [0, 7, 11])
    def test_batch_is_dropped_for_every_module(
        self, bad: int, spoiled: str, named: str, value: float, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = tiny_llama()
        rows = [[9, 4, 4] if i == bad else [9, 3 + i % 4] for i in range(12)]
        batches = [token_batch(lengths, seed=i) for i, lengths in enumerate(rows)]
        expected = measure(model, batches[:bad] + batches[bad + 1 :])
        spoil_gradient(model, spoiled, value)
        with caplog.at_level(logging.WARNING):
            profile = measure(model, batches)
        assert f"batch {bad} is dropped: non-finite gradient in module {named} " in caplog.text
        assert profile.provenance.engine == "sweep"
        assert profile.provenance.dropped_batches == [bad]
        object.__setattr__(profile.provenance, "dropped_batches", [])
        assert_same(profile, expected, 1e-12)

    def test_too_many(self) -> None:
        model = tiny_llama()
        spoil_gradient(model, "model.layers.0.mlp.up_proj", math.nan)
        batches = [token_batch([5] * (3 if i in (2, 11) else 2), seed=i) for i in range(12)]
        with pytest.raises(ProfileError, match=r"layers\.0\.mlp\.up_proj, batch 11: more than"):
            measure(model, batches)


def state(model: nn.Module) -> list[Any]:
    return [
        [p.requires_grad for p in model.parameters()],
        [p.grad is None for p in model.parameters()],
        [m.training for m in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
class TestEverythingIsGivenBack:
    @pytest.mark.parametrize("train_mode", [False, True])
    @pytest.mark.parametrize("engine", ["sweep", "auto"])
    def test_after_success(self, train_mode: bool, engine: str) -> None:
        model = tiny_gpt2(resid_pdrop=0.2).train()
        model.transformer.h[0].mlp.eval()
        model.transformer.wte.weight.requires_grad_(False)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        before = state(model)
        measure(model, [token_batch([6])] * 3, train_mode=train_mode, engine=engine)
        assert state(model) == before

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
    @pytest.mark.parametrize("call", range(8))
    def test_after_an_error(self, error: type[BaseException], call: int) -> None:
        """In the loss while comparing, while running forward, and in a layer run again."""
        model, calls = tiny_gpt2(), iter(range(100))

        def fail(_module: nn.Module, _inputs: object) -> None:
            if next(calls) == call:
                raise error("from the model")

        model.transformer.h[1].mlp.register_forward_pre_hook(fail)
        before = state(model)
        if call < 3 and error is not KeyboardInterrupt:  # comparing: hooks may yet manage
            assert measure(model, [token_batch([6])] * 3).provenance.engine == "hooks"
        else:
            shown = ProfileError if error is MemoryError else error
            with pytest.raises(shown, match=r"from the model|out of memory"):
                measure(model, [token_batch([6])] * 3)
        assert state(model) == before


def test_only_one_layers_gradients_live() -> None:
    """All batches of a layer are reduced before the layer below is run again."""
    model, batches = model_and_batches("llama", num_hidden_layers=3)
    order: list[str] = []
    for name in find_targets(model, ["down_proj"]):
        hook = lambda _m, _i, _o, name=name: order.append(name)  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    measure(model, batches)
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    n = len(batches)
    # by hooks, forward, and back through one batch to compare; then all batches
    assert order[:9] == names + names + names[::-1]
    assert order[9 : 9 + 3 * n] == names * n
    assert order[9 + 3 * n :] == [name for name in names[::-1] for _ in range(n)]


def test_memory_of_gram_matrices_by_hooks_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    model, batches = model_and_batches("llama")
    with caplog.at_level(logging.INFO, logger="rankwise"):
        measure(model, batches, targets=["up_proj"], engine="hooks")
    # 16 x 24 weights, 18 tokens of 40 numbers: two layers, four batches of fp32 gradients
    assert gram_bytes(job_of(model, ["up_proj"], 4), tokens=18) == 4 * 2 * 4 * 16 * 24
    assert gram_bytes(job_of(model, ["up_proj"], 4), tokens=3) == 4 * 2 * 4 * 3 * 40
    assert "keep every layer's gradients of all 4 batches, about 0.0 GB" in caplog.text


def job_of(model: nn.Module, targets: Sequence[str], batches: int) -> Job:
    selected = find_targets(model, targets)
    return Job(model, selected, model_loss, frozenset(), batches, train_mode=False, progress=False)
