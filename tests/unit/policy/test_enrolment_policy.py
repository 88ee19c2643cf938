"""Who is admitted, and who may ask for what: properties that hold for every member, invitation and time."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.credentials import PASSPORT_LIFE_S, Role
from fallow.domain.fleet import Tier
from fallow.domain.ids import NodeId
from fallow.policy.enrolment import (
    ALLOWED,
    BUS_DEPARTURES_KEPT_S,
    FORGOTTEN_S,
    INVITATION_LIFE_MAX_S,
    MACHINE,
    MOVE_EVERY_S,
    RETRY_MAX_S,
    REVOCATION_KEPT_S,
    Action,
    Enrolment,
    InvitationRecord,
    Standpoint,
    bus_since_unix_s,
    issue_unix_s,
    may_ask,
    may_enrol,
    may_invite,
    may_move,
    renewal_wait_s,
    retry_wait_s,
    seen_unix_s,
    void_until_unix_s,
)

NODES = st.sampled_from([NodeId(digit * 64) for digit in "abc"])
TIMES = st.floats(0, 1e9)
ENROLMENTS = st.builds(
    Enrolment,
    node=NODES,
    role=st.sampled_from(Role),
    tier=st.sampled_from(Tier),
    name=st.just("x"),
    cell=st.just("home"),
    enrolled_unix_s=TIMES,
    seen_unix_s=TIMES,
    revoked_unix_s=st.none() | TIMES,
    left_unix_s=st.none() | TIMES,
    moved_unix_s=st.none() | TIMES,
)
INVITATIONS = st.builds(
    InvitationRecord,
    id=st.just("i"),
    role=st.sampled_from(Role),
    tier=st.sampled_from(Tier),
    name=st.none(),
    cell=st.just("home"),
    made_by=st.just(MACHINE) | NODES,
    made_unix_s=TIMES,
    expires_unix_s=TIMES,
    used_by=st.none() | NODES,
    withdrawn_unix_s=st.none() | TIMES,
)


@given(ENROLMENTS, TIMES, TIMES)
def test_who_is_cut_has_no_good_passport_and_who_comes_back_gets_one(
    who: Enrolment, now_s: float, later_s: float
) -> None:
    """By the bus's rule, which knows whole seconds only: a passport issued at or before the time is void."""
    void_s = void_until_unix_s(who, now_s)
    assert int(who.seen_unix_s) <= int(void_s) and int(now_s) <= int(void_s)
    issued_s = issue_unix_s(void_s, later_s)
    assert int(issued_s) > void_s and int(issued_s) > int(void_s)
    assert later_s <= issued_s <= max(later_s, void_s + 1.0)
    assert issue_unix_s(None, later_s) == later_s


@given(ENROLMENTS, st.none() | TIMES, st.lists(TIMES, min_size=1, max_size=4), TIMES)
def test_whatever_the_clock_does_every_passport_is_void_for_who_is_cut(
    who: Enrolment, void_s: float | None, times_s: list[float], now_s: float
) -> None:
    issued = []
    for at_s in times_s:
        issued.append(issue_unix_s(void_s, at_s))
        who = msgspec.structs.replace(who, seen_unix_s=seen_unix_s(who, issued[-1]))
    assert all(int(each_s) <= int(void_until_unix_s(who, now_s)) for each_s in issued)
    assert seen_unix_s(None, now_s) == now_s


@given(st.none() | TIMES, TIMES)
def test_the_bus_is_told_of_a_day_before_the_newest_revocation_and_of_who_left_lately(
    last_s: float | None, now_s: float
) -> None:
    revoked_s, left_s = bus_since_unix_s(last_s, now_s)
    assert left_s == now_s - BUS_DEPARTURES_KEPT_S and BUS_DEPARTURES_KEPT_S >= 2 * PASSPORT_LIFE_S
    assert revoked_s <= now_s - REVOCATION_KEPT_S
    assert last_s is None or revoked_s < last_s, "the newest is always told"


@given(ENROLMENTS, st.sampled_from(Action), TIMES)
def test_only_members_in_good_standing_may_ask_and_only_what_the_table_says(
    who: Enrolment, action: Action, now_s: float
) -> None:
    standing = who.revoked_unix_s is None and who.left_unix_s is None and now_s - who.seen_unix_s <= FORGOTTEN_S
    assert may_ask(who, action, now_s).yes == (standing and action in ALLOWED[who.role])


@given(INVITATIONS, NODES, st.sampled_from(Role), st.none() | ENROLMENTS, st.none() | ENROLMENTS, TIMES)
def test_nobody_is_admitted_by_what_was_used_by_another_expired_or_for_another_role(
    invitation: InvitationRecord,
    node: NodeId,
    role: Role,
    known: Enrolment | None,
    inviter: Enrolment | None,
    now_s: float,
) -> None:
    if not may_enrol(invitation, node, role, known, inviter, now_s).yes:
        return
    assert invitation.used_by in {None, node}
    assert invitation.role is role
    assert known is None or known.revoked_unix_s is None
    if invitation.used_by is None:
        assert now_s < invitation.expires_unix_s
        assert invitation.withdrawn_unix_s is None
        assert invitation.made_by == MACHINE or may_ask(inviter, Action.INVITE, now_s).yes
    else:
        assert known is not None
        assert known.left_unix_s is None


@given(st.sampled_from(Standpoint), st.sampled_from(Role), st.sampled_from(Tier), st.floats(-10, 1e8))
def test_from_afar_nothing_is_invited_that_is_not_invited_on_the_machine(
    standpoint: Standpoint, role: Role, tier: Tier, life_s: float
) -> None:
    if may_invite(standpoint, role, tier, life_s).yes:
        assert may_invite(Standpoint.MACHINE, role, tier, life_s).yes
        assert 0 < life_s <= INVITATION_LIFE_MAX_S
        assert role is not Role.REGISTRAR
    if may_invite(Standpoint.AFAR, role, tier, life_s).yes:
        assert role not in {Role.OPERATOR, Role.COORDINATOR, Role.REGISTRAR}
        assert tier < Tier.ATTESTED


def test_no_role_but_the_operator_invites_or_revokes_and_every_role_is_in_the_table() -> None:
    assert set(ALLOWED) == set(Role)
    for action in (Action.INVITE, Action.REVOKE):
        assert [role for role in Role if action in ALLOWED[role]] == [Role.OPERATOR]
    assert {role for role in Role if Action.READ_JOURNAL in ALLOWED[role]} == {Role.OPERATOR, Role.AUDITOR}


@given(st.floats(1, 1e5), st.floats(0, 1, exclude_max=True), st.integers(0, 10_000))
def test_waits_are_bounded(life_s: float, draw: float, failures: int) -> None:
    assert 0.44 * life_s < renewal_wait_s(life_s, draw) < 0.56 * life_s
    assert 0 < retry_wait_s(failures, draw) <= RETRY_MAX_S


@given(ENROLMENTS, st.sampled_from(["home", "harbour", "nowhere"]), TIMES)
def test_only_devices_move_seldom_and_to_cells_that_there_are(who: Enrolment, cell: str, now_s: float) -> None:
    lately = who.moved_unix_s is not None and abs(now_s - who.moved_unix_s) < MOVE_EVERY_S
    assert may_move(who, cell, {"home", "harbour"}, now_s).yes == (
        who.role is Role.NODE and cell != "nowhere" and not lately
    )
