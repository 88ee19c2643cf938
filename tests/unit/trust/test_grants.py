"""Grants and orders, signed and read for real: only a coordinator of the cell makes them, and none works twice."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.charter import FleetLimits, Standing
from fallow.domain.credentials import Role
from fallow.domain.errors import GrantRefused, NotWorking, PassportRefused, SignatureInvalid, TrustError
from fallow.domain.fleet import DropStage, Hop, PlaceStage, RouteRequest
from fallow.domain.frames import OpenStage, PeerAddress, RenewGrant
from fallow.domain.grants import GRANT_LIFE_S, Signed
from fallow.domain.ids import Digest, SessionId
from fallow.domain.model import Span, StageSpec
from fallow.policy.rights import ORDER_LIFE_S
from fallow.trust.envelope import Envelope, Kind
from fallow.trust.grants import SIGNERS_MAX, Author, Book, Issuer, SealedOrders
from fallow.trust.keys import Identity, identity_of
from tests.unit.trust.grant_world import (
    CELL,
    COORDINATOR,
    GATEWAY,
    MODEL,
    NODE,
    OTHER_NODE,
    STRANGER,
    SetClock,
    SwitchedLease,
    author,
    passport,
    reader,
    revoke,
)

SESSION = SessionId("1" * 32)
SPAN = Span(2, 8)
REQUEST = RouteRequest(model=MODEL, session=SESSION, reserve_tokens=100)
PLACE = PlaceStage(stage=StageSpec(model=MODEL, pieces=(SPAN,)), manifest_bytes=10, sources=(), epoch=4)
BOOT = "run 1"


class World:
    """A device's book, and a coordinator that fills it."""

    def __init__(self) -> None:
        self.clock = SetClock()
        self.lease = SwitchedLease()
        self.passports = reader(self.clock)
        self.book = Book(NODE.node, CELL, self.passports, self.lease, self.clock.unix_s)

    def grant(self, by: Author | None = None, node: Identity = NODE, request: RouteRequest = REQUEST) -> bytes:
        hops = (Hop(address=PeerAddress(node.node, ()), span=SPAN),)
        return Issuer(by or author(self.clock), SwitchedLease()).issue(request, GATEWAY.node, hops)[0]

    def open(self, grant: bytes, gateway: Identity = GATEWAY, **fields: object) -> object:
        opening = OpenStage(session=SESSION, epoch=1, model=MODEL, span=SPAN, reserve_tokens=100, grant=grant)
        return self.book.open(gateway.node, msgspec.structs.replace(opening, **fields))


def test_a_coordinators_grant_opens_a_stage_and_a_later_one_renews_it() -> None:
    world = World()
    first = world.open(world.grant())
    world.clock.now_s += 400
    renewal = RenewGrant(session=SESSION, grant=world.grant())
    second = world.book.renew(GATEWAY.node, renewal, first)  # type: ignore[arg-type]
    assert second.expires_unix_s == world.clock.now_s + GRANT_LIFE_S
    with pytest.raises(GrantRefused, match="older"):
        world.book.renew(GATEWAY.node, RenewGrant(session=SESSION, grant=renewal.grant), second)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"session": SessionId("2" * 32)}, "session"),
        ({"model": Digest("e" * 64)}, "model"),
        ({"span": Span(2, 9)}, "span"),
        ({"reserve_tokens": 101}, "budget"),
        ({"grant": b""}, "none came"),
        ({"grant": b"\xff" * 100}, "cannot be read"),
    ],
)
def test_a_grant_is_for_what_it_names(changes: dict[str, object], words: str) -> None:
    world = World()
    with pytest.raises(GrantRefused, match=words):
        world.open(**({"grant": world.grant()} | changes))  # type: ignore[arg-type]


def test_a_grant_is_for_one_gateway_one_device_and_its_time() -> None:
    world = World()
    with pytest.raises(GrantRefused, match="gateway"):
        world.open(world.grant(), gateway=STRANGER)
    with pytest.raises(GrantRefused, match="node"):
        world.open(world.grant(node=OTHER_NODE))
    kept = world.grant()
    world.clock.now_s += GRANT_LIFE_S + 61
    with pytest.raises(GrantRefused, match="expired"):
        world.open(kept)


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.COORDINATOR])
def test_no_other_role_gives_grants(role: Role) -> None:
    world = World()
    with pytest.raises(GrantRefused, match="expected a coordinator"):
        world.open(world.grant(author(world.clock, STRANGER, role)))


def test_a_coordinator_of_another_cell_or_one_that_was_revoked_gives_none() -> None:
    world = World()
    with pytest.raises(GrantRefused, match="cell"):
        world.open(world.grant(author(world.clock, cell="work")))
    grant = world.grant()
    world.open(grant)
    revoke(world.passports, COORDINATOR.node)
    with pytest.raises(GrantRefused, match="revoked"):
        world.open(grant)


def test_a_borrowed_passport_signs_nothing() -> None:
    """A passport is public. A stranger who shows a coordinator's with a grant of its own is found out by the key."""
    world = World()
    borrowed = passport(COORDINATOR, Role.COORDINATOR)
    with pytest.raises(GrantRefused, match="passport"):
        world.open(world.grant(author(world.clock, STRANGER, text=borrowed)))


@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(st.data())
def test_a_grant_with_any_byte_changed_opens_nothing(data: st.DataObject) -> None:
    world = World()
    whole = bytearray(world.grant())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(GrantRefused):
        world.open(bytes(whole))


def test_a_halted_device_opens_nothing_and_says_why() -> None:
    world = World()
    grant = world.grant()
    world.lease.turn(Standing.HALTED)
    with pytest.raises(NotWorking, match="halted") as refusal:
        world.open(grant)
    assert refusal.value.standing == "halted"


def test_what_the_council_does_not_allow_is_neither_granted_nor_opened() -> None:
    world = World()
    unsigned = msgspec.structs.replace(REQUEST, model=Digest("f" * 64))
    with pytest.raises(GrantRefused, match="does not allow"):
        world.grant(request=unsigned)
    grant = world.grant()
    assert world.lease.charter is not None
    world.lease.charter = msgspec.structs.replace(world.lease.charter, models=frozenset())
    with pytest.raises(GrantRefused, match="does not allow"):
        world.open(grant)
    limits = FleetLimits(session_tokens_max=99)
    policy = msgspec.structs.replace(world.lease.charter.policy, limits=limits)
    world.lease.charter = msgspec.structs.replace(world.lease.charter, models=frozenset({MODEL}), policy=policy)
    with pytest.raises(GrantRefused, match="up to 99 tokens"):
        world.open(grant)
    lease = SwitchedLease(Standing.NO_LEASE)
    with pytest.raises(NotWorking):
        Issuer(author(world.clock), lease).issue(REQUEST, GATEWAY.node, ())


# --- orders ---------------------------------------------------------------------------------------


class Orders:
    """A coordinator that gives orders, and a device that takes them."""

    def __init__(self) -> None:
        self.clock = SetClock()
        self.passports = reader(self.clock)
        self.giver = self.by(author(self.clock))
        self.taker = self.by(author(self.clock, NODE, Role.NODE))

    def by(self, who: Author) -> SealedOrders:
        return SealedOrders(who, self.passports)


def test_an_order_is_taken_once_by_the_device_that_it_is_for() -> None:
    world = Orders()
    order = world.giver.seal(PLACE, NODE.node, BOOT)
    with pytest.raises(GrantRefused, match="is for"):
        world.taker.unseal(order, OTHER_NODE.node, BOOT)
    assert world.taker.unseal(order, NODE.node, BOOT) == PLACE
    with pytest.raises(GrantRefused, match="came before"):
        world.taker.unseal(order, NODE.node, BOOT)
    again = world.giver.seal(DropStage(model=MODEL, epoch=4), NODE.node, BOOT)
    assert world.taker.unseal(again, NODE.node, BOOT) == DropStage(model=MODEL, epoch=4)


def test_an_older_order_does_not_follow_a_newer_one_and_an_old_one_nothing() -> None:
    world = Orders()
    first, second, third = (world.giver.seal(PLACE, NODE.node, BOOT) for _ in range(3))
    world.taker.unseal(second, NODE.node, BOOT)
    with pytest.raises(GrantRefused, match="came before"):
        world.taker.unseal(first, NODE.node, BOOT)
    world.clock.now_s += ORDER_LIFE_S + 61
    with pytest.raises(GrantRefused, match="another time"):
        world.taker.unseal(third, NODE.node, BOOT)


def test_an_order_is_for_one_run_of_a_device() -> None:
    """Whatever a run heard is forgotten with it, and what was given to it is worth nothing to the next: not a moment
    later, taken or not."""
    world = Orders()
    taken, kept = (world.giver.seal(PLACE, NODE.node, BOOT) for _ in range(2))
    world.taker.unseal(taken, NODE.node, BOOT)
    restarted = world.by(author(world.clock, NODE, Role.NODE))
    for order in (taken, kept):
        with pytest.raises(GrantRefused, match="another run"):
            restarted.unseal(order, NODE.node, "run 2")
    assert restarted.unseal(world.giver.seal(PLACE, NODE.node, "run 2"), NODE.node, "run 2") == PLACE


def test_a_coordinator_that_was_restarted_goes_on_giving_orders() -> None:
    world = Orders()
    for _ in range(100):
        world.taker.unseal(world.giver.seal(PLACE, NODE.node, BOOT), NODE.node, BOOT)
    world.clock.now_s += 0.5
    restarted = world.by(author(world.clock))
    assert world.taker.unseal(restarted.seal(PLACE, NODE.node, BOOT), NODE.node, BOOT) == PLACE


def test_nobody_else_gives_orders() -> None:
    world = Orders()
    for role in Role:
        if role is not Role.COORDINATOR:
            forged = world.by(author(world.clock, STRANGER, role)).seal(PLACE, NODE.node, BOOT)
            with pytest.raises(PassportRefused):
                world.taker.unseal(forged, NODE.node, BOOT)
    with pytest.raises(PassportRefused):
        world.taker.unseal(world.by(author(world.clock, cell="work")).seal(PLACE, NODE.node, BOOT), NODE.node, BOOT)
    for garbage in (b"", b"{}", msgspec.json.encode(PLACE), b"\x92\xc4\x00\xa0", b"x" * (1 << 20)):
        with pytest.raises(SignatureInvalid):
            world.taker.unseal(garbage, NODE.node, BOOT)


def test_a_grant_is_no_order_and_an_order_no_grant() -> None:
    """Two kinds of document of the same signer: the kind is signed with them."""
    world, orders = World(), Orders()
    order = orders.giver.seal(PLACE, NODE.node, BOOT)
    with pytest.raises(GrantRefused, match="signed fallow/grant"):
        world.open(order)
    with pytest.raises(SignatureInvalid, match="signed fallow/order"):
        orders.taker.unseal(world.grant(), NODE.node, BOOT)
    signed = msgspec.msgpack.decode(order, type=Signed)
    envelope = msgspec.msgpack.decode(signed.envelope, type=Envelope)
    relabelled = msgspec.structs.replace(envelope, kind=str(Kind.GRANT))
    with pytest.raises(TrustError):
        world.open(msgspec.msgpack.encode(Signed(msgspec.msgpack.encode(relabelled), signed.passport)))


def test_the_books_of_orders_are_bounded() -> None:
    world = Orders()
    for index in range(SIGNERS_MAX + 10):
        signer = identity_of(bytes([1, *divmod(index, 256)]) + b"s" * 29)
        world.taker.unseal(world.by(author(world.clock, signer)).seal(PLACE, NODE.node, BOOT), NODE.node, BOOT)
    assert len(world.taker._taken) == SIGNERS_MAX
