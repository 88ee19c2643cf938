"""Membership: order of heartbeats, departures, returns, flapping."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.fleet import Heartbeat
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import NodeId
from fallow.policy.membership import (
    Member,
    MembershipRules,
    Presence,
    departed,
    flapping,
    forgettable,
    heard,
    restarted,
    silent,
)

NODE = NodeId("ab" * 32)
RULES = MembershipRules()


def beat(sequence: int, boot: str = "first") -> Heartbeat:
    return Heartbeat(
        node=NODE,
        name="a",
        sequence=sequence,
        boot=boot,
        address=PeerAddress(NODE, ()),
        memory_bytes=1,
        kv_budget_bytes=0,
        kv_free_bytes=0,
    )


def member(sequence: int = 1, at_s: float = 0.0) -> Member:
    found = heard(None, beat(sequence), at_s, RULES)
    assert found is not None
    return found


@given(order=st.permutations(range(1, 8)))
def test_whatever_the_order_the_newest_heartbeat_counts(order: list[int]) -> None:
    state: Member | None = None
    for at_s, sequence in enumerate(order):
        state = heard(state, beat(sequence), float(at_s), RULES) or state
    assert state is not None
    assert state.heartbeat.sequence == 7


def test_silence_counts_from_the_last_heartbeat() -> None:
    members = {NODE: member(at_s=10.0)}
    assert silent(members, 13.0, RULES) == ()
    assert silent(members, 13.01, RULES) == (NODE,)
    gone = departed(members[NODE], Presence.GONE, 13.01)
    assert silent({NODE: gone}, 20.0, RULES) == ()


def test_a_heartbeat_brings_a_gone_node_back_but_not_one_that_was_under_way() -> None:
    gone = departed(member(1), Presence.GONE, 5.0)
    assert heard(gone, beat(2), 5.1, RULES) is None
    back = heard(gone, beat(3), 6.0, RULES)
    assert back is not None
    assert (back.presence, back.joined_s) == (Presence.PRESENT, 6.0)


def test_a_node_that_said_goodbye_returns_only_as_a_new_run() -> None:
    left = departed(member(1), Presence.LEFT, 5.0)
    assert heard(left, beat(2), 60.0, RULES) is None
    back = heard(left, beat(1, boot="second"), 60.0, RULES)
    assert back is not None
    assert back.presence is Presence.PRESENT


def test_a_new_run_replaces_the_old_one_for_good() -> None:
    first = member(100)
    second = heard(first, beat(1, boot="second"), 1.0, RULES)
    assert second is not None
    assert restarted(first, second)
    assert heard(second, beat(101), 1.1, RULES) is None
    third = heard(second, beat(2, boot="second"), 2.0, RULES)
    assert third is not None
    assert not restarted(second, third)


def test_goodbye_after_a_broken_connection_is_final() -> None:
    gone = departed(member(1), Presence.GONE, 5.0)
    assert departed(gone, Presence.LEFT, 5.1).presence is Presence.LEFT
    assert departed(departed(member(1), Presence.LEFT, 5.0), Presence.GONE, 5.1).presence is Presence.LEFT


def test_a_node_that_comes_and_goes_is_flapping_until_it_calms_down() -> None:
    state = member(1)
    for sequence in range(2, 5):
        state = departed(state, Presence.GONE, sequence * 10.0)
        assert not flapping(state, sequence * 10.0, RULES) or sequence == 4
        state = heard(state, beat(sequence), sequence * 10.0 + 5, RULES) or state
    assert flapping(state, 46.0, RULES)
    assert not flapping(state, 46.0 + RULES.flap_window_s, RULES)


def test_leaving_politely_is_not_flapping() -> None:
    state = member(1)
    for run in range(5):
        state = departed(state, Presence.LEFT, run + 0.5)
        state = heard(state, beat(1, boot=f"run {run}"), run + 1.0, RULES) or state
    assert not flapping(state, 6.0, RULES)


def test_the_long_gone_are_forgotten() -> None:
    gone = departed(member(1), Presence.GONE, 5.0)
    assert forgettable({NODE: gone}, 5.0 + RULES.forget_after_s, RULES) == ()
    assert forgettable({NODE: gone}, 5.1 + RULES.forget_after_s, RULES) == (NODE,)
    assert forgettable({NODE: member()}, 1e9, RULES) == ()


def test_members_are_values() -> None:
    state = member()
    assert msgspec.structs.asdict(state)["presence"] is Presence.PRESENT
    departed(state, Presence.GONE, 1.0)
    assert state.presence is Presence.PRESENT
