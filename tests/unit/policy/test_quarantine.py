"""When a device is suspect, and how many may be taken out of service."""

from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.charter import Quarantine
from fallow.domain.ids import NodeId
from fallow.policy.quarantine import BUDGET_PERIOD_S, pushed_out, room_for_another, room_for_own_word, suspect

PEOPLE = st.sampled_from([NodeId(f"{index:02}") for index in range(8)])
PARTIES = st.frozensets(PEOPLE, min_size=1, max_size=4)


@given(PEOPLE, st.lists(PARTIES))
def test_no_one_party_makes_anybody_suspect_however_often_and_in_whatever_company(
    liar: NodeId, reports: list[frozenset[NodeId]]
) -> None:
    assert not suspect([report | {liar} for report in reports])


@given(PARTIES, PARTIES, st.lists(PARTIES))
def test_two_that_share_nobody_are_enough_whatever_else_is_said(
    one: frozenset[NodeId], other: frozenset[NodeId], more: list[frozenset[NodeId]]
) -> None:
    assert suspect([*more, one, other - one, *more]) or not other - one


@given(st.lists(PARTIES))
def test_suspect_is_whom_no_single_party_can_have_framed(reports: list[frozenset[NodeId]]) -> None:
    framed_by = [who for who in frozenset().union(*reports) if all(who in report for report in reports)]
    assert suspect(reports) == (bool(reports) and not framed_by)


@given(
    st.lists(st.floats(0, 10_000), max_size=20), st.integers(0, 50), st.integers(0, 50), st.integers(0, 20),
    st.floats(0, 1), st.floats(10_000, 14_000),
)  # fmt: skip
def test_nobody_is_taken_out_beyond_the_councils_budget(
    began_s: list[float], out: int, fleet: int, per_hour: int, share: float, now_s: float
) -> None:
    budget = Quarantine(devices_per_hour_max=per_hour, fleet_share_max=share)
    room = room_for_another(began_s, out, fleet, budget, now_s)
    lately = [at_s for at_s in began_s if at_s > now_s - BUDGET_PERIOD_S]
    assert room == (len(lately) + 1 <= per_hour and out + 1 <= share * fleet)
    assert not room_for_another(began_s, out, fleet, None, now_s), "without the council's word nobody is"


@given(
    st.lists(st.floats(0, 10_000), max_size=20), st.integers(0, 50), st.integers(0, 50), st.integers(0, 20),
    st.floats(0, 1), st.floats(10_000, 14_000),
)  # fmt: skip
def test_own_words_leave_room_for_reports(
    began_s: list[float], out: int, fleet: int, per_hour: int, share: float, now_s: float
) -> None:
    budget = Quarantine(devices_per_hour_max=per_hour, fleet_share_max=share)
    assert not room_for_own_word(began_s, out, fleet, None, now_s)
    if room_for_own_word(began_s, out, fleet, budget, now_s):
        lately = [at_s for at_s in began_s if at_s > now_s - BUDGET_PERIOD_S]
        rest = per_hour - len(lately) - 1
        assert rest >= per_hour // 2 and int(share * fleet) - out - 1 >= int(share * fleet) // 2
    elif room_for_another(began_s, out, fleet, budget, now_s):
        assert out or [at_s for at_s in began_s if at_s > now_s - BUDGET_PERIOD_S], "the first always has room"


REFUSERS = st.sampled_from([None, *(NodeId(f"{index:02}") for index in range(5))])
ACCUSED = st.sampled_from([NodeId(f"9{index:01}") for index in range(5)])


@given(st.lists(st.tuples(REFUSERS, ACCUSED), max_size=40), st.integers(1, 8), st.integers(1, 20))
def test_reports_are_bounded_and_who_refuses_most_loses_them(
    told: list[tuple[NodeId | None, NodeId]], of_one_max: int, all_max: int
) -> None:
    kept: list[tuple[NodeId | None, NodeId]] = []
    for report in told:
        kept.append(report)
        place = pushed_out(kept, of_one_max, all_max)
        if place is not None:
            refusers = [refused_by for refused_by, _ in kept]
            refused_by, _ = kept[place]
            assert refusers.count(refused_by) == max(map(refusers.count, refusers))
            of_it = [each for each in kept if each[0] == refused_by]
            assert of_it.count(kept[place]) == max(map(of_it.count, of_it))
            assert kept.index(kept[place]) == place, "the oldest"
            del kept[place]
        assert len(kept) <= all_max and all(
            [refused_by for refused_by, _ in kept].count(each) <= of_one_max for each, _ in kept
        )
