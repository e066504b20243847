"""What a report knows: plain numbers and names, which `report.json` holds word for word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from rankwise.report.comparison_view import ComparisonView
from rankwise.report.training_views import (
    EventView,
    LandscapeView,
    LearnedView,
    RankHistory,
    TrackingView,
)

SCHEMA_VERSION = 3


@dataclass(frozen=True)
class Spread:
    """Mean and extremes of one number over modules."""

    mean: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one value."""
        listed = list(values)
        return cls(sum(listed) / len(listed), min(listed), max(listed))


@dataclass(frozen=True)
class ModuleGradient:
    """What a profile says of one module's mean gradient G.

    Attributes:
        d_in: Input features.
        d_out: Output features.
        gid: Entropy effective rank of G.
        stable_rank: Squared singular values summed, over the largest.
        participation_ratio: Of the squared singular values.
        directions: Fewest singular directions of G that hold `ENERGY` of its energy.
        energy_rank: GARD's, of the batches' Gram matrix, where that was measured.
        sensitivity: `mean |W * G|`, in loss.
        gradient_norm: Frobenius norm of G, in loss per unit of weight.
        batches: Batches that reached the module.
        zero_batches: Those of them that gave a gradient of exactly zero.
        fisher: Mean entry of the empirical Fisher information, where it was measured.
        singular_values: Of G, at the places that `ProfileView.sampled_at` names.
        energy: Part of the squared sum that the first so many singular values hold, there.
        convergence: GID after the batches that `Convergence.batches` names.
    """

    d_in: int
    d_out: int
    gid: float
    stable_rank: float
    participation_ratio: float
    directions: int
    energy_rank: int | None
    sensitivity: float
    gradient_norm: float
    batches: int
    zero_batches: int
    fisher: float | None
    singular_values: list[float]
    energy: list[float]
    convergence: list[float] | None


@dataclass(frozen=True)
class CurvePoint:
    """Share of the gradient energy that a budget captures, see `rankwise.curve.BudgetPoint`."""

    r: int
    parameters: int
    uniform: float
    water_fill: float


@dataclass(frozen=True)
class Curve:
    """The budget curve, the rank it recommends, and why."""

    points: list[CurvePoint]
    recommended_r: int
    recommendation: str


@dataclass(frozen=True)
class Convergence:
    """Mean GID after so many batches, over all modules and by kind, and what that says."""

    batches: list[int]
    mean: list[float]
    by_kind: dict[str, list[float]]
    verdict: str
    settled: bool


@dataclass(frozen=True)
class FisherCorrelations:
    """Correlations of GID with the Fisher information F over the modules that have both.

    A correlation is None where it is not defined, because all values are the same.
    """

    modules: int
    left_out: int
    pearson_log: float | None
    pearson_inverse: float | None
    spearman: float | None


@dataclass(frozen=True)
class ProfileView:
    """A gradient profile as the report shows it.

    `sampled_at` holds, for a module's number of singular values, the ranks (from 1) at which its
    spectrum is shown.
    """

    label: str
    provenance: dict[str, Any]
    gid: Spread
    gid_by_kind: dict[str, Spread]
    modules: dict[str, ModuleGradient]
    sampled_at: dict[str, list[int]]
    curve: Curve | None = None
    convergence: Convergence | None = None
    fisher: FisherCorrelations | None = None


@dataclass(frozen=True)
class ModuleAdapter:
    """The adapter of one module; a lone run record knows no shapes, hence no parameters.

    Attributes:
        rank: Rank of the adapter, or of each block.
        blocks: Diagonal blocks n.
        reach: Highest rank of the update, `n r`.
        d_in: Input features.
        d_out: Output features.
        parameters: Trainable parameters.
        captured: Part of the mean gradient's energy in its best approximation of this rank, for
            plain LoRA whose profile is in the report.
    """

    rank: int
    blocks: int
    reach: int
    d_in: int | None = None
    d_out: int | None = None
    parameters: int | None = None
    captured: float | None = None


@dataclass(frozen=True)
class Serving:
    """What an adapter needs to be served as plain LoRA.

    Attributes:
        largest_rank: The largest rank of any module, blocks counted in.
        uneven: Whether modules differ in rank.
        adapter: `"lora"`; or `"ralora"` or `"lr-lora"`, which have to be exported first.
        vllm_rank: The smallest `max_lora_rank` of vLLM that holds it, None if none does.
        padded_parameters: Parameters once every module is padded to the largest rank.
    """

    largest_rank: int
    uneven: bool
    adapter: str
    vllm_rank: int | None
    padded_parameters: int | None


@dataclass(frozen=True)
class PlanView:
    """A rank plan as the report shows it, or what a lone run record says of one.

    `even_rank` is the rank that its parameters would give to every module alike.
    """

    label: str
    method: str
    model: str
    model_fingerprint: str | None
    parameters: int
    ranks: Spread
    blocks: Spread
    modules: dict[str, ModuleAdapter]
    serving: Serving
    even_rank: float | None = None
    r_ref: int | None = None
    alpha: float | None = None
    budget: int | None = None
    used: float | None = None
    captured: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LossPoint:
    """One point of a loss curve in nats per token; perplexity is None where it overflows."""

    step: int
    loss: float
    perplexity: float | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class RunView:
    """A run record as the report shows it, with what else its folder holds.

    `ranks` and `blocks` are None for full fine-tuning, which has none.
    """

    label: str
    folder: str
    method: str
    model: str
    model_fingerprint: str
    seed: int
    trainable_parameters: int
    ranks: Spread | None
    blocks: Spread | None
    held_out: list[LossPoint]
    train_loss: list[LossPoint]
    seconds: dict[str, float]
    peak_memory_mib: float | None
    train_tokens: int
    dtype: str | None
    settings: dict[str, Any]
    data: dict[str, str]
    versions: dict[str, str]
    hardware: dict[str, str | int]
    commit: str | None
    finished: str
    events: list[EventView] = field(default_factory=list)
    rank_history: RankHistory | None = None
    tracking: TrackingView | None = None
    learned: LearnedView | None = None
    landscape: LandscapeView | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps taken, as far as the curves tell."""
        return max([point.step for point in (*self.held_out, *self.train_loss)], default=0)


@dataclass(frozen=True)
class ModuleUpdate:
    """The learned update `s B A` of one module; `singular_values` are those that can be non-zero.

    Attributes:
        d_in: Input features.
        d_out: Output features.
        rank: Rank of the adapter, or of each block.
        blocks: Diagonal blocks.
        update_norm: Frobenius norm, in units of the weights.
        update_stable_rank: Squared singular values summed, over the largest.
        update_rank: Entropy effective rank.
        singular_values: Largest first, at the places that `UpdateView.sampled_at` names.
        condition_number: Of LR-LoRA's map from its parameters to the update, where recorded.
        precise_directions: Directions of that map above 1e-6 of the largest, where recorded.
    """

    d_in: int
    d_out: int
    rank: int
    blocks: int
    update_norm: float
    update_stable_rank: float
    update_rank: float
    singular_values: list[float]
    condition_number: float | None = None
    precise_directions: float | None = None

    @property
    def reach(self) -> int:
        """Highest rank that `s B A` can have."""
        return min(self.rank * self.blocks, self.d_in, self.d_out)


@dataclass(frozen=True)
class UpdateView:
    """A trained adapter as the report shows it; places of the spectra as in `ProfileView`.

    Attributes:
        label: What tells it apart.
        kind: PEFT's name of its type, in lower case.
        base: The base model it names.
        modules: Learned updates by module.
        sampled_at: As in `ProfileView`.
        median_spectra: By kind, the median over its modules of the first, second, ... singular
            value, as far as all of them have one.
        other_tensors: Tensors of the file that are no factor of an update, such as trained heads.
    """

    label: str
    kind: str
    base: str
    modules: dict[str, ModuleUpdate]
    sampled_at: dict[str, list[int]]
    median_spectra: dict[str, list[float]]
    other_tensors: int


@dataclass(frozen=True)
class Check:
    """One line of the health panel; `good` is None for a fact that is neither good nor bad."""

    subject: str
    what: str
    value: str
    good: bool | None
    meaning: str


@dataclass(frozen=True)
class Report:
    """Everything a page shows, in the order of the paths it was made from."""

    runs: list[RunView] = field(default_factory=list)
    profiles: list[ProfileView] = field(default_factory=list)
    plans: list[PlanView] = field(default_factory=list)
    updates: list[UpdateView] = field(default_factory=list)
    comparisons: list[ComparisonView] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The models, or the comparisons where nothing names a model."""
        names = self.models or [comparison.title for comparison in self.comparisons]
        return ", ".join(names) or "a model"

    @property
    def models(self) -> list[str]:
        """Names of the models, each once."""
        names = [
            *(str(profile.provenance["model"]) for profile in self.profiles),
            *(run.model for run in self.runs),
            *(plan.model for plan in self.plans),
        ] or [update.base for update in self.updates]
        return list(dict.fromkeys(name for name in names if name))

    def to_json(self) -> dict[str, Any]:
        """The content of `report.json`, without the words."""
        return {"kind": "rankwise report", "schema_version": SCHEMA_VERSION, **_plain(self)}


def _plain(value: Any) -> Any:
    """What `asdict` gives, without a deep copy of every number (1.5 of 10 s for 2,000 modules)."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: _plain(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(own) for own in value]
    return value
