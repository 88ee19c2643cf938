"""Rights for one stage of one session: signed by a coordinator, checked at every open, counted on every frame.

Signing and checking signatures is `trust/grants.py`'s; whether a grant allows what is asked, `policy/rights.py`'s.
"""

import msgspec

from fallow.domain.fleet import NodeCommand
from fallow.domain.ids import Digest, NodeId, SessionId
from fallow.domain.model import Span

GRANT_LIFE_S = 600.0
RECOMPUTED_MAX = 4
"""Rows that a node computes under one grant, in budgets: repairs and follow-up turns compute some of them again."""


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """A gateway may have a node hold a session on a span, and compute so many tokens, until it expires."""

    id: str
    """16 random bytes as hex: tells two grants of the same content apart in records."""
    cell: str
    session: SessionId
    gateway: NodeId
    node: NodeId
    model: Digest
    span: Span
    token_budget: int
    """Positions at or above it are refused."""
    issued_unix_s: float
    expires_unix_s: float


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """An order to one device, in an envelope `fallow/order` signed by a coordinator."""

    cell: str
    node: NodeId
    boot: str
    """Of the device's run that it is for (`Heartbeat.boot`): one that was started anew since does not take it."""
    sequence: int
    """Rises with every order of a coordinator, over its restarts, too: a run takes none twice."""
    issued_unix_s: float
    command: NodeCommand


class Signed(msgspec.Struct, frozen=True, array_like=True):
    """What travels: an envelope (`trust/envelope.py`) and the passport of who signed it."""

    envelope: bytes
    passport: str
