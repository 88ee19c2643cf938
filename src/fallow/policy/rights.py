"""Whether a grant allows what is asked of a device now. Pure: the shell has checked the signature and brings the time.

Rules
- A grant is for one gateway, one session, one device and one span of one model. Whatever differs is refused, and so is
  more than it gives: positions beyond its budget, more rows than repairs explain, a time after its end.
- Nothing that is missing counts as given. Every refusal says which of these it was, in words for a person.
- A renewal goes on where a grant ends: the same in everything, and good for longer.

Signatures, passports and who may sign are `trust/grants.py`'s.
"""

from enum import StrEnum
from typing import Final

import msgspec

from fallow.domain.credentials import PASSPORT_GRACE_S, Role
from fallow.domain.frames import OpenStage
from fallow.domain.grants import GRANT_LIFE_S, RECOMPUTED_MAX, Grant
from fallow.domain.ids import NodeId, SessionId

CLOCKS_APART_S: Final = PASSPORT_GRACE_S
"""How far the coordinator's clock and the device's may be apart."""
RENEW_BEFORE_S: Final = GRANT_LIFE_S / 3
"""How long before its end a gateway asks for a grant that follows: time for several attempts, and for a new leader."""
ORDER_LIFE_S: Final = 120.0
"""How old an order may be when it arrives, give or take `CLOCKS_APART_S`."""

LINKED: Final = frozenset({Role.NODE, Role.GATEWAY})
"""Who may hold links at all. A coordinator says who serves a session, and must not be able to name itself."""


class Refusal(StrEnum):
    """Which part of a grant does not allow what is asked."""

    CELL = "cell"
    NODE = "node"
    GATEWAY = "gateway"
    SESSION = "session"
    MODEL = "model"
    SPAN = "span"
    BUDGET = "budget"
    NOT_YET = "not_yet"
    EXPIRED = "expired"
    LIFE = "life"
    """It claims to be good for longer than any grant is."""
    OLDER = "older"
    """A renewal that ends no later than what it should renew."""
    ROWS = "rows"
    """More rows than its budget explains, repairs included."""


class Refused(msgspec.Struct, frozen=True):
    """What a grant does not allow, and in which words to say so."""

    refusal: Refusal
    words: str


class Here(msgspec.Struct, frozen=True, kw_only=True):
    """Where and when something is asked."""

    node: NodeId
    """The device that is asked."""
    cell: str
    gateway: NodeId
    """Who asks: the authenticated other end of the link."""
    now_unix_s: float


# --- roles ----------------------------------------------------------------------------------------


def may_link(role: Role) -> bool:
    """Whether such a process may hold links with others."""
    return role in LINKED


def may_compute(role: Role | None) -> bool:
    """Whether it may be sent the rows of a session. `None`: nobody knows its role."""
    return role is Role.NODE


def may_drive(role: Role | None) -> bool:
    """Whether it may open sessions on devices. `None`: nobody knows its role."""
    return role is Role.GATEWAY


# --- grants ---------------------------------------------------------------------------------------


def opening_refused(grant: Grant, opening: OpenStage, here: Here) -> Refused | None:
    """Why a grant does not allow an opening, or `None`."""
    return (
        _elsewhere(grant, here)
        or _session_refused(grant, opening.session)
        or _differs(Refusal.MODEL, "model", grant.model[:12], opening.model[:12], grant.model == opening.model)
        or _differs(Refusal.SPAN, "layers", grant.span, opening.span, grant.span == opening.span)
        or _differs(
            Refusal.BUDGET,
            "a reservation of at most",
            grant.token_budget,
            opening.reserve_tokens,
            opening.reserve_tokens <= grant.token_budget,
        )
        or _untimely(grant, here.now_unix_s)
    )


def renewal_refused(grant: Grant, session: SessionId, current: Grant, here: Here) -> Refused | None:
    """Why a grant does not go on where the session's current one ends, or `None`."""
    return (
        _elsewhere(grant, here)
        or _session_refused(grant, session)
        or _session_refused(current, session)
        or _differs(Refusal.MODEL, "model", current.model[:12], grant.model[:12], grant.model == current.model)
        or _differs(Refusal.SPAN, "layers", current.span, grant.span, grant.span == current.span)
        or _untimely(grant, here.now_unix_s)
        or _differs(
            Refusal.OLDER,
            "an end later than",
            f"{current.expires_unix_s:.0f}",
            f"{grant.expires_unix_s:.0f}",
            grant.expires_unix_s > current.expires_unix_s,
        )
    )


def rows_max(grant: Grant) -> int:
    """How many rows a device computes under it, counting those that are computed again."""
    return RECOMPUTED_MAX * grant.token_budget


def life_left_s(grant: Grant, now_unix_s: float) -> float:
    """For how long it is good from now on, by a clock that may be `CLOCKS_APART_S` away from its issuer's. To be
    turned into a deadline of the monotonic clock at once."""
    end_unix_s = min(grant.expires_unix_s, grant.issued_unix_s + GRANT_LIFE_S) + CLOCKS_APART_S
    return min(end_unix_s - now_unix_s, GRANT_LIFE_S + CLOCKS_APART_S)


def rows_refused(end: int, count: int, token_budget: int, rows_left: int, life_left_s: float) -> Refused | None:
    """Why rows that end at position `end` may not be computed, or `None`."""
    if end > token_budget:
        return Refused(Refusal.BUDGET, f"It allows {token_budget} tokens, and rows up to {end} came.")
    if count > rows_left:
        return Refused(Refusal.ROWS, f"It allows no more than {rows_left} rows to be computed, and {count} came.")
    if not life_left_s > 0:
        return Refused(Refusal.EXPIRED, "It ran out and was not renewed.")
    return None


# --- orders ---------------------------------------------------------------------------------------


def order_too_old(issued_unix_s: float, now_unix_s: float) -> bool:
    """Whether an order is from another time: an old one that somebody kept, or one from a clock that is wrong."""
    return not -CLOCKS_APART_S <= now_unix_s - issued_unix_s <= ORDER_LIFE_S + CLOCKS_APART_S


# --- the parts ------------------------------------------------------------------------------------


def _elsewhere(grant: Grant, here: Here) -> Refused | None:
    return (
        _differs(Refusal.CELL, "cell", grant.cell, here.cell, grant.cell == here.cell)
        or _differs(Refusal.NODE, "device", grant.node[:8], here.node[:8], grant.node == here.node)
        or _differs(Refusal.GATEWAY, "gateway", grant.gateway[:8], here.gateway[:8], grant.gateway == here.gateway)
    )


def _session_refused(grant: Grant, session: SessionId) -> Refused | None:
    return _differs(Refusal.SESSION, "session", grant.session[:8], session[:8], grant.session == session)


def _untimely(grant: Grant, now_unix_s: float) -> Refused | None:
    life_s = grant.expires_unix_s - grant.issued_unix_s
    if not 0 < life_s <= GRANT_LIFE_S:
        return Refused(Refusal.LIFE, f"A grant is good for up to {GRANT_LIFE_S:.0f} s, this one claims {life_s:.0f}.")
    if not grant.issued_unix_s <= now_unix_s + CLOCKS_APART_S:
        ahead_s = grant.issued_unix_s - now_unix_s
        return Refused(Refusal.NOT_YET, f"It begins in {ahead_s:.0f} s by this device's clock. Is the clock right?")
    if not life_left_s(grant, now_unix_s) > 0:
        late_s = now_unix_s - grant.expires_unix_s
        return Refused(Refusal.EXPIRED, f"It ran out {late_s:.0f} s ago by this device's clock.")
    return None


def _differs(refusal: Refusal, what: str, granted: object, asked: object, same: bool) -> Refused | None:
    return None if same else Refused(refusal, f"It is for {what} {granted}, and what came is {asked}.")
