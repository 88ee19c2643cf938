"""A lease cannot be stretched: not by clocks that jump, back or ahead, stand still or begin anew, not by timestamps
that are said again, not by restarts. And a device whose clock is right is not stopped without need."""

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.charter import LEASE_MAX_S, Charter, FleetPolicy, Halt, Standing
from fallow.policy import lease
from fallow.policy.lease import SLICES, Ledger, Tenure

STEADY = settings(deadline=None, derandomize=True, database=None, max_examples=200)
NOW_S = 1_800_000_000.0
LEASE_S = 600.0
SLICE_S = LEASE_S / SLICES

CHARTER = Charter(
    policy=FleetPolicy(epoch=3, version_min="0.3"),
    council={},
    root_version=1,
    timestamp_version=1,
    timestamp_expires_unix_s=NOW_S + LEASE_S,
    models=frozenset(),
)


def confirmed(tenure: Tenure, version: int, expires_s: float, wall_s: float = 0.0, now_s: float = 0.0) -> Tenure:
    return lease.confirmed(tenure, (1, version), NOW_S + expires_s, LEASE_S, NOW_S + wall_s, now_s)


def test_a_fresh_word_gives_a_lease_paid_in_slices() -> None:
    tenure = lease.paid(confirmed(Tenure(), 1, LEASE_S), SLICE_S, 0.0)
    assert lease.live(tenure, SLICE_S - 1) and not lease.live(tenure, SLICE_S)
    now_s, paid = 0.0, 1
    while lease.live(tenure, now_s):
        if lease.payment_due(tenure, SLICE_S, now_s):
            tenure, paid = lease.paid(tenure, SLICE_S, now_s), paid + 1
        now_s += 1.0
    assert now_s == LEASE_S and paid == SLICES, "a device that is cut off stops at the lease's end"
    assert not lease.live(lease.paid(tenure, SLICE_S, now_s), now_s)


def test_a_keeper_that_looks_when_it_is_told_to_is_never_too_late() -> None:
    tenure, now_s = lease.paid(confirmed(Tenure(), 1, LEASE_S), SLICE_S, 0.0), 0.0
    while lease.live(tenure, now_s):
        assert now_s < LEASE_S
        if lease.payment_due(tenure, SLICE_S, now_s):
            tenure = lease.paid(tenure, SLICE_S, now_s)
        now_s += lease.next_look_s(tenure, SLICE_S, now_s)
    assert now_s == LEASE_S and lease.next_look_s(tenure, SLICE_S, now_s) == math.inf


def test_nothing_is_live_before_the_repository_was_asked() -> None:
    assert not lease.live(lease.paid(Tenure(ledger=Ledger(left_s=100.0)), SLICE_S, 0.0), 0.0)


def test_only_a_newer_version_gives_more() -> None:
    tenure = confirmed(Tenure(), 5, LEASE_S)
    assert confirmed(tenure, 5, LEASE_S, now_s=300) is tenure
    assert confirmed(tenure, 4, 10 * LEASE_S, now_s=300) is tenure, "an older one, whatever it promises"
    newer = confirmed(tenure, 6, LEASE_S + 60, wall_s=60, now_s=60)
    assert newer.end_s == 60 + LEASE_S
    rotated = lease.confirmed(tenure, (2, 1), NOW_S + 660, LEASE_S, NOW_S + 60, 60)
    assert rotated.end_s == 60 + LEASE_S, "after a root that replaced the timestamp's key, versions count anew"


def test_a_clock_that_was_set_back_makes_no_old_word_fresh() -> None:
    ledger = confirmed(Tenure(), 1, LEASE_S + 5000, wall_s=5000).ledger
    assert ledger.floor_unix_s == NOW_S + 5000
    late = lease.confirmed(Tenure(ledger=ledger), (1, 2), NOW_S + 900, LEASE_S, NOW_S, 0.0)
    assert late.end_s == 0.0, "by the wall clock it is fresh, by what was signed since it is over"


def test_a_timestamp_from_the_far_future_does_not_stop_a_device_for_good() -> None:
    """A stolen online key signs any expiry. When it has been replaced, the device works again within a day."""
    ledger = confirmed(Tenure(), 1, 1e9).ledger
    assert ledger.floor_unix_s <= NOW_S + LEASE_MAX_S
    day_s = LEASE_MAX_S + 1
    after = lease.confirmed(Tenure(ledger=ledger), (2, 1), NOW_S + day_s + LEASE_S, LEASE_S, NOW_S + day_s, 0.0)
    assert after.end_s == pytest.approx(LEASE_S)


times = st.floats(-1e7, 1e7)
steps = st.one_of(
    st.tuples(st.just("wait"), st.floats(0, 400)),
    st.tuples(st.just("wall"), times),
    st.tuples(st.just("replay"), st.integers(0, 3)),
    st.tuples(st.just("pay"), st.just(0)),
    st.tuples(st.just("restart"), st.floats(0, 1e6)),
    st.tuples(st.just("crash before writing"), st.floats(0, 1e6)),
)


@STEADY
@given(st.lists(steps, max_size=60))
def test_no_sequence_stretches_a_lease(sequence: list[tuple[str, float]]) -> None:
    """Four timestamps, said again and again under clocks that do what they like: what is worked under each is no more
    than its lease, over all restarts, and in a run nothing works beyond its first sight + `LEASE_S`."""
    stamps = [(1, NOW_S + 100.0), (2, NOW_S + 700.0), (3, NOW_S + 1e9), (4, NOW_S - 1e9)]
    tenure, written, wall_s, now_s = Tenure(), Ledger(), NOW_S, 0.0
    worked_s: dict[tuple[int, int], float] = {}
    first_seen_s: dict[tuple[int, int], float] = {}
    for what, amount in sequence:
        if what == "wait":
            until_s = tenure.until_s
            if until_s is not None and until_s > now_s:
                version = tenure.ledger.version
                worked_s[version] = worked_s.get(version, 0.0) + min(amount, until_s - now_s)
                assert min(now_s + amount, until_s) <= first_seen_s[version] + LEASE_S + 1e-6
            now_s += amount
        elif what == "wall":
            wall_s = NOW_S + amount
        elif what == "replay":
            number, expires_s = stamps[int(amount)]
            tenure = lease.confirmed(tenure, (1, number), expires_s, LEASE_S, wall_s, now_s)
            first_seen_s.setdefault(tenure.ledger.version, now_s)
            written = tenure.ledger
        elif what == "pay":
            tenure = lease.paid(tenure, SLICE_S, now_s)
            written = tenure.ledger
        elif what == "restart":
            tenure, now_s, first_seen_s = Tenure(ledger=written), amount, {}
        else:
            # The process dies after it wrote what a payment leaves, and before it worked for it.
            written = lease.paid(tenure, SLICE_S, now_s).ledger
            tenure, now_s, first_seen_s = Tenure(ledger=written), amount, {}
        assert written.floor_unix_s >= 0.0 and written.left_s >= 0.0
    for version, total_s in worked_s.items():
        assert total_s <= LEASE_S + 1e-6, f"worked {total_s} s under version {version}"


@STEADY
@given(expires_s=times, wall_s=times, floor_s=times, lease_s=st.floats(5, LEASE_MAX_S))
def test_the_floor_only_rises_and_no_lease_is_longer_than_the_policy_says(
    expires_s: float, wall_s: float, floor_s: float, lease_s: float
) -> None:
    before = Tenure(ledger=Ledger(floor_unix_s=NOW_S + floor_s))
    after = lease.confirmed(before, (1, 1), NOW_S + expires_s, lease_s, NOW_S + wall_s, 0.0)
    assert after.ledger.floor_unix_s >= before.ledger.floor_unix_s
    assert after.end_s is not None and 0 <= after.end_s <= lease_s
    if expires_s <= max(wall_s, floor_s):
        assert after.end_s == 0


def test_a_restart_costs_at_most_a_slice_of_an_honest_lease() -> None:
    tenure = lease.paid(confirmed(Tenure(), 1, LEASE_S), SLICE_S, 0.0)
    again = confirmed(Tenure(ledger=tenure.ledger), 1, LEASE_S, wall_s=10, now_s=3.0)
    assert again.end_s == pytest.approx(3.0 + LEASE_S - SLICE_S)
    assert lease.live(lease.paid(again, SLICE_S, 3.0), 4.0), "it works again at once"


def test_what_bars_work_is_said_in_order() -> None:
    halt = Halt(network="n", epoch=3, why="poisoned weights", issued_unix_s=NOW_S)
    barred = lease.barred(CHARTER, [halt], "0.3.0", revoked=False)
    assert barred is not None and barred[0] is Standing.HALTED and "poisoned weights" in barred[1]
    barred = lease.barred(CHARTER, [halt], "0.3.0", revoked=True)
    assert barred is not None and barred[0] is Standing.REVOKED
    barred = lease.barred(CHARTER, [], "0.2.9", revoked=False)
    assert barred is not None and barred[0] is Standing.TOO_OLD
    assert lease.barred(CHARTER, [], "0.3", revoked=False) is None
    assert lease.barred(None, [], "0.1", revoked=False) is None


def test_releases_are_ordered_by_numbers() -> None:
    order = ["", "0.3.0", "0.3.1", "0.9", "0.10", "1.0"]
    keys = [lease.release_order(release) for release in order]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)
    assert lease.release_order("0.3") == lease.release_order("0.3.0")
    assert lease.release_order("garbage") == lease.release_order("0")


def test_a_ledger_survives_the_disk() -> None:
    ledger = Ledger(floor_unix_s=NOW_S + 0.25, version=(3, 9), left_s=math.pi)
    assert msgspec.json.decode(msgspec.json.encode(ledger), type=Ledger) == ledger


@STEADY
@given(st.integers(0, 10**6), st.floats(0, LEASE_S), st.sampled_from(["", "a" * 64, "b" * 64]))
def test_a_ledger_counts_in_its_own_network_and_in_no_other(version: int, left_s: float, of: str) -> None:
    """One from before networks were written down counts wherever it is: nothing is gained by an update."""
    kept = Ledger(network=of, floor_unix_s=NOW_S, version=(7, version), left_s=left_s)
    mine = lease.ledger_of(kept, "a" * 64)
    assert mine == (Ledger(network="a" * 64) if of == "b" * 64 else msgspec.structs.replace(kept, network="a" * 64))
    after = lease.paid(confirmed(Tenure(ledger=mine), 1, LEASE_S), SLICE_S, 0.0)
    assert after.ledger.network == "a" * 64
