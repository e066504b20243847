"""The numbers per module that a heatmap and the table of modules can show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rankwise.report.views import PlanView, ProfileView, UpdateView
from rankwise.report.words import percent, scientific, short, whole


@dataclass(frozen=True)
class Measure:
    """One number per module.

    Attributes:
        key: Its name in `report.json`.
        label: What the switch and the colour bar say.
        unit: Its unit, for the colour bar.
        reading: One sentence on how to read it.
        show: The number as text.
        base: The base of a logarithmic colour scale, or None for a linear one.
        wide: Whether the scale turns logarithmic where values span a factor of 16 or more.
    """

    key: str
    label: str
    unit: str
    reading: str
    show: Callable[[float], str]
    base: int | None = None
    wide: bool = False


PROFILE_MEASURES = (
    Measure(
        "gid",
        "GID",
        "dimensions",
        "Gradient intrinsic dimensionality: how many directions the mean gradient of the module's "
        "weight really uses. High (yellow) asks for more blocks or rank, low (blue) for less.",
        short,
    ),
    Measure(
        "energy_rank",
        "Energy rank",
        "batch gradients",
        "How many independent batch gradients hold 90 % of the energy of all of them (GARD): it "
        "counts batches, at most as many as were profiled, and is not the rank of one matrix.",
        whole,
    ),
    Measure(
        "directions",
        "Directions for 90 %",
        "dimensions",
        "How many singular directions of the mean gradient hold 90 % of its energy: the rank that "
        "would keep that much of it.",
        whole,
        wide=True,
    ),
    Measure(
        "stable_rank",
        "Stable rank",
        "dimensions",
        "Squared singular values summed and divided by the largest: like GID, but deaf to the many "
        "small directions. Near 1, one direction dominates the gradient.",
        short,
        wide=True,
    ),
    Measure(
        "participation_ratio",
        "Participation ratio",
        "dimensions",
        "How many directions share the gradient's energy: 1 if one holds it all, k if k hold equal "
        "parts.",
        short,
        wide=True,
    ),
    Measure(
        "sensitivity",
        "Sensitivity",
        "mean |W·G|, loss",
        "How much the loss would move if weights changed in proportion to themselves.",
        scientific,
        10,
    ),
    Measure(
        "gradient_norm",
        "Gradient norm",
        "loss per unit of weight",
        "The length of the module's mean gradient: where one step of equal size changes the loss "
        "most.",
        scientific,
        10,
    ),
    Measure(
        "fisher",
        "Fisher",
        "mean squared gradient",
        "Mean entry of the empirical Fisher information: how sharply single samples pull at each "
        "weight.",
        scientific,
        10,
    ),
)
PLAN_MEASURES = (
    Measure(
        "rank",
        "Rank",
        "rank per module or block",
        "The rank that the method gave to the module (to each of its blocks). A blank cell has no "
        "adapter.",
        whole,
        wide=True,
    ),
    Measure(
        "blocks",
        "Blocks",
        "diagonal blocks",
        "The number n of diagonal blocks: the update can reach rank n times r at the parameters "
        "of rank r. Each colour step doubles n.",
        whole,
        2,
    ),
    Measure(
        "parameters",
        "Parameters",
        "trainable parameters",
        "Trainable parameters of the module's adapter, r × (inputs + outputs).",
        whole,
        wide=True,
    ),
    Measure(
        "captured",
        "Captured energy",
        "share of the gradient's energy",
        "How much of the mean gradient's energy the best update of this rank can hold.",
        percent,
    ),
)
UPDATE_MEASURES = (
    Measure(
        "update_stable_rank",
        "Stable rank",
        "dimensions",
        "How many directions the learned update really uses, of the rank it was given: near 1, "
        "most of that rank lies idle.",
        short,
    ),
    Measure(
        "update_rank",
        "Effective rank",
        "dimensions",
        "Entropy effective rank of the learned update, which also counts its weaker directions.",
        short,
        wide=True,
    ),
    Measure(
        "update_norm",
        "Update norm",
        "units of weight",
        "How far training moved the module: the Frobenius norm of the scaled update, s·B·A or "
        "s·f(B·A).",
        scientific,
        10,
    ),
    Measure(
        "condition_number",
        "Condition number",
        "largest over smallest",
        "Of LR-LoRA's basis functions on the entries of U: the larger, the less the amplitudes say "
        "one by one.",
        scientific,
        10,
    ),
    Measure(
        "precise_directions",
        "Directions above 1e-6",
        "dimensions",
        "How many independent directions the K basis functions span on the entries of U, to a "
        "millionth of the largest.",
        whole,
    ),
)


def telling_measure(view: ProfileView | PlanView | UpdateView) -> Measure:
    """The one that says most: GID, rank or blocks, stable rank of the learned update."""
    if isinstance(view, ProfileView):
        return PROFILE_MEASURES[0]
    if isinstance(view, UpdateView):
        return UPDATE_MEASURES[0]
    only_blocks = view.ranks.min == view.ranks.max and view.blocks.max > 1
    return PLAN_MEASURES[1] if only_blocks else PLAN_MEASURES[0]
