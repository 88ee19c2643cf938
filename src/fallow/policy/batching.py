"""What an engine computes next: decode windows, prefill chunks, whose turn it is, and when to move a cache. Pure.

The attention kernel takes a batch of sessions only with one row each, in neighbouring slots. So ready decode steps run
in *windows* of slots; a slot in a window whose session has nothing to do is a pad, computed for nothing. Costs are in
units of one call of one row; measured on the default model, n rows cost `CALL_COST + n * ROW_COST`.
"""

from collections.abc import Sequence
from enum import Enum

import msgspec

CALL_COST = 0.78
ROW_COST = 0.22
GAP_PADS_MAX = 3
"""Pads that are cheaper than another call: `GAP_PADS_MAX * ROW_COST < CALL_COST`."""
BUSY_CHUNK_ROWS = 32
"""Rows of a prefill chunk while others decode: they wait a quarter of the time, at 10 % of the prefill's speed."""
GATHER_S = 0.002
"""How long the next of some rows that belong together may take: a gateway needs about 1 ms a token."""
SWAP_COST_PER_TOKEN = 0.001
"""Moving one token's keys and values, all layers of it: 0.0005 between slots in use, 0.002 into fresh memory."""


class Turn(Enum):
    """What a worker does next."""

    DECODE = "decode"
    """One call for the next row of every session that has a decode step."""
    PREFILL = "prefill"
    """One chunk of one session."""
    WAIT = "wait"


class Window(msgspec.Struct, frozen=True):
    """Slots `first` to `first + count`, computed in one call."""

    first: int
    count: int


class Swap(msgspec.Struct, frozen=True):
    """Exchange what two slots hold."""

    one: int
    other: int
    cost: float


def next_turn(previous: Turn, decode_ready: int, prefill_ready: int) -> Turn:
    """Decode goes first, and after every prefill chunk; prefill after every decode call: neither starves."""
    if decode_ready and (previous is not Turn.DECODE or not prefill_ready):
        return Turn.DECODE
    return Turn.PREFILL if prefill_ready else Turn.WAIT


def decode_groups(share: float) -> int:
    """Into how many groups a stage with this `share` of a model's layers takes the sessions that decode.

    While one group is here, the others are at the other stages: with all of them in one call, every other device of
    the chain would wait for this one. A whole model, or most of one, gains nothing from smaller calls.
    """
    return max(1, round(1 / share))


def decode_limit(active: int, groups: int) -> int:
    """How many of `active` decoding sessions one call takes."""
    return max(1, -(-active // groups))


def patience_s(row_s: float) -> float:
    """How long a team (`decode_teams.py`) waits for those who miss, where a call of one row takes `row_s`: as long as
    their own call would take without them. In vain it is at worst twice as dear as knowing (the ski rental rule)."""
    return max(GATHER_S, CALL_COST * row_s)


def decode_windows(slots: Sequence[int], rows_max: int) -> tuple[Window, ...]:
    """The cheapest windows of at most `rows_max` rows that cover `slots` (ascending, each once).

    The cost is a sum over windows and pads, so every gap can be judged by itself.
    """
    windows: list[Window] = []
    for slot in slots:
        last = windows[-1] if windows else None
        if last is not None:
            gap = slot - (last.first + last.count)
            if gap <= GAP_PADS_MAX and slot - last.first < rows_max:
                windows[-1] = Window(last.first, slot - last.first + 1)
                continue
        windows.append(Window(slot, 1))
    return tuple(windows)


def waste(slots: Sequence[int], windows: Sequence[Window]) -> float:
    """What a decode call of `slots` costs more than it would if they were neighbours."""
    pads = sum(window.count for window in windows) - len(slots)
    return pads * ROW_COST + (len(windows) - 1) * CALL_COST


def plan_swap(slots: Sequence[int], lengths: Sequence[int], wasted: float) -> Swap | None:
    """Bring one of `slots` (ascending; they decode together) closer to the others, once that pays.

    `lengths`: tokens that every slot holds, 0 for a free one. `wasted`: what decode calls have cost too much since the
    last swap. Whether the same sessions will go on together nobody knows; moving when as much has been lost as the
    move costs is at worst twice as dear as knowing (the ski rental rule).
    """
    count = len(slots)
    if count < 2 or slots[-1] - slots[0] == count - 1 or wasted <= 0.0:
        return None
    inside = set(slots)
    starts = range(max(0, slots[0] - count + 1), min(slots[-1], len(lengths) - count) + 1)
    start = max(starts, key=lambda first: sum(slot in inside for slot in range(first, first + count)))
    holes = [slot for slot in range(start, start + count) if slot not in inside]
    strays = [slot for slot in slots if not start <= slot < start + count]
    one = min(strays, key=lambda slot: lengths[slot])
    other = min(holes, key=lambda slot: lengths[slot])
    cost = (lengths[one] + lengths[other]) * SWAP_COST_PER_TOKEN
    return Swap(one, other, cost) if wasted >= cost else None


def chunk_rows(remaining: int, decoding: int, rows_max: int) -> int:
    """Rows of the next prefill chunk: smaller while others decode, so that they wait less."""
    return min(remaining, rows_max if decoding == 0 else min(BUSY_CHUNK_ROWS, rows_max))
