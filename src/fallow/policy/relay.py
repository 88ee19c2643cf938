"""When a link goes through the relay, and how much a sender may have under way there. Pure.

Two decisions:

- `dial_plan`: which ways to a peer are tried, and how long the relay waits for the direct way. A short head start, as
  "happy eyeballs" gives one address family over the other (RFC 8305): the direct way is better for as long as the link
  lives, so it goes first; a direct dial that fails takes seconds to say so, so it does not go first for long.
- `window_bytes` and `grant_due`: flow control by credits, as HTTP/2 and QUIC have it. The bus drops what a subscriber
  is too slow for, and what is dropped costs the link; so the receiver says how many bytes it will take.
"""

from enum import StrEnum
from typing import Final

import msgspec

HEAD_START_S: Final = 0.5
"""How long a direct dial runs alone. Within a continent a handshake through NAT takes less."""
SHORT_HEAD_START_S: Final = 0.05
"""The same where a direct dial failed lately."""
DIRECT_FAILURE_KEPT_S: Final = 300.0
"""How long a failed direct dial counts: people change networks."""

WINDOW_BYTES_MAX: Final = 1 << 20
"""Under way to one receiver on one link: 20 MB/s over a round trip of 50 ms."""
WINDOW_BYTES_MIN: Final = 128 << 10
"""What a sender may send before it was granted anything, and what a receiver of very many links still grants."""
WINDOWS_BYTES_MAX: Final = 16 << 20
"""What all links of one receiver are granted together, while there are few enough for `WINDOW_BYTES_MIN` each. A
quarter of what NATS holds for one client before it drops it."""
RECORD_COST_BYTES: Final = 256
"""Counted for a record beside its bytes, so that a window bounds the number of messages as well."""


class RelayUse(StrEnum):
    """What the policy says about the relay."""

    NEVER = "never"
    """Direct links or none."""
    WHEN_NEEDED = "auto"
    """Where no direct path exists."""
    ONLY = "only"
    """Every link: no device learns another's network address, and none listens on a port."""


class DialPlan(msgspec.Struct, frozen=True):
    """Which ways are tried, and when the relay starts after the direct way did."""

    direct: bool
    relay_after_s: float | None
    """`None`: not at all. It starts at once when the direct way fails earlier."""


def dial_plan(use: RelayUse, *, direct_known: bool, relay_known: bool, direct_failed_s_ago: float | None) -> DialPlan:
    """How to dial a peer that offers these ways. `direct_failed_s_ago`: since the last failure, if it is known."""
    direct = direct_known and use is not RelayUse.ONLY
    if use is RelayUse.NEVER or not relay_known:
        return DialPlan(direct, None)
    if not direct:
        return DialPlan(False, 0.0)
    failed_lately = direct_failed_s_ago is not None and 0 <= direct_failed_s_ago < DIRECT_FAILURE_KEPT_S
    return DialPlan(True, SHORT_HEAD_START_S if failed_lately else HEAD_START_S)


def record_cost_bytes(data_bytes: int) -> int:
    """What a record counts against its sender's window. One that carries no data is free: it grants, or ends."""
    return data_bytes + RECORD_COST_BYTES if data_bytes else 0


def window_bytes(links: int) -> int:
    """What each of a receiver's links may have under way."""
    return max(WINDOW_BYTES_MIN, min(WINDOW_BYTES_MAX, WINDOWS_BYTES_MAX // max(1, links)))


def grant_due(taken_bytes: int, granted_bytes: int, window: int) -> int | None:
    """The new grant, counted from the link's beginning, when it is time to tell the sender; else `None`.

    `taken_bytes`: what came and was passed on. Told in steps of a quarter of the window, since every telling is a
    message. A grant is never taken back.
    """
    wanted = taken_bytes + window
    return wanted if wanted - granted_bytes >= window // 4 else None
