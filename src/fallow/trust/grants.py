"""Grants and orders: signed by a coordinator, with its passport, and believed by one device.

Rules
- A grant or an order is believed when its signature is its signer's, the signer's passport is one of a coordinator of
  this device's own cell and is neither expired nor revoked, and every word of it fits (`policy/rights.py`).
- A coordinator signs nothing, and a device opens nothing, while it may not work (`Lease`).
- An order is taken once: it is for one run of one device, named by what that run drew at its start, and its sequence is
  above that of every order that its signer gave to this run before. What a run heard may be forgotten with it: an order
  that somebody kept is for a run that is over.
- A signature is checked when a session is opened or a grant renewed, and for every order; for rows, never.

Who is a coordinator is `trust/passports.py`'s; what a session does under its grant is counted by the node.
"""

import secrets
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from fallow.domain.charter import Standing
from fallow.domain.credentials import Passport, Role
from fallow.domain.errors import GrantRefused, NotWorking, PassportRefused, SignatureInvalid
from fallow.domain.fleet import Hop, LeaderChanged, NodeCommand, RouteRequest
from fallow.domain.frames import OpenStage, RenewGrant
from fallow.domain.grants import GRANT_LIFE_S, Grant, Order, Signed
from fallow.domain.ids import Digest, NodeId, at_visit
from fallow.policy import rights
from fallow.policy.rights import Here, Refused
from fallow.trust.contract import Lease, Passports
from fallow.trust.envelope import Kind, seal, unseal
from fallow.trust.keys import Identity

SIGNED_MAX_BYTES: Final = 256 * 1024
SIGNERS_MAX: Final = 64
"""Coordinators whose last order is remembered. Of more, the one that was silent for longest is forgotten."""

T = TypeVar("T")


class Author:
    """What every party to grants and orders is: a key, a passport, a cell, and a time to judge by."""

    def __init__(self, identity: Identity, passport: Callable[[], str], cell: str, unix_s: Callable[[], float]) -> None:
        """`passport` gives the newest; `unix_s` is a clock that cannot be set back further than what was signed
        (`LeaseKeeper.unix_s`)."""
        self.identity = identity
        self.passport = passport
        self.cell = cell
        self.unix_s = unix_s

    def signed(self, kind: Kind, body: msgspec.Struct) -> bytes:
        """A document of ours, with our passport."""
        return msgspec.msgpack.encode(Signed(seal(kind, body, self.identity), self.passport()))


class Issuer:
    """A coordinator's side of grants (`GrantIssuer`)."""

    def __init__(self, author: Author, lease: Lease) -> None:
        self._author = author
        self._lease = lease

    def issue(self, request: RouteRequest, gateway: NodeId, hops: tuple[Hop, ...]) -> tuple[bytes, ...]:
        """One for each hop, in order. Raises `NotWorking`, and `GrantRefused` for a session that no device may hold."""
        require_working(self._lease)
        charter = self._lease.charter
        if charter is not None and request.reserve_tokens > charter.policy.limits.session_tokens_max:
            most = charter.policy.limits.session_tokens_max
            raise GrantRefused(f"The council allows sessions of up to {most} tokens, not {request.reserve_tokens}.")
        if not self._lease.allows(request.model):
            raise GrantRefused(f"The council does not allow the model {request.model[:12]}.")
        now_unix_s = self._author.unix_s()
        return tuple(self._author.signed(Kind.GRANT, self._grant(request, gateway, hop, now_unix_s)) for hop in hops)

    def _grant(self, request: RouteRequest, gateway: NodeId, hop: Hop, now_unix_s: float) -> Grant:
        return Grant(
            id=secrets.token_hex(16),
            cell=self._author.cell,
            session=at_visit(request.session, hop.visit),
            gateway=gateway,
            node=hop.address.node,
            model=request.model,
            span=hop.span,
            token_budget=request.reserve_tokens,
            issued_unix_s=now_unix_s,
            expires_unix_s=now_unix_s + GRANT_LIFE_S,
        )


class Book:
    """A device's side of grants (`GrantBook`)."""

    def __init__(
        self, node: NodeId, cell: str, passports: Passports, lease: Lease, unix_s: Callable[[], float]
    ) -> None:
        self._node = node
        self._cell = cell
        self._passports = passports
        self._lease = lease
        self._unix_s = unix_s

    def open(self, gateway: NodeId, opening: OpenStage) -> Grant:
        """Raises `GrantRefused`, `NotWorking`."""
        require_working(self._lease)
        grant = self._read(opening.grant)
        _require(rights.opening_refused(grant, opening, self._here(gateway)))
        self._require_allowed(opening.model, opening.reserve_tokens)
        return grant

    def renew(self, gateway: NodeId, renewal: RenewGrant, current: Grant) -> Grant:
        """Raises `GrantRefused`, `NotWorking`."""
        require_working(self._lease)
        grant = self._read(renewal.grant)
        _require(rights.renewal_refused(grant, renewal.session, current, self._here(gateway)))
        self._require_allowed(grant.model, grant.token_budget)
        return grant

    def life_left_s(self, grant: Grant) -> float:
        return rights.life_left_s(grant, self._unix_s())

    def _here(self, gateway: NodeId) -> Here:
        return Here(node=self._node, cell=self._cell, gateway=gateway, now_unix_s=self._unix_s())

    def _require_allowed(self, model: Digest, tokens: int) -> None:
        if not self._lease.allows(model):
            raise GrantRefused(f"The council does not allow the model {model[:12]}.")
        charter = self._lease.charter
        if charter is not None and tokens > charter.policy.limits.session_tokens_max:
            most = charter.policy.limits.session_tokens_max
            raise GrantRefused(f"The council allows sessions of up to {most} tokens, not {tokens}.")

    def _read(self, grant: bytes) -> Grant:
        if not grant:
            raise GrantRefused("A session needs a grant of this cell's coordinator, and none came.")
        try:
            read, _ = signed_by_coordinator(Kind.GRANT, Grant, grant, self._cell, self._passports)
        except (SignatureInvalid, PassportRefused) as error:
            raise GrantRefused(f"The grant is not one of this cell's coordinator: {error.message}") from None
        return read


class SignedRoutes:
    """A gateway's side of grants (`Routes`). The bus carries routes, and is not believed: each hop must be what a
    coordinator granted to this gateway for this session."""

    def __init__(self, gateway: NodeId, passports: Passports) -> None:
        self._gateway = gateway
        self._passports = passports

    def check(self, request: RouteRequest, hop: Hop, grant: bytes) -> None:
        """Raises `GrantRefused`."""
        try:
            read, _ = signed_by_coordinator(Kind.GRANT, Grant, grant, None, self._passports)
        except (SignatureInvalid, PassportRefused) as error:
            raise GrantRefused(f"A route came without a coordinator's grant: {error.message}") from None
        session = at_visit(request.session, hop.visit)
        asked = (self._gateway, session, request.model, hop.address.node, hop.span)
        if (read.gateway, read.session, read.model, read.node, read.span) != asked:
            raise GrantRefused("A route came with the grant of another device, session or span.")


class SealedOrders:
    """`Orders` under a coordinator's signature. A device's own seal opens nowhere: its passport is not one of a
    coordinator."""

    def __init__(self, author: Author, passports: Passports) -> None:
        self._author = author
        self._passports = passports
        self._given = 0
        self._taken: OrderedDict[NodeId, int] = OrderedDict()
        """The highest sequence of each signer."""

    def seal(self, command: NodeCommand, node: NodeId, boot: str) -> bytes:
        """An order to one run of a device. Sealed anew for every attempt: a run takes none twice."""
        now_unix_s = self._author.unix_s()
        # By the clock, so that it goes on rising after a restart.
        self._given = max(self._given + 1, int(now_unix_s * 1e6))
        order = Order(
            cell=self._author.cell,
            node=node,
            boot=boot,
            sequence=self._given,
            issued_unix_s=now_unix_s,
            command=command,
        )
        return self._author.signed(Kind.ORDER, order)

    def announce(self, changed: LeaderChanged) -> bytes:
        """Our word that we lead."""
        return self._author.signed(Kind.LEADER, changed)

    def heard(self, message: bytes) -> LeaderChanged:
        """Raises `SignatureInvalid`, `PassportRefused`."""
        return signed_by_coordinator(Kind.LEADER, LeaderChanged, message, self._author.cell, self._passports)[0]

    def unseal(self, message: bytes, node: NodeId, boot: str) -> NodeCommand:
        """Raises `SignatureInvalid`, `PassportRefused`, `GrantRefused`."""
        order, giver = signed_by_coordinator(Kind.ORDER, Order, message, self._author.cell, self._passports)
        if (order.node, order.cell) != (node, self._author.cell):
            raise GrantRefused(f"The order is for {order.node[:8]} of cell {order.cell}, and came to {node[:8]}.")
        if order.boot != boot:
            raise GrantRefused("The order is for another run of this device, which was started anew since.")
        if rights.order_too_old(order.issued_unix_s, self._author.unix_s()):
            raise GrantRefused("The order is of another time, by this device's clock.")
        if order.sequence <= self._taken.get(giver.node, 0):
            raise GrantRefused("The order came before: it was given once, and somebody gave it again.")
        self._taken[giver.node] = order.sequence
        self._taken.move_to_end(giver.node)
        if len(self._taken) > SIGNERS_MAX:
            self._taken.popitem(last=False)
        return order.command


# --- what they share ------------------------------------------------------------------------------


def require_working(lease: Lease) -> None:
    """Raises `NotWorking`, with the council's words."""
    standing = lease.standing
    if standing is not Standing.WORKING:
        raise NotWorking(lease.why, standing)


def signed_by_coordinator(
    kind: Kind, type_: type[T], document: bytes, cell: str | None, passports: Passports
) -> tuple[T, Passport]:
    """What a coordinator of the cell (`None`: of any) signed, and its passport.

    Raises `SignatureInvalid`, `PassportRefused`.
    """
    if len(document) > SIGNED_MAX_BYTES:
        raise SignatureInvalid(f"expected up to {SIGNED_MAX_BYTES} bytes, got {len(document)}")
    try:
        signed = msgspec.msgpack.decode(document, type=Signed)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SignatureInvalid(f"expected a signed {kind}, got what cannot be read: {error}") from None
    body, signer = unseal(kind, type_, signed.envelope)
    if passports.revoked(signer):  # whatever the times in its passport are
        raise PassportRefused(f"the key of {signer[:8]} was revoked, or left")
    passport: Passport = passports.read(signed.passport, holder=signer)
    if passport.role is not Role.COORDINATOR or cell not in {None, passport.cell}:
        raise PassportRefused(
            f"expected a coordinator of cell {cell or 'any'}, and {signer[:8]} is a {passport.role} of {passport.cell}"
        )
    return body, passport


def _require(refused: Refused | None) -> None:
    if refused is not None:
        raise GrantRefused(f"The grant does not allow it ({refused.refusal}). {refused.words}")
