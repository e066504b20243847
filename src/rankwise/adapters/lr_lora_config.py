"""What an LR-LoRA adapter is: the configuration that is saved beside its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from peft import PeftConfig

from rankwise.adapters import options
from rankwise.adapters.registration import peft_type
from rankwise.adapters.transfer import BASES, BasisName, GridKind

Start = Literal["live", "paper", "grid_shift", "small"]
Share = Literal["none", "grid", "bandwidth", "amplitude", "all"]


@dataclass
class LrLoraConfig(PeftConfig):
    """Configuration of LR-LoRA adapters, as saved in `adapter_config.json`.

    Attributes:
        r: Rank of `B A`, where `rank_pattern` names no other; also the reference rank of the
            scaling `alpha / r`, which is the same for every layer.
        alpha: Scaling numerator; default `2 r`, which the paper uses.
        rank_pattern: Module name, or the end of one after a dot -> rank. Names are literal, not
            regular expressions; the longest that matches counts.
        target_modules: As in PEFT. `rankwise.placed_modules` names those of one kind or some
            layers.
        exclude_modules: As in PEFT.
        dropout: Probability of dropping an input column of the update, one mask a forward pass:
            the update is a matrix before it meets tokens, so each cannot have a mask of its own.
        basis: `"sinc"`, `"rbf"`, `"spline"`, `"fourier"`, `"polynomial"`, or `"sine"`, SineLoRA's
            fixed `sin(omega B A) / sqrt(d_in)`.
        points: Grid points K, default 50; a module has 2K parameters (LR-LoRA section 4.1), 3K
            with a learned grid, whatever the basis.
        span: Half width L of the grid; default 3 (the same).
        grid: `"uniform"`, `"chebyshev"`, `"random"` or `"learned"`; sinc and rbf only.
        grid_seed: Of the random grid.
        bandwidth: `"learned"`, as `softplus(v_k)`, or `"fixed"`; sinc and rbf only.
        bandwidth_init: `w_k` at the start; default 1 (the same).
        init: `"live"`, the default: amplitudes zero and B random at A's scale, so that the update
            is zero and everything has a gradient once the amplitudes have moved. `"paper"`:
            amplitudes and B zero, which is a dead point of A and B: f stays even, so `f'(0) = 0`.
            `"grid_shift"`: the same with the grid moved by a quarter of a cell, so that f is not
            even. `"small"`: B zero, amplitudes normal; the update is a small constant.
        amplitude_std: Of the amplitudes under `init="small"`; default 0.1 (LR-LoRA table 18).
        constant: Whether f keeps its value `f(0)`, which adds the same number to every entry of
            the update. False subtracts it: `delta_W = s (f(B A) - f(0))`.
        omega: Frequency of the basis `"sine"`.
        share: Which parameters of f all modules have in common (LR-LoRA table 20).
        init_weights: False draws all parameters at random, so that the adapter does something (for
            tests).
        bias: `"none"`, `"all"` or `"lrlora_only"`, as in PEFT.
        modules_to_save: As in PEFT.
        layers_to_transform: As in PEFT.
        layers_pattern: As in PEFT.
        base_fingerprint: Of the model it was trained on; written by `attach`.
    """

    r: int = 8
    alpha: float | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    dropout: float = 0.0
    basis: BasisName = "sinc"
    points: int = 50
    span: float = 3.0
    grid: GridKind = "uniform"
    grid_seed: int = 0
    bandwidth: Literal["learned", "fixed"] = "learned"
    bandwidth_init: float = 1.0
    init: Start = "live"
    amplitude_std: float = 0.1
    constant: bool = True
    omega: float = 100.0
    share: Share = "none"
    init_weights: bool = True
    bias: Literal["none", "all", "lrlora_only"] = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    base_fingerprint: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("lrlora")
        options.check_targets(self)
        self._check_numbers()
        self._check_basis()

    def _check_numbers(self) -> None:
        options.check_whole("r", self.r)
        options.check_pattern_keys("rank_pattern", self.rank_pattern)
        for key, rank in self.rank_pattern.items():
            options.check_whole(f"rank_pattern[{key!r}]", rank)
        if self.alpha is None:
            self.alpha = 2 * self.r
        options.check_whole("points", self.points, 2)
        options.check_whole("grid_seed", self.grid_seed, 0)
        if self.grid_seed >= 2**63:
            raise ValueError(f"grid_seed={self.grid_seed!r} must be below 2^63.")
        for name in ("alpha", "span", "bandwidth_init", "amplitude_std", "omega"):
            options.check_positive(name, getattr(self, name))
        options.check_dropout(self.dropout)

    def _check_basis(self) -> None:
        options.check_choice("basis", self.basis, tuple(BASES))
        options.check_choice("grid", self.grid, get_args(GridKind))
        options.check_choice("bandwidth", self.bandwidth, ("learned", "fixed"))
        options.check_choice("init", self.init, get_args(Start))
        options.check_choice("share", self.share, get_args(Share))
        options.check_choice("bias", self.bias, ("none", "all", "lrlora_only"))
        if not BASES[self.basis].local:
            for name, default in (("grid", "uniform"), ("bandwidth", "learned")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} says nothing about basis={self.basis!r}, "
                        "which has no grid and no bandwidths; leave it out or use 'sinc' or 'rbf'."
                    )
            if self.init == "grid_shift":
                raise ValueError(
                    f"init='grid_shift' needs a grid, which basis={self.basis!r} lacks; use 'live'."
                )

    def rank_of(self, module: str) -> int:
        """The rank of a module's factors."""
        return options.longest_match(self.rank_pattern, module, self.r)

    @property
    def scaling(self) -> float:
        """The factor s, `alpha / r`."""
        assert self.alpha is not None
        return self.alpha / self.r
