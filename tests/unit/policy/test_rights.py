"""A grant allows what it names and nothing else: whatever is changed or widened is refused, by name."""

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.credentials import Role
from fallow.domain.frames import OpenStage
from fallow.domain.grants import GRANT_LIFE_S, RECOMPUTED_MAX, Grant
from fallow.domain.ids import Digest, NodeId, SessionId
from fallow.domain.model import Span
from fallow.policy import rights
from fallow.policy.rights import CLOCKS_APART_S, ORDER_LIFE_S, Here, Refusal

STEADY = settings(deadline=None, derandomize=True, database=None)
NOW_S = 1_800_000_000.0
GATEWAY, NODE, OTHER = NodeId("a" * 64), NodeId("b" * 64), NodeId("c" * 64)
GRANT = Grant(
    id="0" * 32,
    cell="home",
    session=SessionId("1" * 32),
    gateway=GATEWAY,
    node=NODE,
    model=Digest("d" * 64),
    span=Span(3, 9),
    token_budget=500,
    issued_unix_s=NOW_S,
    expires_unix_s=NOW_S + GRANT_LIFE_S,
)
OPENING = OpenStage(session=GRANT.session, epoch=1, model=GRANT.model, span=GRANT.span, reserve_tokens=500)
HERE = Here(node=NODE, cell="home", gateway=GATEWAY, now_unix_s=NOW_S + 1.0)

CHANGES: dict[Refusal, tuple[str, object]] = {
    Refusal.CELL: ("cell", "work"),
    Refusal.NODE: ("node", OTHER),
    Refusal.GATEWAY: ("gateway", OTHER),
    Refusal.SESSION: ("session", SessionId("2" * 32)),
    Refusal.MODEL: ("model", Digest("e" * 64)),
    Refusal.SPAN: ("span", Span(3, 10)),
    Refusal.BUDGET: ("token_budget", 499),
    Refusal.NOT_YET: ("issued_unix_s", NOW_S + CLOCKS_APART_S + 2.0),
    Refusal.LIFE: ("expires_unix_s", NOW_S + GRANT_LIFE_S + 1.0),
}


def refusal(grant: Grant, opening: OpenStage = OPENING, here: Here = HERE) -> Refusal | None:
    refused = rights.opening_refused(grant, opening, here)
    return None if refused is None else refused.refusal


def test_a_grant_opens_what_it_names() -> None:
    assert refusal(GRANT) is None
    assert refusal(GRANT, msgspec.structs.replace(OPENING, reserve_tokens=1)) is None


@pytest.mark.parametrize("which", CHANGES, ids=str)
def test_a_grant_that_differs_in_one_word_opens_nothing(which: Refusal) -> None:
    name, value = CHANGES[which]
    changed = msgspec.structs.replace(GRANT, **{name: value})
    assert refusal(changed) is which


spans = st.tuples(st.integers(0, 12), st.integers(1, 12)).map(lambda pair: Span(pair[0], pair[0] + pair[1]))


@STEADY
@given(
    session=st.sampled_from([GRANT.session, SessionId("2" * 32)]),
    model=st.sampled_from([GRANT.model, Digest("e" * 64)]),
    span=spans,
    reserve_tokens=st.integers(1, 1000),
    node=st.sampled_from([NODE, OTHER]),
    cell=st.sampled_from(["home", "work"]),
    gateway=st.sampled_from([GATEWAY, OTHER]),
    now_s=st.floats(-2 * GRANT_LIFE_S, 2 * GRANT_LIFE_S),
)
def test_it_opens_exactly_what_it_names(
    session: SessionId, model: Digest, span: Span, reserve_tokens: int, node: NodeId, cell: str, gateway: NodeId,
    now_s: float,
) -> None:  # fmt: skip
    opening = OpenStage(session=session, epoch=7, model=model, span=span, reserve_tokens=reserve_tokens)
    here = Here(node=node, cell=cell, gateway=gateway, now_unix_s=NOW_S + now_s)
    named = (session, model, span, node, cell, gateway) == (
        GRANT.session, GRANT.model, GRANT.span, NODE, "home", GATEWAY,
    )  # fmt: skip
    timely = -CLOCKS_APART_S <= now_s < GRANT_LIFE_S + CLOCKS_APART_S
    expected = named and timely and reserve_tokens <= GRANT.token_budget
    assert (rights.opening_refused(GRANT, opening, here) is None) == expected


@STEADY
@given(now_s=st.floats(-1e6, 1e6), life_s=st.floats(-10, 10 * GRANT_LIFE_S), issued_s=st.floats(-1e6, 1e6))
def test_no_grant_is_good_for_longer_than_any_is(now_s: float, life_s: float, issued_s: float) -> None:
    grant = msgspec.structs.replace(GRANT, issued_unix_s=issued_s, expires_unix_s=issued_s + life_s)
    assert rights.life_left_s(grant, now_s) <= GRANT_LIFE_S + CLOCKS_APART_S
    here = msgspec.structs.replace(HERE, now_unix_s=now_s)
    if rights.opening_refused(grant, OPENING, here) is None:
        assert rights.life_left_s(grant, now_s) > 0


@pytest.mark.parametrize("time_s", [math.nan, math.inf, -math.inf])
def test_times_that_are_none_open_nothing(time_s: float) -> None:
    for name in ("issued_unix_s", "expires_unix_s"):
        assert refusal(msgspec.structs.replace(GRANT, **{name: time_s})) is not None


def test_a_renewal_goes_on_where_a_grant_ends() -> None:
    later = msgspec.structs.replace(
        GRANT, id="1" * 32, issued_unix_s=NOW_S + 400, expires_unix_s=NOW_S + 400 + GRANT_LIFE_S
    )
    here = msgspec.structs.replace(HERE, now_unix_s=NOW_S + 401)
    assert rights.renewal_refused(later, GRANT.session, GRANT, here) is None
    refused = rights.renewal_refused(GRANT, GRANT.session, later, here)
    assert refused is not None and refused.refusal is Refusal.OLDER
    again = rights.renewal_refused(GRANT, GRANT.session, GRANT, here)
    assert again is not None and again.refusal is Refusal.OLDER, "a grant does not renew itself"


@pytest.mark.parametrize("which", [w for w in CHANGES if w is not Refusal.BUDGET], ids=str)
def test_a_renewal_that_differs_in_one_word_renews_nothing(which: Refusal) -> None:
    name, value = CHANGES[which]
    current = msgspec.structs.replace(GRANT, expires_unix_s=NOW_S + 10)
    refused = rights.renewal_refused(msgspec.structs.replace(GRANT, **{name: value}), GRANT.session, current, HERE)
    assert refused is not None and refused.refusal is which


@STEADY
@given(
    end=st.integers(0, 1000), count=st.integers(1, 256), rows_left=st.integers(0, 2000), life_left_s=st.floats(-10, 10)
)
def test_rows_beyond_budget_repairs_or_end_are_refused(
    end: int, count: int, rows_left: int, life_left_s: float
) -> None:
    refused = rights.rows_refused(end, count, GRANT.token_budget, rows_left, life_left_s)
    assert (refused is None) == (end <= GRANT.token_budget and count <= rows_left and life_left_s > 0)
    assert rights.rows_max(GRANT) == RECOMPUTED_MAX * GRANT.token_budget


def test_roles_do_only_what_is_theirs() -> None:
    assert [role for role in Role if rights.may_drive(role)] == [Role.GATEWAY]
    assert not rights.may_drive(None)
    assert {role for role in Role if rights.may_link(role)} == {Role.NODE, Role.GATEWAY}


def test_orders_are_of_today() -> None:
    assert not rights.order_too_old(NOW_S, NOW_S + ORDER_LIFE_S)
    assert rights.order_too_old(NOW_S, NOW_S + ORDER_LIFE_S + CLOCKS_APART_S + 1)
    assert rights.order_too_old(NOW_S, NOW_S - CLOCKS_APART_S - 1)
    assert rights.order_too_old(math.nan, NOW_S)
