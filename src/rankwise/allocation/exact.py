r"""Spending what the order of a rule left over, exactly, where shapes are few.

Transformers have few kinds of layer, so modules share few costs, and costs share a large divisor g.
Within one cost only the *number* of units matters: the rule's order says which. The prefix of units
that the order affords is therefore changed by whole numbers `delta_k` of units of cost `c_k`, with
`0 <= sum_k delta_k c_k <= left`, and the best change is found by dynamic programming over that sum.

Few changes suffice. Single moves, up or down one unit, can be ordered so that their partial sums
stay in `(-c_max, c_max]`: up while the sum is not positive, else down. Were there more moves than
the `2 c_max / g` sums in there, one would repeat, and the moves in between, which change no total,
can be left out; they gain nothing, because every unit taken has a priority no lower than any unit
not taken. So `|delta_k| <= 2 c_max / g` loses nothing, whatever the number of modules.

Whether this is affordable depends on costs and limits alone, never on the budget, so that the total
cannot fall from one budget to a larger one: the largest total never does; nor does that of the
largest energy, equal energies going to the larger total, for a smaller total would have been
affordable before and thus no better.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rankwise.allocation.order import Ints, Modules, Order

MOST_WORK = 10**8
"""Largest number of comparisons of a worst case that is tried; about a second."""
QUANTUM_BITS = 44
"""Energies are compared to this many bits below the largest; sums of thousands stay exact."""
_IMPOSSIBLE = -(2**62)

Energy = Callable[[Ints, Ints], Ints]
"""Whole-numbered value of the `units[i]`-th rank of module `members[i]`."""


@dataclass(frozen=True)
class Kind:
    """The modules of one cost.

    Attributes:
        cost: In units of the common divisor.
        members: Indices of modules.
        reach: Largest number of units that a best change can add or remove.
    """

    cost: int
    members: Ints
    reach: int


@dataclass(frozen=True)
class _Moves:
    """The next units of one kind, to add and to remove, in order."""

    kind: Kind
    up: list[int]
    down: list[int]
    up_value: Ints
    down_value: Ints


def kinds_of(modules: Modules) -> tuple[int, list[Kind]] | None:
    """Common divisor of the costs, and modules by cost; None where they are too many."""
    free = np.flatnonzero(modules.high > modules.low)
    costs = np.unique(modules.cost[free])
    if not costs.size:
        return None
    divisor = int(np.gcd.reduce(costs))
    bound = 2 * int(costs[-1]) // divisor
    units = (
        [
            int((modules.high - modules.low)[free][modules.cost[free] == cost].sum())
            for cost in costs
        ]
        if costs.size <= 1000
        else []
    )
    reach = [min(bound, count) for count in units]
    width = sum(2 * r * int(c) // divisor for r, c in zip(reach, costs, strict=False))
    if not units or sum(2 * r + 1 for r in reach) * width > MOST_WORK:
        return None
    return divisor, [
        Kind(int(cost) // divisor, free[modules.cost[free] == cost], r)
        for cost, r in zip(costs, reach, strict=True)
    ]


def complete(
    modules: Modules,
    order: Order,
    ranks: Ints,
    left: int,
    kinds: tuple[int, list[Kind]],
    energy: Energy | None = None,
) -> Ints:
    """The best change of a prefix that spends at most what is left.

    Args:
        modules: Costs and limits.
        order: Priorities; the ranks are a prefix of it.
        ranks: Units taken, up to the first that is not affordable.
        left: Parameters left.
        kinds: See `kinds_of`.
        energy: What to maximise; equal values go to the larger total. Default: the total, and of
            those the fewest moves.
    """
    divisor, every_kind = kinds
    room = left // divisor
    if not room and energy is None:
        return ranks
    reach, value = 4, 0
    while True:
        moves = [_moves(modules, order, ranks, kind, reach + 1, energy) for kind in every_kind]
        if energy is not None:
            moves = _worthwhile(moves, room, value)
        changes, spent, value = _solve(moves, reach, room, by_energy=energy is not None)
        if energy is not None:
            moves = _worthwhile(moves, room, value)
        elif spent == room:
            break
        if not any(max(len(move.up), len(move.down)) > reach for move in moves):
            break
        reach *= 4
    found = ranks.copy()
    for move, change in zip(moves, changes, strict=True):
        side, step = (move.up, 1) if change > 0 else (move.down, -1)
        np.add.at(found, np.array(side[: abs(change)], dtype=np.int64), step)
    return found


def _moves(
    modules: Modules, order: Order, ranks: Ints, kind: Kind, count: int, energy: Energy | None
) -> _Moves:
    """The next units of a kind, at most `count` each way."""
    kind = replace(kind, reach=min(kind.reach, count))

    def value(members: list[int], units: list[int]) -> Ints:
        if energy is None:
            return np.full(len(members), -1, dtype=np.int64)
        return energy(np.array(members, dtype=np.int64), np.array(units, dtype=np.int64))

    up = _next_units(modules, order, ranks, kind, up=True)
    down = _next_units(modules, order, ranks, kind, up=False)
    sign = 1 if energy is None else -1  # a move costs, an energy removed is lost
    return _Moves(kind, up[0], down[0], value(*up), sign * value(*down))


def _next_units(
    modules: Modules, order: Order, ranks: Ints, kind: Kind, *, up: bool
) -> tuple[list[int], list[int]]:
    """Modules and ranks of the next units to add, or of the last to remove, in order."""
    sign, unit_of = (1, 1) if up else (-1, 0)
    end = modules.high if up else modules.low
    members = kind.members[(end - ranks)[kind.members] * sign > 0]
    units = ranks[members] + unit_of
    priority = order.priority(members, units)
    # the first units are among the modules whose own first unit comes first
    key = -sign * priority
    if key.size > kind.reach:
        near = key <= np.partition(key, kind.reach)[kind.reach]
        members, units, priority, key = members[near], units[near], priority[near], key[near]
    chosen = np.lexsort((sign * modules.place[members], sign * units, key))[: kind.reach]
    queue = [
        (-sign * p, sign * u, sign * int(modules.place[m]), m)
        for m, u, p in zip(
            members[chosen].tolist(), units[chosen].tolist(), priority[chosen].tolist(), strict=True
        )
    ]
    heapq.heapify(queue)
    taken: list[int] = []
    ranks_of: list[int] = []
    while queue and len(taken) < kind.reach:
        _, unit, place, member = heapq.heappop(queue)
        taken.append(member)
        ranks_of.append(sign * unit)
        following = sign * unit + sign
        if (following <= end[member]) if up else (following > end[member]):
            p = float(order.priority(np.array([member]), np.array([following]))[0])
            heapq.heappush(queue, (-sign * p, sign * following, place, member))
    return taken, ranks_of


def _solve(
    moves: list[_Moves], reach: int, room: int, *, by_energy: bool
) -> tuple[list[int], int, int]:
    """Best number of units to add per kind, what they spend, and their value."""
    best = np.zeros(1, dtype=np.int64)
    choices: list[NDArray[np.int32]] = []
    lowest = 0
    for move in moves:
        cost, down, up = move.kind.cost, move.down_value[:reach], move.up_value[:reach]
        size = best.size + (len(down) + len(up)) * cost
        wider = np.full(size, _IMPOSSIBLE, dtype=np.int64)
        choice = np.zeros(size, dtype=np.int32)
        values = {0: 0}
        values |= {i: v for i, v in enumerate(np.cumsum(up).tolist(), 1)}
        values |= {-i: v for i, v in enumerate(np.cumsum(down).tolist(), 1)}
        for change in sorted(values, key=lambda n: (abs(n), n)):
            start = (change + len(down)) * cost
            place = slice(start, start + best.size)
            candidate = best + values[change]
            better = candidate > wider[place]
            wider[place][better] = candidate[better]
            choice[place][better] = change
        lowest -= len(down) * cost
        best = wider
        choices.append(choice)
    affordable = best[: room - lowest + 1]
    wanted = affordable == affordable.max() if by_energy else affordable > _IMPOSSIBLE // 2
    index = int(np.flatnonzero(wanted)[-1])
    spent, value = index + lowest, int(best[index])
    changes = []
    for move, choice in zip(reversed(moves), reversed(choices), strict=True):
        change = int(choice[index])
        changes.append(change)
        index -= (change + len(move.down_value[:reach])) * move.kind.cost
    return changes[::-1], spent, value


def _worthwhile(moves: list[_Moves], room: int, value: int) -> list[_Moves]:
    """The moves without those that no change as good as the value found can contain.

    With t the energy per cost of the best unit not taken, a change that spends s is worth
    `t s - sum losses`, a unit added losing `t c - e` and one removed `e - t c`: the units of one
    kind together may lose `t room - value` at most.
    """
    t = max((m.up_value[0] / m.kind.cost for m in moves if len(m.up_value)), default=0.0)
    gap = t * room - value

    def count(values: Ints, energy: float) -> int:
        counts = np.arange(1, len(values) + 1)
        losses = np.abs(counts * energy - np.abs(np.cumsum(values)))
        return int((losses <= gap * (1 + 1e-9) + 2 * counts).sum())  # values are rounded

    found = []
    for m in moves:
        up, down = count(m.up_value, t * m.kind.cost), count(m.down_value, t * m.kind.cost)
        found.append(_Moves(m.kind, m.up[:up], m.down[:down], m.up_value[:up], m.down_value[:down]))
    return found
