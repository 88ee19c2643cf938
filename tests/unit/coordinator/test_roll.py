"""Which devices count: those that work, and whose passport shows a tier that the council asks for."""

import msgspec
import pytest

from fallow.coordinator import registry
from fallow.coordinator.granted import granted, refusal, without_strangers
from fallow.coordinator.registry import Fleet
from fallow.coordinator.roll import BELOW_TIER, Roll
from fallow.coordinator.stores import stores_to_drop
from fallow.domain.charter import FleetPolicy, Standing
from fallow.domain.credentials import PASSPORT_GRACE_S, PASSPORT_LIFE_S, Role
from fallow.domain.fleet import Hop, RouteReply, RouteRequest, Tier
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import Digest, SessionId
from fallow.domain.model import Span
from fallow.policy.membership import MembershipRules
from fallow.trust.grants import Issuer
from tests.unit.coordinator.test_registry import MODELS, beat, entry, ready, store
from tests.unit.trust.grant_world import (
    CELL,
    GATEWAY,
    MODEL,
    NODE,
    OTHER_NODE,
    SetClock,
    SwitchedLease,
    author,
    passport,
    reader,
    revoke,
)


class World:
    def __init__(self) -> None:
        self.clock = SetClock()
        self.passports = reader(self.clock)
        self.lease = SwitchedLease()
        self.roll = Roll(CELL, self.passports, self.lease, self.clock)

    def standing(self, text: str = "", standing: str = "working") -> str:
        heartbeat = msgspec.structs.replace(beat(NODE.node, 1), passport=text, standing=standing)
        entered = self.roll.enter(heartbeat)
        assert entered.passport == "", "it is kept once, not with every heartbeat"
        return entered.standing


def test_a_device_counts_from_its_passport_on_until_that_ends() -> None:
    world = World()
    assert world.standing() == BELOW_TIER and world.roll.tier(NODE.node) is Tier.ANONYMOUS
    assert world.standing(passport(NODE, Role.NODE)) == "working"
    assert world.standing() == "working" and world.roll.tier(NODE.node) is Tier.KEYED
    world.clock.now_s += PASSPORT_LIFE_S + PASSPORT_GRACE_S + 1
    assert world.standing() == BELOW_TIER
    assert world.standing(passport(NODE, Role.NODE, at_s=world.clock.now_s)) == "working"
    revoke(world.passports, NODE.node)
    assert world.standing() == BELOW_TIER


@pytest.mark.parametrize(
    "text",
    [
        "garbage",
        passport(OTHER_NODE, Role.NODE),
        passport(NODE, Role.GATEWAY),
        passport(NODE, Role.NODE, cell="work"),
        passport(NODE, Role.NODE, tier=Tier.ANONYMOUS),
        passport(NODE, Role.NODE, account=NODE),
    ],
    ids=["garbage", "another's", "a gateway's", "of another cell", "too low", "signed by itself"],
)
def test_a_passport_that_is_not_a_devices_own_of_this_cell_raises_nobody(text: str) -> None:
    assert World().standing(text) == BELOW_TIER


def test_the_council_says_how_high_a_tier_must_be() -> None:
    world = World()
    assert world.lease.charter is not None
    policy = FleetPolicy(epoch=2, tier_min=Tier.ATTESTED)
    world.lease.charter = msgspec.structs.replace(world.lease.charter, policy=policy)
    assert world.standing(passport(NODE, Role.NODE)) == BELOW_TIER
    assert world.standing(passport(NODE, Role.NODE, tier=Tier.ATTESTED)) == "working"


def test_a_device_that_says_that_it_may_not_work_does_not_count_whatever_its_tier() -> None:
    world = World()
    assert world.standing(passport(NODE, Role.NODE), standing="halted") == "halted"
    assert not world.roll.counts(NODE.node, msgspec.structs.replace(beat(NODE.node, 1), standing="halted"))
    assert world.roll.counts(NODE.node, None)


def test_who_does_not_count_carries_nothing() -> None:
    fleet = Fleet()
    fleet.announce(store(entry(MODELS[0])), 0.0)
    whole = Span(0, entry(MODELS[0]).config.layer_count)
    for sequence, standing in enumerate(("working", BELOW_TIER, "working", "no_lease"), 1):
        heard = msgspec.structs.replace(beat(NODE.node, sequence, ready(MODELS[0], whole)), standing=standing)
        fleet.hear(heard, float(sequence), MembershipRules())
        assert (NODE.node in fleet.carriers(MODELS[0])) == (standing == "working")
        assert registry.servable(fleet, entry(MODELS[0])) == (standing == "working")


def test_the_books_forget_who_is_forgotten() -> None:
    world = World()
    world.standing(passport(NODE, Role.NODE))
    world.roll.forget_but({OTHER_NODE.node})
    assert world.roll._shown == {}


# --- grants with routes ---------------------------------------------------------------------------

HOP = Hop(address=PeerAddress(NODE.node, ()), span=Span(0, 4))
REQUEST = RouteRequest(model=MODEL, session=SessionId("1" * 32), reserve_tokens=10, origin=GATEWAY.node)


def test_a_chain_comes_with_a_grant_for_each_device_or_not_at_all() -> None:
    world = World()
    issuer = Issuer(author(world.clock), world.lease)
    reply = granted(RouteReply(hops=(HOP, HOP)), REQUEST, issuer)
    assert len(reply.grants) == 2
    unknown = msgspec.structs.replace(REQUEST, origin=None)
    assert granted(RouteReply(hops=(HOP,)), unknown, issuer).grants == ()
    forbidden = msgspec.structs.replace(REQUEST, model=Digest("f" * 64))
    assert granted(RouteReply(hops=(HOP,)), forbidden, issuer).code == "grant_refused"
    world.lease.turn(Standing.HALTED)
    refused = granted(RouteReply(hops=(HOP,)), REQUEST, issuer)
    assert refused.code == "halted" and not refused.hops
    stopped = refusal(world.lease)
    assert stopped is not None and stopped.code == "halted"


def test_a_gateway_keeps_no_device_by_its_own_word() -> None:
    """A chain to be repaired names devices. One that does not count gets no grant that way, nor one for layers that it
    does not hold."""
    world = World()
    stranger = Hop(address=PeerAddress(OTHER_NODE.node, ()), span=Span(4, 8))
    asked = msgspec.structs.replace(REQUEST, model=MODELS[0], keep=(HOP, stranger))
    world.standing(passport(NODE, Role.NODE))
    fleet = Fleet()
    assert without_strangers(asked, world.roll, fleet).keep == (HOP,), "not heard of yet, and known by its passport"
    for sequence, (held, kept) in enumerate(((Span(0, 4), (HOP,)), (Span(0, 6), (HOP,)), (Span(1, 4), ())), 1):
        fleet.hear(beat(NODE.node, sequence, ready(MODELS[0], held)), float(sequence), MembershipRules())
        assert without_strangers(asked, world.roll, fleet).keep == kept


def test_the_word_of_revoked_stores_and_of_silent_ones_whose_models_others_tell_counts_no_more() -> None:
    fleet = Fleet()
    told = store(entry(MODELS[0]))
    first, second = (msgspec.structs.replace(told, address=PeerAddress(who.node, ())) for who in (GATEWAY, NODE))
    fleet.announce(first, 0.0)
    nobody = frozenset[str]().__contains__
    late_s = registry.STORE_FORGOTTEN_S + 1.0
    assert stores_to_drop(fleet.stores, None, nobody, late_s) == (), "nobody else tells of its model"
    fleet.announce(second, late_s)
    assert stores_to_drop(fleet.stores, None, nobody, late_s) == (GATEWAY.node,)
    assert stores_to_drop(fleet.stores, None, {NODE.node}.__contains__, 1.0) == (NODE.node,)
    assert fleet.part_with((GATEWAY.node, NODE.node)) and fleet.entries() == {}
    assert not fleet.part_with((NODE.node,))
