"""What a last stage says comes next, and what a first stage does with it until its gateway says the same."""

import struct

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.frames import AHEAD_ROWS, Ahead, PeerAddress, Phase, Rows
from fallow.domain.ids import NodeId, SessionId
from fallow.domain.sampling import Recipe
from fallow.engine.contract import Step, Stepped
from fallow.gateway.contract import Candidates
from fallow.gateway.sampling import Sampler, SamplingParams
from fallow.node.running_ahead import Told, next_rows

SESSION = SessionId("5" * 32)
FIRST = PeerAddress(NodeId("f" * 64), ("10.0.0.1:4",))
PROMPT = 10
EPOCH = 3


def ahead(recipe: Recipe | None = None, until: int = 100, ends: tuple[int, ...] = ()) -> Ahead:
    return Ahead(
        first=FIRST, first_session=SESSION, recipe=recipe or Recipe(), drawn_from=PROMPT, until=until, ends=ends
    )


def step(position: int, count: int = 1, top_k: int | None = 3) -> Step:
    return Step(
        session=SessionId("e" * 32), position=position, count=count, phase=Phase.DECODE, logits_from=0, top_k=top_k,
        payload=b"",
    )  # fmt: skip


def stepped(*rows: list[tuple[int, float]]) -> Stepped:
    """Rows of candidates."""
    ids = np.array([[token for token, _ in row] for row in rows], np.int32)
    logprobs = np.array([[value for _, value in row] for row in rows], np.float32)
    payload = ids.tobytes() + logprobs.tobytes()
    return Stepped(payload=payload, logit_count=len(rows), k=ids.shape[1], compute_s=0.0)


ONE = stepped([(41, -0.1), (42, -3.0), (43, -4.0)])


def rows(position: int, count: int = 1, phase: Phase = Phase.DECODE) -> Rows:
    return Rows(session=SESSION, epoch=EPOCH, position=position, count=count, phase=phase, logits_from=0, top_k=3)


def token(value: int) -> bytes:
    return struct.pack("<i", value)


def test_what_comes_next_is_one_row_for_the_first_stage() -> None:
    told = next_rows(ahead(), EPOCH, step(20), ONE)
    assert told is not None
    header, payload = told
    assert (header.session, header.epoch, header.position, header.count) == (SESSION, EPOCH, 21, 1)
    assert (header.phase, header.logits_from, header.top_k) == (Phase.DECODE, 21, 3)
    assert payload == token(41)


def test_of_several_rows_the_last_one_counts() -> None:
    told = next_rows(ahead(), EPOCH, step(PROMPT - 4, count=4), stepped([(1, -0.1), (2, -1)], [(7, -0.2), (8, -1)]))
    assert told is not None
    assert (told[0].position, told[1]) == (PROMPT, token(7))


def test_nothing_comes_next_after_the_end_before_the_prompts_or_without_a_distribution() -> None:
    assert next_rows(ahead(ends=(41,)), EPOCH, step(20), ONE) is None
    assert next_rows(ahead(until=21), EPOCH, step(20), ONE) is None
    assert next_rows(ahead(), EPOCH, step(PROMPT - 2), ONE) is None
    nothing = Stepped(payload=b"", logit_count=0, k=3, compute_s=0.0)
    assert next_rows(ahead(), EPOCH, step(20), nothing) is None
    whole = Stepped(payload=bytes(400), logit_count=1, k=None, compute_s=0.0)
    assert next_rows(ahead(), EPOCH, step(20, top_k=None), whole) is None


LOGPROBS = st.lists(st.floats(-20, 0, width=32), min_size=2, max_size=64, unique=True)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    top_p=st.floats(0.1, 1),
    top_k=st.none() | st.integers(1, 100),
    min_p=st.floats(0, 0.5),
)


@given(st.lists(LOGPROBS, min_size=1, max_size=6), PARAMS, st.integers(-(1 << 63), (1 << 64) - 1), st.integers(0, 7))
def test_a_device_comes_to_the_tokens_that_the_gateway_chooses(
    answer: list[list[float]], params: SamplingParams, seed: int, index: int
) -> None:
    sampler = Sampler(params, seed, index)
    recipe = sampler.recipe
    for nth, values in enumerate(answer):
        ordered = sorted(values, reverse=True)
        ids = np.arange(100, 100 + len(values), dtype=np.int32)
        chosen = sampler.choose(Candidates(ids, np.array(ordered, np.float32), False)).token
        distribution = stepped(list(zip(ids.tolist(), ordered, strict=True)))
        told = next_rows(ahead(recipe), EPOCH, step(PROMPT + nth - 1, top_k=64), distribution)
        assert told is not None
        assert told[1] == token(chosen)


def heard(confirmed: int) -> Told[str]:
    """Of a first stage that has its gateway's rows up to there."""
    told: Told[str] = Told(confirmed - 1)
    assert told.confirm(rows(confirmed - 1), token(0)) is None
    return told


def test_a_row_that_is_next_is_computed_and_others_are_forgotten() -> None:
    told = heard(20)
    assert told.next(rows(20), token(1), 20, "a") is not None
    assert told.next(rows(20), token(1), 21, "again") is None
    assert told.next(rows(23), token(1), 21, "a gap") is None
    assert told.next(rows(21, count=2), bytes(8), 21, "two") is None
    assert told.next(rows(21), bytes(3), 21, "no token") is None
    assert told.next(rows(21, phase=Phase.PREFILL), token(1), 21, "a prompt's") is None
    assert told.due() is None


def test_before_the_gateway_has_said_anything_nothing_else_counts() -> None:
    assert Told[str](20).next(rows(20), token(1), 20, "") is None


def test_of_what_was_told_position_and_token_count_alone() -> None:
    told = heard(20)
    liars = msgspec.structs.replace(rows(20), logits_from=1 << 30, top_k=None)
    row = told.next(liars, token(1), 20, "")
    assert row is not None and (row.logits_from, row.top_k) == (20, 3)


def test_what_the_gateway_has_said_itself_is_not_taken_from_anybody_else() -> None:
    told = heard(20)
    assert told.confirm(rows(20), token(5)) is None
    assert told.next(rows(20), token(7), 20, "late") is None


def test_after_a_gap_the_gateways_rows_prove_nothing() -> None:
    told = heard(20)
    assert told.next(rows(20), token(1), 20, "") is not None
    assert told.confirm(rows(21), token(9)) is None
    assert told.confirmed == 20
    assert told.confirm(rows(20), token(2)) == 20
    assert told.confirmed == 20


def test_a_row_that_is_too_early_waits_for_the_gateways() -> None:
    told = heard(20)
    for position in range(20, 20 + AHEAD_ROWS):
        assert told.next(rows(position), token(position), position, "") is not None
    position = 20 + AHEAD_ROWS
    assert told.next(rows(position), token(9), position, "early") is None
    assert told.beyond(position) == AHEAD_ROWS
    assert told.due() is None
    assert told.confirm(rows(20), token(20)) is None
    assert told.due() == "early"
    assert told.due() is None
    assert told.next(rows(position), token(9), position, "early") is not None


@given(st.integers(1, AHEAD_ROWS), st.integers(0, 3), st.data())
def test_the_gateways_word_is_compared_wherever_its_frames_begin_and_end(
    computed: int, before: int, data: st.DataObject
) -> None:
    """It may come in one frame or several, beginning below what was told."""
    told = heard(20)
    for position in range(20, 20 + computed):
        assert told.next(rows(position), token(position), position, "") is not None
    wrong = data.draw(st.none() | st.integers(20, 19 + computed))
    first = 20 - before
    found = None
    while first < 20 + computed and found is None:
        count = data.draw(st.integers(1, 20 + computed - first))
        payload = b"".join(token(-1 if at == wrong else at) for at in range(first, first + count))
        found = told.confirm(rows(first, count), payload)
        first += count
    assert found == wrong
    assert told.confirmed == (20 + computed if wrong is None else wrong)
