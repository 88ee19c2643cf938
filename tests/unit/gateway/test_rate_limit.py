"""The rate limit policy: allowances hold over any history, refusals say truly how long, and nobody waits for ever."""

from hypothesis import given
from hypothesis import strategies as st

from fallow.policy.rate_limit import WINDOW_S, Admitted, KeyLimits, Limit, Refused, admit, fresh_usage, released

LIMITS = st.builds(
    KeyLimits,
    requests_per_minute=st.none() | st.integers(1, 20),
    tokens_per_minute=st.none() | st.integers(1, 1000),
    concurrent_requests=st.none() | st.integers(1, 5),
)
STEPS = st.lists(st.tuples(st.floats(0, 30), st.booleans(), st.integers(0, 500)), max_size=60)


@given(LIMITS, STEPS)
def test_allowances_hold(limits: KeyLimits, steps: list[tuple[float, bool, int]]) -> None:
    now_s, usage = 0.0, fresh_usage(limits, 0.0)
    admitted_at: list[float] = []
    running = 0
    for wait_s, end_one, tokens in steps:
        now_s += wait_s
        if end_one and running:
            usage = released(usage, limits, tokens, now_s)
            running -= 1
        decision = admit(usage, limits, now_s)
        usage = decision.usage
        if isinstance(decision, Admitted):
            running += 1
            admitted_at.append(now_s)
        assert usage.running == running
        assert limits.concurrent_requests is None or running <= limits.concurrent_requests
        if limits.requests_per_minute is not None:
            within = [at for at in admitted_at if at > now_s - WINDOW_S]
            # A full bucket and one minute's refill can fall into the same minute, never more.
            assert len(within) <= 2 * limits.requests_per_minute


@given(LIMITS, STEPS)
def test_a_refusal_ends_when_it_says(limits: KeyLimits, steps: list[tuple[float, bool, int]]) -> None:
    now_s, usage = 0.0, fresh_usage(limits, 0.0)
    for wait_s, _, tokens in steps:
        now_s += wait_s
        decision = admit(usage, limits, now_s)
        usage = decision.usage
        if isinstance(decision, Refused) and decision.limit is not Limit.CONCURRENCY:
            assert decision.retry_after_s > 0
            later = admit(usage, limits, now_s + decision.retry_after_s + 1e-6)
            # One limit may give way to the other, but the one that refused does not refuse again.
            assert isinstance(later, Admitted) or later.limit is not decision.limit
        elif isinstance(decision, Admitted):
            usage = released(usage, limits, tokens, now_s)


def test_tokens_beyond_the_allowance_are_paid_back_in_time() -> None:
    limits = KeyLimits(tokens_per_minute=60)
    admitted = admit(fresh_usage(limits, 0.0), limits, 0.0)
    usage = released(admitted.usage, limits, 180, 0.0)
    refused = admit(usage, limits, 0.0)
    assert isinstance(refused, Refused)
    assert refused.limit is Limit.TOKENS
    assert 120 <= refused.retry_after_s <= 122
    assert isinstance(admit(usage, limits, 122.0), Admitted)


def test_time_that_goes_back_gives_nothing() -> None:
    limits = KeyLimits(requests_per_minute=1)
    usage = admit(fresh_usage(limits, 100.0), limits, 100.0).usage
    assert isinstance(admit(usage, limits, 0.0), Refused)


def test_no_limits_never_refuse() -> None:
    limits = KeyLimits()
    usage = fresh_usage(limits, 0.0)
    for _ in range(100):
        decision = admit(usage, limits, 0.0)
        assert isinstance(decision, Admitted)
        usage = decision.usage
