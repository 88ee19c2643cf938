"""How long a repair's newcomers take to compute a conversation anew, and how long they may. Pure.

Rules
- A newcomer's time is what was promised to it before, and then its own rows: as fast as it computes them beside what it
  computes anyhow, and no faster than its line sends them on.
- Who stands before newcomers sends its rows anew, which takes its line, and computes nothing.
- The limit is the least of a ladder that can be kept at all. How little can be kept is a minimax path over the edges
  between layers (a bottleneck path), which forgets that a device comes once; so the next steps may have to be tried.

It does not choose: `routing.py` searches for the cheapest chain within the limit.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

BESIDE_SHARE = 0.1
"""How much longer a device takes for each session that it has besides, over what those compute now."""
BUSY_MAX = 0.8
"""No device is thought to have less than the rest of its time for a rebuild."""
UPLINK_BYTES_PER_S = 2.5e6
"""What a home line sends. No device measures its own."""
WIRE_BYTES_PER_VALUE = 2
FRESH_GAIN = 2.0
"""How many times sooner all must be done for hops that live to be given up."""


class Offer(NamedTuple):
    """Layers `first` to `last` could be had in so many seconds."""

    first: int
    last: int
    takes_s: float


def send_row_s(values: int) -> float:
    """What a row of so many values takes on a home line."""
    return values * WIRE_BYTES_PER_VALUE / UPLINK_BYTES_PER_S


def busy_share(rows_per_s: float, layers_per_row: float, layer_s: float) -> float:
    """The share of its time that a device computes already. `layer_s`: one layer of a row by itself."""
    return min(BUSY_MAX, max(0.0, rows_per_s * layers_per_row * layer_s))


def newcomer_s(
    tokens: int, layer_count: int, layer_row_s: float, send_row_s: float, sessions: int, busy: float
) -> float:
    """Seconds until `tokens` rows have been computed anew and sent on.

    `layer_row_s`: one layer of one row among many; `send_row_s`: one row on the line; `busy`: see `busy_share`.
    """
    computing_s = layer_count * layer_row_s * (1 + BESIDE_SHARE * sessions) / (1 - min(busy, BUSY_MAX))
    return tokens * max(computing_s, send_row_s)


def least_s(offers: Iterable[Offer], layer_count: int) -> float:
    """The least of the longest times of all ways from the first layer to the last; infinite where there is none."""
    by_first: dict[int, list[Offer]] = {}
    for offer in offers:
        by_first.setdefault(offer.first, []).append(offer)
    reached = {0: 0.0}
    for edge in range(layer_count):
        so_far_s = reached.get(edge)
        if so_far_s is None:
            continue
        for _, last, takes_s in by_first.get(edge, ()):
            slowest_s = max(so_far_s, takes_s)
            if slowest_s < reached.get(last, math.inf):
                reached[last] = slowest_s
    return reached.get(layer_count, math.inf)


def limits_from(least: float, ladder_s: Sequence[float]) -> Iterator[float]:
    """The limits to try, lowest first: those of the ladder that may be kept, and none at all."""
    yield from (limit_s for limit_s in ladder_s if limit_s >= least)
    yield math.inf
