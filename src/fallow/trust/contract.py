"""What the parts of a fleet ask of trust, as contracts. `trust/open_doors.py` has the ones that say yes to everybody.

Rules
- Missing evidence means no. Every refusal is an error of `domain/errors.py` with a code and words for a person.
- Nothing here waits for a network but `CharterSource.check`. What is asked for every frame costs no signature.
"""

from typing import NamedTuple, Protocol

from fallow.domain.cells import CellDigest
from fallow.domain.charter import Charter, Standing
from fallow.domain.credentials import Passport
from fallow.domain.fleet import CellQuestion, Hop, LeaderChanged, NodeCommand, RouteRequest
from fallow.domain.frames import OpenStage, RenewGrant
from fallow.domain.grants import Grant
from fallow.domain.ids import Digest, NodeId
from fallow.fabric.contract import Admission


class Passports(Protocol):
    """Reads passports, and knows who was revoked."""

    def read(self, text: str, holder: NodeId | None = None) -> Passport:
        """Raises `PassportRefused`: not of this network, expired, revoked, or not of `holder`."""
        ...

    def revoked(self, node: NodeId) -> bool: ...


class Lease(Protocol):
    """Whether this process may work."""

    @property
    def standing(self) -> Standing:
        """Now. Cheap: a comparison of the clock."""
        ...

    @property
    def why(self) -> str:
        """For a person; empty while working."""
        ...

    @property
    def charter(self) -> Charter | None:
        """The newest that was checked."""
        ...

    def allows(self, model: Digest) -> bool:
        """Whether a model's manifest is in valid metadata, and the policy allows it."""
        ...

    async def changed(self, standing: Standing) -> Standing:
        """Wait until the standing is another than this one."""
        ...


class GrantBook(Protocol):
    """A node's side of grants."""

    def open(self, gateway: NodeId, opening: OpenStage) -> Grant:
        """The grant that comes with an opening. Raises `GrantRefused`, `NotWorking`."""
        ...

    def renew(self, gateway: NodeId, renewal: RenewGrant, current: Grant) -> Grant:
        """A grant that goes on where `current` ends. Raises `GrantRefused`, `NotWorking`."""
        ...

    def life_left_s(self, grant: Grant) -> float:
        """For how long it is good from now on: a deadline by the monotonic clock, which nobody can set."""
        ...


class Orders(Protocol):
    """Orders to devices, signed by a coordinator and believed by nodes."""

    def seal(self, command: NodeCommand, node: NodeId, boot: str) -> bytes:
        """For one run of a device: `boot` is what its heartbeats tell."""
        ...

    def unseal(self, message: bytes, node: NodeId, boot: str) -> NodeCommand:
        """Raises `SignatureInvalid`, `PassportRefused`, `GrantRefused` (to another device, to another run of it)."""
        ...

    def announce(self, changed: LeaderChanged) -> bytes:
        """A coordinator's word that it leads, for everybody."""
        ...

    def heard(self, message: bytes) -> LeaderChanged:
        """Raises `SignatureInvalid`, `PassportRefused`."""
        ...


class CellWords(Protocol):
    """What coordinators of different cells tell and ask of each other."""

    def tell(self, digest: CellDigest) -> bytes: ...

    def told(self, message: bytes) -> CellDigest:
        """Raises `SignatureInvalid`, `PassportRefused` (not a coordinator of the cell that it tells of)."""
        ...

    def ask(self, question: CellQuestion, cell: str) -> bytes:
        """For that cell alone."""
        ...

    def asked(self, message: bytes) -> CellQuestion:
        """Raises `SignatureInvalid` (for another cell, too), `PassportRefused`."""
        ...


class GrantIssuer(Protocol):
    """A coordinator's side of grants."""

    def issue(self, request: RouteRequest, gateway: NodeId, hops: tuple[Hop, ...]) -> tuple[bytes, ...]:
        """One for each hop, in order. Raises `NotWorking`."""
        ...


class Routes(Protocol):
    """A gateway's side of grants: what a coordinator signed is the route, whatever the bus made of it."""

    def check(self, request: RouteRequest, hop: Hop, grant: bytes) -> None:
        """Raises `GrantRefused` unless a coordinator of this network grants just that to this gateway."""
        ...


class CharterSource(Protocol):
    """The council's repository."""

    def check(self, reference_unix_s: float) -> tuple[Charter, tuple[bytes, ...]]:
        """Blocking: fetch and verify all of it, as of that time. The halts are those that hold, as they came: envelopes
        `fallow/halt`, so that who keeps them can check them again.

        Raises `CharterInvalid` or `CharterUnavailable`.
        """
        ...


class NodeTrust(NamedTuple):
    """What a device's agent asks."""

    admission: Admission
    grants: GrantBook
    orders: Orders
    lease: Lease


class CoordinatorTrust(NamedTuple):
    """What a coordinator asks."""

    passports: Passports
    issuer: GrantIssuer
    orders: Orders
    cells: CellWords
    lease: Lease
