"""Integer ranks under a parameter budget: plain numbers in, plain numbers out.

Everything here works on mappings from module name to number, breaks ties by name, and knows nothing
of tensors or models. A module's *cost* is what one unit of rank takes, `d_in + d_out` parameters;
its *limits* are the smallest and the largest rank it may get.

Every rule is an order of *units*, the k-th rank of module l being one unit: units are taken in that
order until the budget is spent (`order.py`), and what is then left is spent as well as whole ranks
can (`exact.py`).
"""

from rankwise.allocation.blocks import block_count, dividing_blocks
from rankwise.allocation.limits import (
    Limits,
    box_limits,
    cheapest_next,
    check_feasible,
    fix_limits,
    parameters,
    rank_limits,
)
from rankwise.allocation.rules import (
    finds_largest_total,
    proportional_ranks,
    sensitivity_ranks,
    smoothed_shares,
    uniform_ranks,
    water_filling_ranks,
)

__all__ = [
    "Limits",
    "block_count",
    "box_limits",
    "cheapest_next",
    "check_feasible",
    "dividing_blocks",
    "finds_largest_total",
    "fix_limits",
    "parameters",
    "proportional_ranks",
    "rank_limits",
    "sensitivity_ranks",
    "smoothed_shares",
    "uniform_ranks",
    "water_filling_ranks",
]
