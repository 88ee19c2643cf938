"""The book of suspects: whatever is said, by however many, it stays within the council's budget and its own bounds."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.coordinator.registry import Fleet
from fallow.coordinator.suspects import (
    GATEWAYS_MAX,
    OWN_WORD_RETRY_S,
    QUARANTINED,
    REPORTS_OF_GATEWAY_MAX,
    TOLD_MAX,
    Suspects,
)
from fallow.domain.charter import FleetPolicy, Quarantine
from fallow.domain.fleet import Accusation, HostedStage, RouteRequest, StageStatus
from fallow.domain.ids import Digest, NodeId, SessionId
from fallow.domain.model import Span, StageSpec
from fallow.policy.membership import MembershipRules, Presence
from fallow.policy.quarantine import BUDGET_PERIOD_S, QUARANTINE_S, REPORT_LIFE_S, Evidence
from tests.unit.coordinator.test_registry import beat
from tests.unit.trust.grant_world import SetClock, SwitchedLease

DEVICES = [NodeId(f"{index:064x}") for index in range(1, 21)]
GATEWAYS = [NodeId(f"{index:064x}") for index in range(1001, 1006)]
MODEL = Digest("a" * 64)
RULES = MembershipRules()
BUDGET = Quarantine(devices_per_hour_max=4, fleet_share_max=0.15)
DAMAGED = HostedStage(stage=StageSpec(model=MODEL, pieces=(Span(0, 2),)), status=StageStatus.FAILED, damaged=True)


class Clock(SetClock):
    def monotonic_s(self) -> float:
        return self.now_s


class World:
    def __init__(self, budget: Quarantine = BUDGET) -> None:
        self.clock = Clock()
        self.lease = SwitchedLease()
        assert self.lease.charter is not None
        self.lease.charter = msgspec.structs.replace(self.lease.charter, policy=FleetPolicy(epoch=1, quarantine=budget))
        self.fleet = Fleet()
        self.suspects = Suspects(self.clock, self.lease, self.fleet)
        self.sequence = 0
        self.beat()

    def beat(self, *damaged: NodeId) -> set[NodeId]:
        """Everybody reports, some that they are damaged; who is in quarantine."""
        self.sequence += 1
        for node in DEVICES:
            heartbeat = beat(node, self.sequence, *([DAMAGED] if node in damaged else []))
            self.fleet.hear(self.suspects.enter(heartbeat), self.clock.now_s, RULES)
        return {node for node, heartbeat in self.fleet.present().items() if heartbeat.standing == QUARANTINED}

    def accuse(self, gateway: NodeId, accused: NodeId, *others: NodeId) -> None:
        told = (Accusation(node=accused, others=others),)
        request = RouteRequest(model=MODEL, session=SessionId("1" * 32), reserve_tokens=1, origin=gateway, accused=told)
        self.suspects.hear(request)


def test_two_witnesses_in_two_gateways_sessions_take_a_device_out_for_a_time() -> None:
    world, (bad, first, second) = World(), DEVICES[:3]
    world.accuse(GATEWAYS[0], bad, first)
    assert world.beat() == set()
    world.accuse(GATEWAYS[1], bad, second)
    assert world.beat() == {bad} and world.suspects.count() == 1
    (told,) = world.suspects.told()
    assert (told.node, told.left_s) == (bad, QUARANTINE_S) and "refused" in told.why
    world.clock.now_s += QUARANTINE_S
    assert world.beat() == set() and not world.suspects.told(), "it counts again by itself"
    world.accuse(GATEWAYS[0], bad, first)
    assert world.beat() == set(), "what was said before counts no more"


def test_reports_of_long_ago_and_of_nobody_who_is_here_count_for_nothing() -> None:
    world, (bad, first, second) = World(), DEVICES[:3]
    world.accuse(GATEWAYS[0], bad, first)
    world.clock.now_s += REPORT_LIFE_S
    world.accuse(GATEWAYS[1], bad, second)
    for gateway in GATEWAYS:
        world.accuse(gateway, NodeId("f" * 64))
    assert world.beat() == set() and world.suspects.count() == 0


def test_a_devices_own_word_is_enough_and_counts_once() -> None:
    world = World()
    assert world.beat(DEVICES[0]) == {DEVICES[0]}
    world.clock.now_s += QUARANTINE_S
    assert world.beat(DEVICES[0]) == set(), "it has said so before, and its stage is failed all the same"
    assert world.beat() == set()
    assert world.beat(DEVICES[0]) == {DEVICES[0]}, "once more, later"


def test_an_own_word_for_which_there_is_no_room_is_heard_again_when_there_is() -> None:
    world = World(Quarantine(devices_per_hour_max=1, fleet_share_max=0.5))
    first, second = DEVICES[:2]
    assert world.beat(first) == {first}
    assert world.beat(first, second) == {first}, "the hour is used up"
    world.clock.now_s += BUDGET_PERIOD_S
    assert world.beat(first, second) == {second}, "it still says so; the first was acted on"


def test_own_words_are_asked_of_a_full_budget_once_a_second() -> None:
    world = World(Quarantine(devices_per_hour_max=1, fleet_share_max=0.5))
    asked: list[float] = []
    room = world.suspects._room

    def counted(evidence: Evidence, now_s: float) -> bool:
        asked.append(now_s)
        return room(evidence, now_s)

    world.suspects._room = counted  # type: ignore[method-assign]
    for _ in range(5):
        world.beat(*DEVICES)
    assert len(asked) == 2, "one that found room, one that did not"
    world.clock.now_s += OWN_WORD_RETRY_S
    world.beat(*DEVICES)
    assert len(asked) == 3


def test_who_left_while_damaged_is_not_remembered() -> None:
    world, (gone, other) = World(Quarantine(devices_per_hour_max=9, fleet_share_max=0.5)), DEVICES[:2]
    world.beat(gone)
    world.fleet.depart(gone, Presence.LEFT, world.clock.now_s)
    world.suspects.enter(beat(other, 9, DAMAGED))
    assert world.suspects._heeded == {other}


def test_own_words_leave_half_of_the_budget_to_reports() -> None:
    world = World(Quarantine(devices_per_hour_max=4, fleet_share_max=0.5))
    assert len(world.beat(*DEVICES)) == 2
    world = World(Quarantine(devices_per_hour_max=100, fleet_share_max=0.15))
    assert len(world.beat(*DEVICES)) == 2, "three of twenty, halved and rounded up"


def test_without_the_councils_word_nobody_is_taken_out() -> None:
    world = World()
    world.lease.charter = None
    assert world.beat(*DEVICES) == set()


def test_a_gateway_pushes_out_its_own_reports_and_no_others() -> None:
    world, (bad, first, second) = World(), DEVICES[:3]
    world.accuse(GATEWAYS[0], bad, first)
    for index in range(10 * REPORTS_OF_GATEWAY_MAX):
        world.accuse(GATEWAYS[1], DEVICES[5], NodeId(f"{index:064x}"))
    assert max(len(reports) for reports in world.suspects._reports.values()) <= REPORTS_OF_GATEWAY_MAX
    world.accuse(GATEWAYS[2], bad, second)
    assert world.beat() == {bad}
    for index in range(2 * GATEWAYS_MAX):
        world.accuse(NodeId(f"{index:064x}"), DEVICES[7], DEVICES[8])
    assert len(world.suspects._reports) <= GATEWAYS_MAX
    assert len(world.suspects.told()) <= TOLD_MAX


OPS = st.one_of(
    st.tuples(
        st.just("accuse"), st.sampled_from(GATEWAYS), st.sampled_from(DEVICES),
        st.lists(st.sampled_from(DEVICES), max_size=3),
    ),
    st.tuples(st.just("damaged"), st.sets(st.sampled_from(DEVICES), max_size=5)),
    st.tuples(st.just("wait"), st.floats(0, 4000)),
)  # fmt: skip


@settings(max_examples=60)
@given(st.lists(OPS, max_size=60), st.integers(0, 6), st.floats(0, 0.5))
def test_whatever_is_said_the_budget_holds(ops: list[tuple[object, ...]], per_hour: int, share: float) -> None:
    world = World(Quarantine(devices_per_hour_max=per_hour, fleet_share_max=share))
    before: set[NodeId] = set()
    began_s: list[float] = []
    for op in ops:
        out = set(before)
        match op:
            case "accuse", gateway, accused, others:
                world.accuse(gateway, accused, *(set(others) - {accused}))  # type: ignore[arg-type, call-overload]
                out = world.beat()
            case "damaged", damaged:
                out = world.beat(*damaged)  # type: ignore[misc]
            case "wait", pause_s:
                world.clock.now_s += pause_s  # type: ignore[operator]
                out = world.beat()
        began_s += [world.clock.now_s] * len(out - before)
        lately = [at_s for at_s in began_s if at_s > world.clock.now_s - BUDGET_PERIOD_S]
        assert len(lately) <= per_hour
        assert len(out) <= share * len(DEVICES)
        before = out
