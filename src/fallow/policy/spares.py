"""Which devices may hold a spare copy of a conversation's cache. Pure.

A spare copy is a second chain that computes what the first one does, and is used when that one breaks.

Rules
- It is worth what idle devices cost and no more: nobody should wait for it, and nobody be refused for it.
- What takes a device of the first chain may take its neighbours, so a spare copy lies in regions that the first chain
  is not in; where that cannot be, in a single one, so that the first chain's other regions may go; else anywhere.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Final

import msgspec

from fallow.domain.ids import NodeId
from fallow.policy.routing import Carrier

BUSY_MAX_SHARE: Final = 0.5
"""A device that computes more of its time than this holds no spare copies."""
WAIT_MAX_S: Final = 1.0
"""Nor does one that will be at prompts and rebuilds for longer, which were promised on it."""
ROOM_SHARE: Final = 0.5
"""A spare copy takes so much of a device's free KV room at most."""
REGIONS_MAX: Final = 4
"""So many regions are tried by themselves, those with most devices."""


def idle_part(carriers: Iterable[Carrier]) -> list[Carrier]:
    """Those that are idle enough, each with the room that a spare copy may take there."""
    return [
        msgspec.structs.replace(carrier, kv_free_bytes=int(carrier.kv_free_bytes * ROOM_SHARE))
        for carrier in carriers
        if carrier.busy_share <= BUSY_MAX_SHARE and carrier.rebuild_wait_s <= WAIT_MAX_S
    ]


def apart(carriers: Sequence[Carrier], first_chain: AbstractSet[NodeId]) -> Iterator[list[Carrier]]:
    """Of which carriers to make a spare copy, best first; the last are all. `first_chain`: the devices of that one."""
    regions = {carrier.region for carrier in carriers if carrier.node in first_chain}
    idle = idle_part(carrier for carrier in carriers if carrier.node not in first_chain)
    counts = Counter(carrier.region for carrier in idle)
    if not regions.issuperset(counts):
        yield [carrier for carrier in idle if carrier.region not in regions]
    if len(counts) > 1:
        for region, _ in counts.most_common(REGIONS_MAX):
            yield [carrier for carrier in idle if carrier.region == region]
    yield idle
