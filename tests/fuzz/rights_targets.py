"""Grants, renewals and orders as a stranger sends them, and as a coordinator that went mad signs them."""

import contextlib
from collections.abc import Callable

import msgspec

from fallow.domain.cells import CellDigest
from fallow.domain.errors import FallowError
from fallow.domain.fleet import DropStage, FindChain, Hop, RouteRequest
from fallow.domain.frames import OpenStage, PeerAddress, RenewGrant
from fallow.domain.grants import Signed
from fallow.domain.ids import SessionId
from fallow.domain.model import Span
from fallow.trust.cell_words import SignedCellWords
from fallow.trust.envelope import Envelope, Kind, pre_authentication
from fallow.trust.grants import Book, Issuer, SealedOrders
from tests.unit.trust.grant_world import (
    CELL,
    COORDINATOR,
    GATEWAY,
    MODEL,
    NODE,
    SetClock,
    SwitchedLease,
    author,
    reader,
)

CLOCK = SetClock()
READER = reader(CLOCK)
AUTHOR = author(CLOCK)
BOOK = Book(NODE.node, CELL, READER, SwitchedLease(), CLOCK.unix_s)
SPAN = Span(0, 4)
OPENING = OpenStage(session=SessionId("1" * 32), epoch=1, model=MODEL, span=SPAN, reserve_tokens=64)
_REQUEST = RouteRequest(model=MODEL, session=OPENING.session, reserve_tokens=64)
_GRANT = Issuer(AUTHOR, SwitchedLease()).issue(
    _REQUEST, GATEWAY.node, (Hop(address=PeerAddress(NODE.node, ()), span=SPAN),)
)[0]
_CURRENT = BOOK.open(GATEWAY.node, msgspec.structs.replace(OPENING, grant=_GRANT))
_ORDER = SealedOrders(AUTHOR, READER).seal(DropStage(model=MODEL, epoch=1), NODE.node, "run")
_WORDS = (
    SignedCellWords(AUTHOR, READER).tell(CellDigest(cell=CELL, boot="b", sequence=1, devices=1, devices_max=1)),
    SignedCellWords(AUTHOR, READER).ask(FindChain(cell=CELL, request=_REQUEST), CELL),
)


def signed(data: bytes) -> None:
    """Whatever comes where a grant or an order belongs."""
    with contextlib.suppress(FallowError):
        BOOK.open(GATEWAY.node, msgspec.structs.replace(OPENING, grant=data))
    with contextlib.suppress(FallowError):
        BOOK.renew(GATEWAY.node, RenewGrant(session=OPENING.session, grant=data), _CURRENT)
    for read in (SignedCellWords(AUTHOR, READER).told, SignedCellWords(AUTHOR, READER).asked):
        with contextlib.suppress(FallowError):
            read(data)
    SealedOrders(AUTHOR, READER).unseal(data, NODE.node, "run")


def coordinators_word(data: bytes) -> None:
    """The same with a coordinator's true signature under it: the inside is reached."""
    for kind in (Kind.GRANT, Kind.ORDER, Kind.DIGEST, Kind.QUESTION):
        signature = COORDINATOR.sign(pre_authentication(kind, data))
        envelope = msgspec.msgpack.encode(Envelope(kind, data, COORDINATOR.node, signature))
        with contextlib.suppress(FallowError):
            signed(msgspec.msgpack.encode(Signed(envelope, AUTHOR.passport())))


def seeds() -> dict[str, tuple[Callable[[bytes], object], tuple[bytes, ...]]]:
    """The targets by name, with valid inputs."""
    inside = tuple(
        msgspec.msgpack.decode(msgspec.msgpack.decode(each, type=Signed).envelope, type=Envelope).body
        for each in (_GRANT, _ORDER, *_WORDS)
    )
    return {"grants_and_orders": (signed, (_GRANT, _ORDER, *_WORDS)), "coordinators_word": (coordinators_word, inside)}
