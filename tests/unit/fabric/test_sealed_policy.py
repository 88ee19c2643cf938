"""When the relay is dialled, and how much may be under way there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.policy import relay
from fallow.policy.relay import (
    DIRECT_FAILURE_KEPT_S,
    HEAD_START_S,
    SHORT_HEAD_START_S,
    WINDOW_BYTES_MAX,
    WINDOW_BYTES_MIN,
    WINDOWS_BYTES_MAX,
    DialPlan,
    RelayUse,
    dial_plan,
    grant_due,
    record_cost_bytes,
    window_bytes,
)
from tests.unit.fabric.support import STEADY


@pytest.mark.parametrize(
    ("use", "direct", "relayed", "failed_s_ago", "plan"),
    [
        (RelayUse.WHEN_NEEDED, True, True, None, DialPlan(True, HEAD_START_S)),
        (RelayUse.WHEN_NEEDED, True, True, 1.0, DialPlan(True, SHORT_HEAD_START_S)),
        (RelayUse.WHEN_NEEDED, True, True, DIRECT_FAILURE_KEPT_S + 1, DialPlan(True, HEAD_START_S)),
        (RelayUse.WHEN_NEEDED, True, False, 1.0, DialPlan(True, None)),
        (RelayUse.WHEN_NEEDED, False, True, None, DialPlan(False, 0.0)),
        (RelayUse.NEVER, True, True, 1.0, DialPlan(True, None)),
        (RelayUse.NEVER, False, True, None, DialPlan(False, None)),
        (RelayUse.ONLY, True, True, None, DialPlan(False, 0.0)),
        (RelayUse.ONLY, True, False, None, DialPlan(False, None)),
    ],
)
def test_the_ways_that_are_tried(
    use: RelayUse, direct: bool, relayed: bool, failed_s_ago: float | None, plan: DialPlan
) -> None:
    assert dial_plan(use, direct_known=direct, relay_known=relayed, direct_failed_s_ago=failed_s_ago) == plan


def test_a_relay_that_works_waits_for_a_direct_dial_at_most_half_a_second() -> None:
    assert SHORT_HEAD_START_S < HEAD_START_S <= 0.5


@STEADY
@given(st.integers(0, 5000))
def test_windows_of_all_links_together_are_bounded(links: int) -> None:
    window = window_bytes(links)
    assert WINDOW_BYTES_MIN <= window <= WINDOW_BYTES_MAX
    if links * WINDOW_BYTES_MIN <= WINDOWS_BYTES_MAX:
        assert links * window <= WINDOWS_BYTES_MAX


@STEADY
@given(st.lists(st.integers(1, relay.WINDOW_BYTES_MIN // 2), min_size=1, max_size=200), st.integers(1, 200))
def test_a_sender_is_never_stuck_and_never_far_ahead(records: list[int], links: int) -> None:
    """Sender and receiver with nothing between them: whatever was taken is granted again before the sender runs dry."""
    granted = may_send = WINDOW_BYTES_MIN
    sent = taken = 0
    for data_bytes in records:
        cost = record_cost_bytes(data_bytes)
        assert sent + cost <= may_send, "the sender is stuck although everything was taken"
        sent += cost
        taken += cost
        due = grant_due(taken, granted, window_bytes(links))
        if due is not None:
            assert due > granted
            granted = may_send = due
        assert may_send - taken <= WINDOW_BYTES_MAX


def test_records_without_data_are_free() -> None:
    assert record_cost_bytes(0) == 0 and record_cost_bytes(1) == 1 + relay.RECORD_COST_BYTES
