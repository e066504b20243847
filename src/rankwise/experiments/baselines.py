"""Other people's methods through PEFT, one row each, sized to a parameter budget."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from peft import (
    AdaLoraConfig,
    EvaConfig,
    FourierFTConfig,
    GraloraConfig,
    HiraConfig,
    IA3Config,
    LoraConfig,
    LoraGAConfig,
    PeftConfig,
    PeftModel,
    RandLoraConfig,
    VeraConfig,
    initialize_lora_eva_weights,
)
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora import preprocess_loraga
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from rankwise.errors import ConfigError, nearest
from rankwise.experiments.drivers import AdaLoraDriver
from rankwise.experiments.sizing import (
    Adapted,
    Baseline,
    Batch,
    ConfigFactory,
    Job,
    Size,
    lora_cost,
)
from rankwise.targets import LinearShape

NOT_AVAILABLE: Mapping[str, str] = {
    "mora": "no kept library has it; PEFT 0.21 does not",
    "nola": "no kept library has it; PEFT 0.21 does not",
    "dylora": "no kept library has it; PEFT 0.21 does not",
    "elalora": "no kept library has it; PEFT 0.21 does not",
}
"""Methods that the papers compare with and that cannot be run, with the reason."""

SIZE_OPTIONS = frozenset(
    {
        "r", "init_r", "target_r", "rank_pattern", "alpha_pattern", "blocks_pattern",
        "n_frequency", "n_frequency_pattern", "target_modules", "exclude_modules",
        "modules_to_save", "task_type", "peft_type", "alpha", "lora_alpha", "base_fingerprint",
        "layers_to_transform", "layers_pattern", "auto_mapping", "base_model_name_or_path",
        "revision", "inference_mode", "total_step",
    }
)  # fmt: skip
"""Options of PEFT configurations that the budget, the targets or the run decide."""


def _unlimited(_: LinearShape) -> int:
    """VeRA's and RandLoRA's random bases may be larger than the weight."""
    return 2**62


def _rank_patterns(size: Size) -> tuple[int, dict[str, int]]:
    """The common rank, and an anchored pattern for every module with another."""
    common = size.common
    return common, {
        f"^{re.escape(name)}$": value for name, value in size.values.items() if value != common
    }


def common_options(job: Job) -> dict[str, Any]:
    """What every PEFT configuration says of targets, task and modules trained whole."""
    options: dict[str, Any] = {"target_modules": list(job.targets)}
    if job.task_type is not None:
        options["task_type"] = job.task_type
    if job.keep:
        options["modules_to_save"] = list(job.keep)
    return options


def _lora(**fixed: Any) -> ConfigFactory:
    """LoRA with alpha twice the rank of each module, so that the scaling is 2 everywhere."""

    def config(job: Job, size: Size) -> PeftConfig:
        rank, patterns = _rank_patterns(size)
        return LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            rank_pattern=patterns,
            alpha_pattern={key: 2 * value for key, value in patterns.items()},
            **common_options(job),
            **fixed,
        )

    return config


def _hira(job: Job, size: Size) -> PeftConfig:
    rank, patterns = _rank_patterns(size)
    return HiraConfig(r=rank, rank_pattern=patterns, **common_options(job))


def _gralora(job: Job, size: Size) -> PeftConfig:
    rank = size.common * 2
    return GraloraConfig(r=rank, alpha=2 * rank, gralora_k=2, **common_options(job))


def _adalora_start(target: int) -> int:
    """AdaLoRA's initial rank: 12 for 8, as in the RaLoRA paper's comparison."""
    return math.ceil(1.5 * target)


def _adalora(job: Job, size: Size) -> PeftConfig:
    """Warm-up for a tenth of the steps, and the ranks fixed for the last half."""
    target = size.common
    steps = max(job.steps, 10)
    return AdaLoraConfig(
        init_r=_adalora_start(target),
        target_r=target,
        lora_alpha=2 * target,
        tinit=max(1, round(0.1 * steps)),
        tfinal=max(1, round(0.5 * steps)),
        deltaT=max(1, round(0.01 * steps)),
        total_step=steps,
        **common_options(job),
    )


def _vera(job: Job, size: Size) -> PeftConfig:
    return VeraConfig(r=size.common, projection_prng_key=job.seed, **common_options(job))


def _randlora(job: Job, size: Size) -> PeftConfig:
    """Alpha is 20 times the rank of the bases, as PEFT advises; its default is that of rank 32."""
    rank = size.common
    return RandLoraConfig(
        r=rank, randlora_alpha=20 * rank, projection_prng_key=job.seed, **common_options(job)
    )


def _fourierft(job: Job, size: Size) -> PeftConfig:
    """Scaling 300 as in the RaLoRA paper's comparison; the spectrum starts at zero.

    PEFT's default, a normal one, is for about 1,000 frequencies. At LoRA's parameters there are
    ten times as many, and the update that it starts with is as large as the weights.
    """
    return FourierFTConfig(
        n_frequency=size.common,
        scaling=300.0,
        init_weights=True,
        random_loc_seed=job.seed,
        **common_options(job),
    )


def _ia3(job: Job, size: Size) -> PeftConfig:
    return IA3Config(feedforward_modules=[], **common_options(job))


def _loraplus_optimizer(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    return create_loraplus_optimizer(
        model,  # type: ignore[arg-type]
        AdamW,
        lr=lr,
        loraplus_lr_ratio=16,  # the ratio of the RaLoRA paper's comparison, and LoRA+'s own
        loraplus_weight_decay=weight_decay,
    )


def _lorafa_optimizer(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    assert isinstance(model, PeftModel)
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    return create_lorafa_optimizer(
        model, r=config.r, lora_alpha=config.lora_alpha, lr=lr, weight_decay=weight_decay
    )


def _freeze_a(job: Job, model: PeftModel) -> None:
    """LoRA-FA trains B only; frozen here already, so that the parameters count right."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)


def _initialise_eva(job: Job, model: PeftModel) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConfigError(
            "eva: PEFT masks a decoder's rows by the encoder's tokens; it has no encoder-decoders."
        )
    batches = [_for_eva(batch) for batch in job.batches]
    config: Any = model.peft_config["default"]
    least = math.ceil(max([config.r, *config.rank_pattern.values()]) * config.eva_config.rho)

    def rows(inputs: Any, tokens: Any, layer: str) -> Tensor:
        found = _rows_for_eva(inputs, tokens)
        if len(found) < least:  # PEFT would pass over every batch, without end
            raise ConfigError(
                f"eva: {layer} sees {len(found)} rows a batch, fewer than the {least} directions "
                "to be found; raise profile.batch_size, let prompts count (eva_config: "
                "{use_label_mask: false}), or leave the module out of the targets."
            )
        return found

    options: dict[str, Any] = {"prepare_layer_inputs_fn": rows, "show_progress_bar": False}
    if "input_ids" not in batches[0]:
        options["prepare_model_inputs_fn"] = None  # it finds tokens, which images have none of
    # PEFT compares inputs by a view, which a pooler's input, a slice, does not have
    layers = [
        m for m in model.modules() if isinstance(m, nn.Module) and isinstance(m, BaseTunerLayer)
    ]
    handles = [layer.register_forward_pre_hook(_contiguous) for layer in layers]
    try:
        initialize_lora_eva_weights(model, batches, **options)
    finally:
        for handle in handles:
            handle.remove()


def _contiguous(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in inputs)


def _rows_for_eva(inputs: Any, tokens: Any) -> Tensor:
    """A layer's inputs without padding, or all of them where they are not one a token: a pooler."""
    x: Tensor = inputs if isinstance(inputs, Tensor) else inputs[0]
    if isinstance(tokens, Tensor) and x.ndim == 3:
        return x[tokens.T.unbind()]
    return x.reshape(-1, x.shape[-1])


def _for_eva(batch: Batch) -> dict[str, Any]:
    """Without labels of rows, which PEFT would take for labels of tokens and mask by."""
    labels = batch["labels"]
    return {k: v for k, v in batch.items() if k != "labels" or labels.ndim > 1}


def _estimate_for_lora_ga(job: Job, config: Any) -> None:
    batches = list(job.batches)

    def run() -> None:
        for batch in batches:
            job.loss_fn(job.model, batch).loss.backward()

    with warnings.catch_warnings():
        # PEFT counts gradients by a hook that torch warns of where no input needs a gradient
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess_loraga(job.model, config, run)


BASELINES: Mapping[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline("lora", "Hu et al. 2022", lora_cost, _lora(), per_module=True),
        Baseline(
            "rslora", "Kalajdzievski 2023", lora_cost, _lora(use_rslora=True), per_module=True
        ),
        Baseline(
            "dora",
            "Liu et al. 2024",
            lambda shape, r: r * shape.rank_cost + shape.d_out,
            _lora(use_dora=True),
            per_module=True,
        ),
        Baseline(
            "pissa",
            "Meng et al. 2024",
            lora_cost,
            _lora(init_lora_weights="pissa"),
            per_module=True,
        ),
        Baseline(
            "olora",
            "Büyükakyüz 2024",
            lora_cost,
            _lora(init_lora_weights="olora"),
            per_module=True,
        ),
        Baseline(
            "lora+",
            "Hayou et al. 2024",
            lora_cost,
            _lora(),
            per_module=True,
            optimizer=_loraplus_optimizer,
        ),
        Baseline(
            "lora-fa",
            "Zhang et al. 2023",
            lambda shape, r: r * shape.d_out,
            _lora(),
            per_module=True,
            finish=_freeze_a,
            optimizer=_lorafa_optimizer,
        ),
        Baseline(
            "eva",
            "Paischer et al. 2024",
            lora_cost,
            _lora(init_lora_weights="eva", eva_config=EvaConfig()),
            finish=_initialise_eva,
            redistributes=True,
        ),
        Baseline(
            "lora-ga",
            "Wang et al. 2024",
            lora_cost,
            _lora(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()),
            prepare=_estimate_for_lora_ga,
        ),
        Baseline("hira", "Huang et al. 2025", lora_cost, _hira, per_module=True),
        Baseline(
            "gralora",
            "Jung et al. 2025",
            lambda shape, half: 2 * half * shape.rank_cost,
            _gralora,
        ),
        Baseline(
            "adalora",
            "Zhang et al. 2023",
            lambda shape, r: r * (shape.rank_cost + 1),
            _adalora,
            driver=AdaLoraDriver,
            allocated=lambda shape, r: _adalora_start(r) * (shape.rank_cost + 1),
        ),
        Baseline(
            "vera",
            "Kopiczko et al. 2024",
            lambda shape, r: r + shape.d_out,
            _vera,
            sizes=(1, 4096),
            limit=_unlimited,
            revision=2,  # the first drew the same projections for every seed
        ),
        Baseline(
            "randlora",
            "Albert et al. 2025",
            lambda shape, r: -(-shape.max_rank // r) * (r + shape.max_rank),
            _randlora,
            limit=_unlimited,
            revision=3,  # the second had alpha 640 at every rank
        ),
        Baseline(
            "fourierft",
            "Gao et al. 2024",
            lambda _, n: n,
            _fourierft,
            sizes=(1, 2**17),
            limit=lambda shape: shape.d_in * shape.d_out,
            revision=3,  # the second started from a random spectrum
        ),
        Baseline("ia3", "Liu et al. 2022", lambda shape, _: shape.d_out, _ia3, sizes=(1, 1)),
    )
}
"""Every baseline by name. Settings that are not the size are the papers' or PEFT's defaults."""


def full_fine_tuning(job: Job) -> Adapted:
    """Train the weights of the targets themselves, and `keep`; the budget does not apply."""
    kept = tuple(f"{name}." for name in job.keep)
    chosen = {f"{name}.weight" for name in job.targets}
    for name, parameter in job.model.named_parameters():
        parameter.requires_grad_(name in chosen or f"{name}.".startswith(kept or ("\0",)))
    return Adapted(job.model)


def find_baseline(name: str) -> Baseline:
    """A baseline by name.

    Raises:
        ConfigError: There is none; names the nearest, or why it is not available.
    """
    if name in NOT_AVAILABLE:
        raise ConfigError(f"method {name!r} is not available: {NOT_AVAILABLE[name]}.")
    if name not in BASELINES:
        raise ConfigError(f"{name!r} is not a baseline; {nearest(name, BASELINES)}")
    return BASELINES[name]
