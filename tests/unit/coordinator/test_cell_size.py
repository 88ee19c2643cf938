"""A cell that has too many devices says so, and who belongs elsewhere; one that has too few, where to."""

import logging

import msgspec
import pytest

from fallow.coordinator.cell_size import SPLIT_DEVICES_MAX, SPLIT_LOOK_S, SizeWatch
from fallow.coordinator.registry import Fleet
from fallow.domain.cells import CellDigest
from fallow.domain.fleet import Heartbeat
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import NodeId
from fallow.policy.cells import CellRules, Neighbour
from fallow.policy.membership import MembershipRules
from tests.unit.trust.grant_world import SetClock

RULES = CellRules(devices_max=8, devices_min=3, small_for_s=100.0)
GATEWAY = NodeId("f" * 64)


class Clock(SetClock):
    def monotonic_s(self) -> float:
        return self.now_s


def node(index: int) -> NodeId:
    return NodeId(f"{index:064x}")


def watch(devices: int) -> tuple[SizeWatch, Clock, Fleet]:
    """Of a cell whose first three devices are far from its gateway."""
    clock, fleet = Clock(), Fleet()
    for index in range(devices):
        heartbeat = Heartbeat(
            node=node(index),
            name=str(index),
            sequence=1,
            address=PeerAddress(node=node(index), endpoints=()),
            memory_bytes=1,
            kv_budget_bytes=1,
            kv_free_bytes=1,
            link_rtt_s={GATEWAY: 0.1 if index < 3 else 0.01},
        )
        fleet.hear(heartbeat, clock.monotonic_s(), MembershipRules())
    return SizeWatch("here", clock, RULES, fleet), clock, fleet


def digest(devices: int, cell: str = "here") -> CellDigest:
    return CellDigest(cell=cell, boot="1", sequence=1, devices=devices, devices_max=8)


def test_a_cell_that_has_outgrown_itself_names_those_who_are_far_and_says_so_now_and_then(
    caplog: pytest.LogCaptureFixture,
) -> None:
    size, clock, _ = watch(9)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert size.look(digest(9), ()) is None
            clock.now_s += SPLIT_LOOK_S / 4 - 1
    assert size.told().outgrown and set(size.told().should_go) == {node(0), node(1), node(2)}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "9 devices, and no more than 8" in said[0] and "for the 3 that" in said[0]
    size.look(digest(8), ())
    assert not size.told().outgrown and size.told().should_go == ()


def test_of_a_cell_of_very_many_devices_nobody_is_named() -> None:
    size, _, _ = watch(9)
    size.look(digest(SPLIT_DEVICES_MAX + 1), ())
    assert size.told().outgrown and size.told().should_go == ()


def test_a_cell_that_dissolves_says_so_once_and_when_it_does_not_after_all(caplog: pytest.LogCaptureFixture) -> None:
    size, clock, _ = watch(2)
    big = Neighbour(digest=digest(4, "big"), rtt_s=0.01)
    told: list[str | None] = []
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            told.append(size.look(digest(2), (Neighbour(digest=digest(3, "big"), rtt_s=0.01),)))
            clock.now_s += 50
        assert told == [None, None, "big", "big", "big"]
        assert size.told().dissolves_into == "big"
        assert size.look(digest(3), (big,)) is None
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "told to join big" in said[0] and "after all" in said[1]


def test_a_new_term_begins_to_count_anew() -> None:
    size, clock, _ = watch(2)
    big = Neighbour(digest=digest(3, "big"), rtt_s=0.01)
    size.look(digest(2), (big,))
    clock.now_s += 100
    assert size.look(digest(2), (big,)) == "big"
    size.forget()
    assert size.told() == msgspec.structs.replace(size.told(), dissolves_into=None, outgrown=False, should_go=())
    assert size.look(digest(2), (big,)) is None
