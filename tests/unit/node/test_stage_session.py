"""Rows that wait for their turn, whose they may be, how many, and when a session goes by itself. No fleet, no time."""

import math

import pytest

from fallow.domain.frames import Flow, OpenStage, PeerAddress, Phase, Rows
from fallow.domain.ids import Digest, NodeId, SessionId
from fallow.domain.model import Span
from fallow.gateway.kept import KEPT_CHAIN_AGE_S
from fallow.gateway.opening import OPEN_TIMEOUT_S
from fallow.gateway.progress import STALL_TIMEOUT_S
from fallow.node import stage_session as bounds
from fallow.node.allowance import Allowance
from fallow.node.stage_session import Expiry, Held, RowBudget, Session, Waiting
from fallow.trust.open_doors import OpenGrants

GATEWAY, BEFORE, STRANGER = NodeId("a" * 64), NodeId("b" * 64), NodeId("c" * 64)
SESSION = SessionId("0" * 32)


def session(budget: RowBudget | None = None, gateway: NodeId = GATEWAY) -> Session:
    opening = OpenStage(session=SESSION, epoch=1, model=Digest("d" * 64), span=Span(3, 6), reserve_tokens=64)
    allowance = Allowance(OpenGrants().open(gateway, opening), math.inf)
    return Session(gateway, opening, allowance, budget or RowBudget(), now_s=0.0)


def waiting(sender: NodeId, epoch: int = 1, position: int = 0, count: int = 1, size_bytes: int = 4) -> Waiting:
    header = Rows(
        session=SESSION,
        epoch=epoch,
        position=position,
        count=count,
        phase=Phase.PREFILL,
        logits_from=0,
        top_k=1,
    )
    return Waiting(sender, header, bytes(size_bytes))


def flow(epoch: int = 1, previous: NodeId | None = BEFORE) -> Flow:
    here = PeerAddress(NodeId("e" * 64), ())
    return Flow(session=SESSION, epoch=epoch, previous=previous, next=here, forward_from=0, results_from=0)


def test_only_the_predecessor_is_heard_once_it_is_known() -> None:
    held = session()
    held.flow = flow()
    assert held.hold(waiting(STRANGER)) is Held.IGNORED
    assert held.hold(waiting(GATEWAY)) is Held.IGNORED
    assert held.hold(waiting(BEFORE)) is Held.WAITS
    held.flow = flow(previous=None)
    assert held.hold(waiting(BEFORE)) is Held.IGNORED


def test_rows_that_came_before_their_flow_are_sorted_out_when_it_comes() -> None:
    held = session()
    assert held.take() is None
    for sender in (STRANGER, BEFORE, STRANGER):
        assert held.hold(waiting(sender)) is Held.WAITS
    held.flow = flow()
    taken = held.take()
    assert taken is not None
    assert taken.sender == BEFORE
    assert held.take() is None


def test_rows_of_a_later_epoch_hold_up_nobody_and_come_in_their_turn() -> None:
    held = session()
    held.flow = flow()
    assert held.hold(waiting(STRANGER, epoch=1 << 50)) is Held.WAITS
    assert held.hold(waiting(BEFORE, epoch=2, position=7)) is Held.WAITS
    assert held.hold(waiting(BEFORE)) is Held.WAITS
    first = held.take()
    assert first is not None
    assert first.header.epoch == 1
    assert held.take() is None
    held.fence(2)
    held.flow = flow(epoch=2)
    second = held.take()
    assert second is not None
    assert second.header.position == 7
    assert held.hold(waiting(BEFORE, epoch=1)) is Held.IGNORED


def test_a_predecessor_that_sends_too_far_ahead_is_at_fault_and_a_stranger_is_not_heard() -> None:
    held = session()
    for _ in range(bounds.UNFLOWED_ROWS_MAX // 256):
        assert held.hold(waiting(STRANGER, count=256)) is Held.WAITS
    assert held.hold(waiting(STRANGER)) is Held.IGNORED
    held.flow = flow()
    assert held.take() is None
    for _ in range(bounds.HELD_ROWS_MAX // 256):
        assert held.hold(waiting(BEFORE, count=256)) is Held.WAITS
    assert held.hold(waiting(BEFORE)) is Held.TOO_MANY
    assert held.hold(waiting(STRANGER)) is Held.IGNORED


def test_a_row_that_is_too_large_for_any_model_is_not_held() -> None:
    held = session()
    held.flow = flow()
    assert held.hold(waiting(BEFORE, count=2, size_bytes=2 * bounds.ROW_BYTES_MAX)) is Held.WAITS
    assert held.hold(waiting(BEFORE, count=2, size_bytes=2 * bounds.ROW_BYTES_MAX + 1)) is Held.TOO_MANY


def fill(held: Session) -> int:
    """Bytes that a flowing session takes until it is at fault."""
    size_bytes, total_bytes = 64 * bounds.ROW_BYTES_MAX, 0
    while held.hold(waiting(BEFORE, count=64, size_bytes=size_bytes)) is Held.WAITS:
        total_bytes += size_bytes
    return total_bytes


def test_bytes_are_bounded_by_session_by_gateway_and_in_all() -> None:
    budget = RowBudget()
    sessions = [session(budget, gateway) for gateway in (GATEWAY, STRANGER, NodeId("f" * 64)) for _ in range(2)]
    for each in sessions:
        each.flow = flow()
    taken = [fill(each) for each in sessions]
    mine = bounds.HELD_BYTES_MAX, bounds.GATEWAY_BYTES_MAX - bounds.HELD_BYTES_MAX
    assert taken == [*mine, *mine, 0, 0]
    assert sum(taken) == bounds.ALL_BYTES_MAX
    for each in sessions:
        each.end()
    again = session(budget)
    again.flow = flow()
    assert fill(again) == bounds.HELD_BYTES_MAX


@pytest.mark.parametrize(
    ("rests", "position", "orphaned_at_s", "now_s", "expected"),
    [
        (True, 0, None, bounds.UNUSED_MAX_S - 1, None),
        (True, 0, None, bounds.UNUSED_MAX_S, Expiry.UNUSED),
        (False, 0, None, 10 * bounds.IDLE_MAX_S, None),
        (True, 5, None, bounds.IDLE_MAX_S - 1, None),
        (True, 5, None, bounds.IDLE_MAX_S, Expiry.IDLE),
        (False, 5, 1.0, bounds.ORPHAN_GRACE_S, None),
        (False, 5, 1.0, bounds.ORPHAN_GRACE_S + 1, Expiry.ORPHANED),
    ],
)
def test_nothing_is_held_for_ever(
    rests: bool, position: int, orphaned_at_s: float | None, now_s: float, expected: Expiry | None
) -> None:
    held = session()
    held.rests, held.position, held.orphaned_at_s = rests, position, orphaned_at_s
    assert held.expiry(now_s) is expected


def test_honest_gateways_never_meet_these_bounds() -> None:
    """A gateway opens its chain again, which counts as use, and lets kept conversations go, before a device would."""
    assert STALL_TIMEOUT_S + OPEN_TIMEOUT_S < bounds.UNUSED_MAX_S
    assert KEPT_CHAIN_AGE_S < bounds.IDLE_MAX_S
