"""A leader steps down for what two devices say, or the only one; never for a lie alone, a jump, or twice in a lease."""

import logging

import pytest

from fallow.coordinator.leadership import EPOCH_JUMP_MAX, SoleAuthority
from fallow.coordinator.witnesses import DEAF_S, Witnesses
from fallow.domain.ids import NodeId

A, B, C = (NodeId(f"{index:064x}") for index in range(3))
EVERYBODY = (A, B, C)


class HandClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic_s(self) -> float:
        return self.now_s

    def unix_s(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


class World:
    def __init__(self) -> None:
        self.clock = HandClock()
        self.authority = SoleAuthority()
        self.witnesses = Witnesses(self.authority, self.clock)

    def said(self, *claims: tuple[NodeId, int], present: tuple[NodeId, ...] = EVERYBODY) -> int:
        """The epoch that we lead under after what devices said."""
        for node, epoch in claims:
            self.witnesses.refused(node, epoch, present)
        return self.authority.leading or 0


def test_one_device_of_several_is_not_believed_however_often_it_speaks_and_gets_no_orders() -> None:
    world = World()
    assert world.said(*[(A, epoch) for epoch in range(1, 50)]) == 0
    assert world.witnesses.deaf() == {A}
    world.clock.now_s += DEAF_S + 1
    assert world.witnesses.deaf() == frozenset()


def test_two_devices_are_believed_as_far_as_both_go() -> None:
    world = World()
    assert world.said((A, 9), (B, 7)) == 8
    assert world.witnesses.deaf() == {A}, "who would take our orders now gets them"


def test_the_only_device_is_believed_but_not_a_stranger_and_not_one_that_is_gone() -> None:
    world = World()
    assert world.said((A, 9), present=()) == 0
    assert world.said((A, 9), present=(A,)) == 10
    world = World()
    assert world.said((A, 9)) == 0
    world.witnesses.forget(A)
    assert world.said((B, 9)) == 0


@pytest.mark.parametrize("epoch", [EPOCH_JUMP_MAX + 1, 1 << 62])
def test_a_jump_is_refused_by_name_whoever_says_it(epoch: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert World().said((A, epoch), present=(A,)) == 0
        assert World().said((A, epoch), (B, epoch), (C, epoch)) == 0
    assert "bad_message" in caplog.text


def test_a_jump_does_not_make_another_devices_word_count() -> None:
    assert World().said((A, 1 << 62), (B, 9)) == 0


def test_at_most_one_step_in_the_time_of_a_lease() -> None:
    world = World()
    assert world.said((A, 9), (B, 9)) == 10
    assert world.said((A, 19), (B, 19)) == 10
    world.clock.now_s += world.authority.ttl_s
    assert world.said((A, 19)) == 20


def test_an_authority_refuses_a_jump_itself() -> None:
    authority = SoleAuthority()
    authority.outranked(1 << 62)
    assert authority.leading == 0
