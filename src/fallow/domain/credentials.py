"""Who a process is to others: its role, its tier, and for how long that holds.

A *passport* is the NATS user JWT that the registrar gave to a key: one document opens the bus, introduces its holder on
links, and shows that who signed a grant is a coordinator. To show it to somebody gives nothing away: using it takes the
key. How it is read and checked is `trust/passports.py`'s.
"""

from enum import StrEnum

import msgspec

from fallow.domain.fleet import Tier
from fallow.domain.ids import NodeId

PASSPORT_LIFE_S = 3600.0
"""The longest that a passport is good for."""
PASSPORT_GRACE_S = 60.0
"""How far two clocks may be apart before a passport is taken for not yet, or no longer, good."""


class Role(StrEnum):
    """What a process may be. Rights on the bus follow from it (`policy/bus_rights.py`)."""

    NODE = "node"
    GATEWAY = "gateway"
    COORDINATOR = "coordinator"
    REGISTRAR = "registrar"
    OPERATOR = "operator"
    """Invites and revokes, and reads everything that there is to read."""
    AUDITOR = "auditor"
    """Reads the journal and the fleet's state."""
    READER = "reader"
    """Reads the fleet's state."""


class Passport(msgspec.Struct, frozen=True, kw_only=True):
    """What a passport says, after it was checked."""

    node: NodeId
    role: Role
    tier: Tier
    cell: str
    name: str
    """For people."""
    issued_unix_s: float
    expires_unix_s: float
    text: str
    """The document itself."""


class Revocation(msgspec.Struct, frozen=True, kw_only=True):
    """A key that is no longer welcome: passports issued to it up to then are void."""

    node: NodeId
    revoked_unix_s: float
    why: str


class RevocationList(msgspec.Struct, frozen=True, kw_only=True):
    """Every revocation that still matters, signed by the registrar (`fallow/revocations`)."""

    sequence: int
    """Counts up; a lower one is an old list."""
    cell: str
    revocations: tuple[Revocation, ...]
