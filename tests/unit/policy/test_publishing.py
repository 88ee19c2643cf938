"""How often a publisher may publish: never more than a burst and what came back since, whatever the clock does."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.policy.publishing import BURST, EVERY_S, Allowance, Wait, after_publishing

steps = st.lists(st.floats(-2 * EVERY_S, 2 * EVERY_S), max_size=120)


@settings(max_examples=50, deadline=None)
@given(steps)
def test_no_more_than_the_burst_and_what_came_back(steps: list[float]) -> None:
    now_s, forward_s, published = 1e9, 0.0, 0
    known: Allowance | None = None
    for step_s in steps:
        now_s += step_s
        forward_s += max(0.0, step_s)
        after = after_publishing(known, now_s)
        if isinstance(after, Allowance):
            known, published = after, published + 1
            assert 0.0 <= after.left <= BURST - 1
        else:
            assert 0.0 < after.retry_after_s <= EVERY_S
    assert published <= BURST + forward_s / EVERY_S + 1e-6


def test_a_publisher_who_waits_as_long_as_told_publishes() -> None:
    known: Allowance | None = None
    now_s = 1e9
    for _ in range(BURST):
        after = after_publishing(known, now_s)
        assert isinstance(after, Allowance)
        known = after
    refused = after_publishing(known, now_s + 1.0)
    assert isinstance(refused, Wait)
    assert isinstance(after_publishing(known, now_s + 1.0 + refused.retry_after_s + 1e-3), Allowance)
    assert isinstance(after_publishing(known, now_s - 1e6), Wait)  # a clock that went back gives nothing …
    rested = after_publishing(known, now_s + 1e9)
    assert isinstance(rested, Allowance)
    assert rested.left == BURST - 1  # … and nobody saves up more than a burst
