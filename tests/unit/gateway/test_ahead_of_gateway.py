"""What a gateway keeps of a chain that is ahead of it, and what it is told."""

import msgspec

from fallow.domain.fleet import Hop
from fallow.domain.frames import AHEAD_ROWS, PeerAddress, Result
from fallow.domain.ids import NodeId, SessionId, at_visit
from fallow.domain.model import Span
from fallow.domain.sampling import Recipe
from fallow.gateway.running_ahead import MISSES_MAX, RunningAhead, leave_for

SESSION = SessionId("5" * 32)
TOKENS = 50


def hop(node: str, first: int, last: int, visit: int = 0) -> Hop:
    return Hop(address=PeerAddress(NodeId(node * 64), ()), span=Span(first, last), visit=visit)


CHAIN = [Hop(address=PeerAddress(NodeId("a" * 64), ()), span=Span(0, 4))]
PAYLOAD = bytes(8 * 64)


def leave() -> RunningAhead:
    """Of a chain that is open, and may."""
    ahead = RunningAhead(leave_for(Recipe(), 64, prompt=40, total=60, ends=(2, 3)))
    assert ahead.told(SESSION, CHAIN) is not None
    return ahead


def result(end: int, chosen: int | None = 7, k: int | None = 64) -> Result:
    return Result(session=SESSION, epoch=1, position=end - 1, count=1, logit_count=1, k=k, chosen=chosen)


def test_the_last_stage_is_told_who_is_first_and_where_the_answer_ends() -> None:
    told = leave().told(SESSION, [hop("a", 0, 2), hop("b", 2, 4)])
    assert told is not None
    assert (told.first.node, told.first_session) == ("a" * 64, SESSION)
    assert (told.drawn_from, told.until, told.ends) == (40, 59, (2, 3))


def test_the_first_stage_is_called_by_the_name_of_its_visit() -> None:
    told = leave().told(SESSION, [hop("a", 0, 2, visit=1), hop("b", 2, 4), hop("a", 4, 6)])
    assert told is not None
    assert told.first_session == at_visit(SESSION, 1)


def test_a_chain_may_not_run_ahead_without_leave_or_of_a_whole_vocabulary() -> None:
    assert RunningAhead().told(SESSION, [hop("a", 0, 4)]) is None
    assert leave_for(Recipe(), None, prompt=4, total=9, ends=()) is None


def test_a_cut_that_spares_no_candidate_is_not_told() -> None:
    cut = {top_k: leave_for(Recipe(top_k=top_k), 64, prompt=4, total=9, ends=()) for top_k in (63, 64, 10**30)}
    assert {top_k: each.recipe.top_k for top_k, each in cut.items() if each} == {63: 63, 64: None, 10**30: None}


def test_a_chain_that_misses_does_not_run_ahead_again() -> None:
    ahead = leave()
    for _ in range(MISSES_MAX):
        assert ahead.told(SESSION, [hop("a", 0, 4)]) is not None
        ahead.missed()
    assert ahead.told(SESSION, [hop("a", 0, 4)]) is None


def test_a_result_waits_for_the_token_that_it_leads_up_to() -> None:
    ahead = leave()
    ahead.note(result(TOKENS), PAYLOAD, TOKENS)
    assert ahead.early(TOKENS) is None, "it is not early"
    ahead.note(result(TOKENS + 1), PAYLOAD, TOKENS)
    ahead.note(result(TOKENS + 2), PAYLOAD, TOKENS)
    assert not ahead.differs(TOKENS, 7)
    assert ahead.early(TOKENS + 1) == (result(TOKENS + 1), PAYLOAD)
    assert ahead.early(TOKENS + 1) is None
    assert ahead.early(TOKENS + 3) is None, "those before it are of no use"
    assert ahead.early(TOKENS + 2) is None


def test_another_token_than_the_chain_went_on_with_differs() -> None:
    ahead = leave()
    ahead.note(result(TOKENS, chosen=7), PAYLOAD, TOKENS)
    assert ahead.differs(TOKENS, 8)
    assert not ahead.differs(TOKENS + 1, 8), "of this the chain said nothing"


def test_what_came_after_a_miss_is_void() -> None:
    ahead = leave()
    for end in range(TOKENS, TOKENS + 4):
        ahead.note(result(end), PAYLOAD, TOKENS)
    assert ahead.differs(TOKENS, 8)
    ahead.missed()
    assert ahead.early(TOKENS + 1) is None
    assert not ahead.differs(TOKENS + 1, 9)
    ahead.note(result(TOKENS + 1), PAYLOAD, TOKENS)
    assert ahead.early(TOKENS + 1) is None, "not before the chain is opened again"


def test_who_has_no_leave_is_not_listened_to() -> None:
    ahead = leave()
    ahead.forget()
    ahead.note(result(TOKENS + 1), PAYLOAD, TOKENS)
    ahead.note(result(TOKENS, chosen=7), PAYLOAD, TOKENS)
    assert ahead.early(TOKENS + 1) is None and not ahead.differs(TOKENS, 8)
    without = RunningAhead()
    assert without.told(SESSION, CHAIN) is None
    without.note(result(TOKENS + 1), PAYLOAD, TOKENS)
    assert without.early(TOKENS + 1) is None


def test_a_prompt_leads_to_no_token_before_its_end() -> None:
    ahead = leave()
    ahead.note(result(30, chosen=7), PAYLOAD, 45)
    none = msgspec.structs.replace(result(45, chosen=7), logit_count=0, k=None)
    ahead.note(none, b"", 45)
    assert not ahead.differs(30, 8) and not ahead.differs(45, 8)


def test_what_is_kept_is_bounded_in_rows_and_bytes() -> None:
    ahead = leave()
    for end in range(TOKENS + 1, TOKENS + 500):
        ahead.note(result(end), PAYLOAD, TOKENS)
    assert len(ahead._early) == len(ahead._chosen) == AHEAD_ROWS
    ahead = leave()
    ahead.note(result(TOKENS + 1, k=None), bytes(4 << 20), TOKENS)
    ahead.note(result(TOKENS + 1), bytes(4 << 20), TOKENS)
    ahead.note(msgspec.structs.replace(result(TOKENS + 1), logit_count=0), PAYLOAD, TOKENS)
    ahead.note(msgspec.structs.replace(result(TOKENS + 1), position=TOKENS - 1, count=2), PAYLOAD, TOKENS)
    assert ahead.early(TOKENS + 1) is None


def test_an_answer_of_one_token_needs_no_leave() -> None:
    assert leave_for(Recipe(), 64, prompt=40, total=41, ends=()) is None
