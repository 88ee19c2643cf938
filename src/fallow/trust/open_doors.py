"""The trust of those who trust everybody: for the development mode, the simulator, and tests of everything else.

Rules
- Every answer is yes, and costs next to nothing. No signature is made or checked, and the clock is not asked.
- Nothing takes these by default. A process that is wired with them says so loudly (`trust.insecure_development`).
"""

import asyncio
import math
from typing import Final

import msgspec

from fallow.domain.cells import CellDigest
from fallow.domain.charter import Charter, Standing
from fallow.domain.credentials import Passport, Role
from fallow.domain.errors import SignatureInvalid
from fallow.domain.fleet import CellQuestion, Hop, LeaderChanged, NodeCommand, RouteRequest, Tier
from fallow.domain.frames import OpenStage, RenewGrant
from fallow.domain.grants import Grant
from fallow.domain.ids import Digest, NodeId
from fallow.trust.contract import CoordinatorTrust, NodeTrust

BUDGET_OPEN: Final = 1 << 53


class OpenAdmission:
    """`Admission`: everybody, as a gateway, which may do whatever links are for."""

    passport: Final = ""

    def admit(self, peer: NodeId, passport: str) -> Passport:
        return _anybody(peer, Role.GATEWAY)

    def computes(self, passport: Passport) -> bool:
        return True

    def life_left_s(self, passport: Passport) -> float:
        return math.inf

    def revoked(self, peer: NodeId) -> bool:
        return False


class OpenPassports:
    """`Passports`: everybody is a well known device, whatever it shows."""

    def read(self, text: str, holder: NodeId | None = None) -> Passport:
        return _anybody(holder or NodeId(""), Role.NODE)

    def revoked(self, node: NodeId) -> bool:
        return False


class OpenLease:
    """`Lease`: work, on every model, for ever."""

    standing: Final = Standing.WORKING
    why: Final = ""
    charter: Charter | None = None

    def allows(self, model: Digest) -> bool:
        return True

    async def changed(self, standing: Standing) -> Standing:
        if standing is not Standing.WORKING:
            return Standing.WORKING
        await asyncio.get_running_loop().create_future()
        raise AssertionError("nobody ends an open lease")


class OpenGrants:
    """`GrantBook`: every opening has a grant for all that it asks for."""

    def open(self, gateway: NodeId, opening: OpenStage) -> Grant:
        return Grant(
            id=opening.session,
            cell="",
            session=opening.session,
            gateway=gateway,
            node=NodeId(""),
            model=opening.model,
            span=opening.span,
            token_budget=BUDGET_OPEN,
            issued_unix_s=0.0,
            expires_unix_s=math.inf,
        )

    def renew(self, gateway: NodeId, renewal: RenewGrant, current: Grant) -> Grant:
        return current

    def life_left_s(self, grant: Grant) -> float:
        return math.inf


class OpenOrders:
    """`Orders` without a signature: the command itself."""

    def seal(self, command: NodeCommand, node: NodeId, boot: str) -> bytes:
        return msgspec.json.encode(command)

    def unseal(self, message: bytes, node: NodeId, boot: str) -> NodeCommand:
        """Raises `SignatureInvalid` for what is no order."""
        try:
            command: NodeCommand = msgspec.json.decode(message, type=NodeCommand)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise SignatureInvalid(f"the order cannot be read: {error}") from None
        return command

    def announce(self, changed: LeaderChanged) -> bytes:
        return msgspec.json.encode(changed)

    def heard(self, message: bytes) -> LeaderChanged:
        """Raises `SignatureInvalid` for what is no such word."""
        try:
            return msgspec.json.decode(message, type=LeaderChanged)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise SignatureInvalid(f"a leader's word that cannot be read: {error}") from None


class OpenCellWords:
    """`CellWords` without a signature: the digest or question itself."""

    def tell(self, digest: CellDigest) -> bytes:
        return msgspec.json.encode(digest)

    def told(self, message: bytes) -> CellDigest:
        """Raises `SignatureInvalid` for what is no digest."""
        try:
            return msgspec.json.decode(message, type=CellDigest)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise SignatureInvalid(f"the digest cannot be read: {error}") from None

    def ask(self, question: CellQuestion, cell: str) -> bytes:
        return msgspec.json.encode(question)

    def asked(self, message: bytes) -> CellQuestion:
        """Raises `SignatureInvalid` for what is no question."""
        try:
            question: CellQuestion = msgspec.json.decode(message, type=CellQuestion)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise SignatureInvalid(f"the question cannot be read: {error}") from None
        return question


class OpenRoutes:
    """`Routes`: every route is the coordinator's."""

    def check(self, request: RouteRequest, hop: Hop, grant: bytes) -> None:
        return


class OpenIssuer:
    """`GrantIssuer`: nobody asks for grants, so there are none."""

    def issue(self, request: RouteRequest, gateway: NodeId, hops: tuple[Hop, ...]) -> tuple[bytes, ...]:
        return ()


def open_node() -> NodeTrust:
    """A device that trusts everybody."""
    return NodeTrust(OpenAdmission(), OpenGrants(), OpenOrders(), OpenLease())


def open_coordinator() -> CoordinatorTrust:
    """A coordinator that trusts everybody."""
    return CoordinatorTrust(OpenPassports(), OpenIssuer(), OpenOrders(), OpenCellWords(), OpenLease())


def _anybody(node: NodeId, role: Role) -> Passport:
    return Passport(
        node=node, role=role, tier=Tier.ATTESTED, cell="", name="", issued_unix_s=0.0, expires_unix_s=math.inf, text=""
    )
