"""Who a process is to others: its role, its tier, and for how long that holds.

A *passport* is the NATS user JWT that the registrar gave to a key: one document opens the bus, introduces its holder on
links, and shows that who signed a grant is a coordinator. To show it to somebody gives nothing away: using it takes the
key. How it is read and checked is `trust/passports.py`'s.
"""

from enum import StrEnum

import msgspec

from fallow.domain.fleet import Tier
from fallow.domain.ids import NodeId
from fallow.domain.network import Places

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


class Departure(StrEnum):
    """How a key ceased to be a member."""

    REVOKED = "revoked"
    """It was shut out, for good."""
    LEFT = "left"
    """It went, or was retired, and may come back: a newer list that does not name it says that it is out no more."""
    RETURNED = "returned"
    """It left and was admitted anew: it is welcome, with a newer passport."""


class Revocation(msgspec.Struct, frozen=True, kw_only=True):
    """A key that was shut out, or left. Why is between it and the registrar."""

    node: NodeId
    revoked_unix_s: float
    """Passports issued to it up to then are void."""
    departure: Departure


class RevocationList(msgspec.Struct, frozen=True, kw_only=True):
    """Every revocation that still matters, and where the network is, signed by the registrar (`fallow/revocations`)."""

    sequence: int
    """Counts up; a lower one is an old list."""
    issued_unix_s: float
    """When the registrar said so. What it said a day ago is nobody's news."""
    cell: str
    revocations: tuple[Revocation, ...]
    places: Places | None = None
    """Where the network can be reached now, as far as the registrar was told."""
