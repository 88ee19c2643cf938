"""Whatever a registrar tells, and however often, a member keeps what proves that a journal was rewritten."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.policy.noted_heads import NOTED_MAX, RECENT_MAX, WEEK_S, WEEKS_MAX, NotedHead, goes_on, with_head

STEADY = settings(deadline=None, derandomize=True, database=None, max_examples=50)


def head(seq: int, unix_s: float, digest: str = "a") -> NotedHead:
    return NotedHead(seq, digest, unix_s)


def noted_over(gaps_s: list[float]) -> list[tuple[NotedHead, ...]]:
    """What is kept after each of many heads, so long after one another."""
    kept: tuple[NotedHead, ...] = ()
    steps, now_s = [], 0.0
    for seq, gap_s in enumerate(gaps_s, 1):
        now_s += gap_s
        kept = with_head(kept, head(seq, now_s))
        steps.append(kept)
    return steps


@STEADY
@given(st.lists(st.floats(-2 * WEEK_S, 2 * WEEK_S), min_size=1, max_size=200))
def test_whatever_the_clock_does_the_oldest_and_the_newest_stay_within_a_bound(gaps_s: list[float]) -> None:
    for count, kept in enumerate(noted_over(gaps_s), 1):
        assert len(kept) <= NOTED_MAX
        seqs = [each.seq for each in kept]
        assert seqs == sorted(set(seqs))
        assert seqs[0] == 1
        assert seqs[-RECENT_MAX:] == list(range(max(1, count - RECENT_MAX + 1), count + 1))


def test_of_a_year_one_head_a_week_is_left() -> None:
    """A journal rewritten at any time since contradicts a head of that week, or of the next."""
    gap_s = 6 * 3600.0
    kept = noted_over([gap_s] * int(WEEKS_MAX * WEEK_S / gap_s))[-1]
    times = [each.noted_unix_s for each in kept]
    assert len(kept) >= WEEKS_MAX
    assert max(after - before for before, after in pairwise(times)) <= WEEK_S + RECENT_MAX * gap_s


@STEADY
@given(st.integers(0, 100), st.sampled_from("ab"))
def test_a_lower_or_contradicting_head_does_not_go_on(seq: int, digest: str) -> None:
    kept = (head(1, 0.0), head(50, 1.0))
    assert goes_on(kept, seq, digest) == (seq > 50 or (seq == 50 and digest == "a"))
    assert goes_on((), seq, digest)


def test_the_same_head_again_changes_nothing() -> None:
    kept = (head(1, 0.0), head(50, 1.0))
    assert with_head(kept, head(50, WEEK_S)) is kept
