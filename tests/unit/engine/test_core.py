"""The order of calls: decode together and first, prefill in chunks and in turns, and pads that harm nobody."""

import numpy as np
import pytest
from engine_world import SMALL, Driver, family, name_of, step_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fallow.domain.errors import EngineError, KvExhausted, PositionMismatch, UnknownSession
from fallow.domain.frames import Phase
from fallow.domain.model import Quantisation, Span
from fallow.engine.hosted import HostedModel
from fallow.engine.kv import Slots
from fallow.policy.batching import BUSY_CHUNK_ROWS, Turn

TEXT = np.random.default_rng(5).integers(0, 288, 250).tolist()


@pytest.fixture(scope="module")
def model():
    return family("llama", Quantisation.Q8)


@pytest.fixture
def driver(model):
    return Driver(model.hosted())


def opened(driver, model, *names, reserve_tokens=250, span=None):
    for name in names:
        driver.core.open(name, model.digest, span or model.whole, reserve_tokens)
    return names


def test_a_long_prefill_delays_others_decode_by_one_small_chunk(driver, model):
    long, quick = opened(driver, model, name_of(1), name_of(2))
    driver.run(step_of(quick, 0, TEXT[:5]))
    long_ticket = driver.submit(step_of(long, 0, TEXT, logits_from=249))
    position, waited, turns = 5, 0, []
    ticket = driver.submit(step_of(quick, position, TEXT[5:6], Phase.DECODE))
    while True:
        turns.append(driver.core.turn())
        done = dict(driver.core.outcomes())
        waited = 0 if ticket in done else waited + 1
        assert waited <= 1
        if ticket in done:
            position += 1
            ticket = driver.submit(step_of(quick, position, TEXT[position : position + 1], Phase.DECODE))
        if long_ticket in done:
            break
    assert turns == [Turn.DECODE, Turn.PREFILL] * -(-250 // BUSY_CHUNK_ROWS)


def test_prefills_take_turns_and_the_oldest_begins(driver, model):
    """Three chunks each, since a prefill alone runs in chunks of 128 rows."""
    names = opened(driver, model, name_of(1), name_of(2))
    tickets = [driver.submit(step_of(name, 0, TEXT[:200], logits_from=199)) for name in names]
    finished = []
    while driver.core.has_work:
        driver.core.turn()
        finished.append([ticket for ticket, _ in driver.core.outcomes()])
    assert finished == [[], [], [tickets[0]], [tickets[1]]]


def test_all_ready_decode_steps_share_one_turn(driver, model):
    names = opened(driver, model, *map(name_of, range(8)), reserve_tokens=50)
    for number, name in enumerate(names):
        driver.run(step_of(name, 0, TEXT[: 3 + number]))
    tickets = [driver.submit(step_of(name, 3 + n, TEXT[:1], Phase.DECODE)) for n, name in enumerate(names)]
    assert driver.core.turn() is Turn.DECODE
    assert [ticket for ticket, _ in driver.core.outcomes()] == tickets
    assert not driver.core.has_work


def test_queued_steps_run_in_order_and_a_failed_one_stops_those_that_count_on_it(driver, model):
    [name] = opened(driver, model, name_of(1))
    tickets = [
        driver.submit(step_of(name, 0, TEXT[:4])),
        driver.submit(step_of(name, 5, TEXT[5:6], Phase.DECODE)),
        driver.submit(step_of(name, 4, TEXT[4:5], Phase.DECODE)),
    ]
    outcomes = driver.settle()
    assert isinstance(outcomes[tickets[1]], PositionMismatch)
    assert outcomes[tickets[2]].logit_count == 1


def test_a_rewind_waits_for_the_steps_before_it(driver, model):
    [name] = opened(driver, model, name_of(1))
    first = driver.submit(step_of(name, 0, TEXT[:4]))
    driver.core.rewind(100, name, 2)
    last = driver.submit(step_of(name, 2, TEXT[2:4]))
    outcomes = driver.settle()
    assert outcomes[100] is None
    assert bytes(outcomes[first].payload)[-8:] == bytes(outcomes[last].payload)[-8:]
    driver.core.rewind(101, name, 5)
    assert isinstance(driver.settle()[101], PositionMismatch)


def test_freeing_ends_the_steps_that_wait(driver, model):
    name, other = opened(driver, model, name_of(1), name_of(2))
    tickets = [driver.submit(step_of(name, 0, TEXT[:200])), driver.submit(step_of(name, 200, TEXT[:1]))]
    driver.core.turn()
    driver.core.free(name)
    outcomes = driver.settle()
    assert all(isinstance(outcomes[ticket], UnknownSession) for ticket in tickets)
    assert driver.run(step_of(other, 0, TEXT[:4]))[0].logit_count == 4


def test_slots_run_out_before_memory_when_sessions_are_tiny(driver, model):
    opened(driver, model, *map(name_of, range(SMALL.slots_max)), reserve_tokens=1)
    with pytest.raises(KvExhausted, match="slots"):
        opened(driver, model, name_of(99), reserve_tokens=1)
    driver.core.free(name_of(3))
    opened(driver, model, name_of(99), reserve_tokens=1)


def test_pieces_must_end_at_cut_points(model):
    with pytest.raises(EngineError):
        model.hosted(Span(0, 2), Span(1, 3))


def test_the_lowest_free_slot_goes_first():
    slots = Slots(4)
    assert [slots.take() for _ in range(3)] == [0, 1, 2]
    slots.give(1)
    slots.give(0)
    assert [slots.take() for _ in range(3)] == [0, 1, 3]


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["prefill", "decode", "decode", "replay", "rewind", "reopen"]),
        st.integers(0, 5),
        st.integers(1, 20),
    ),
    min_size=5,
    max_size=25,
)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(OPERATIONS, st.randoms(use_true_random=False))
def test_whatever_happens_around_it_a_session_computes_what_it_computes_alone(model, operations, random):
    """Goal: no schedule, slot, pad or neighbour changes a bit. Method: sessions on mixed spans do random things
    together; each session's transcript is then repeated alone on a fresh engine, and the answers compared."""
    driver, transcripts, names = Driver(model.hosted(Span(0, 1), Span(1, 2), Span(2, 4))), {}, {}
    pieces = [Span(0, 4), Span(0, 1), Span(1, 4), Span(0, 2), Span(2, 4), Span(0, 4)]
    opened_count = 0
    pending = []

    def reopen(number):
        nonlocal opened_count
        if number in names:
            driver.core.free(names[number][0])
        opened_count += 1
        names[number] = [name_of(opened_count), 0]
        driver.core.open(names[number][0], model.digest, pieces[number], 250)
        transcripts[opened_count] = (pieces[number], [])

    def transcript(number):
        return transcripts[int(names[number][0], 16)][1]

    for number in range(6):
        reopen(number)
    generator = np.random.default_rng(random.randrange(1 << 30))
    for kind, number, size in operations:
        name, position = names[number]
        if kind == "reopen":
            pending = settle(driver, pending)
            reopen(number)
            continue
        if kind == "rewind":
            target = position * size // 40
            driver.core.rewind(1_000_000, name, target)
            names[number][1] = target
            transcript(number).append(("rewind", target))
            continue
        count = 1 if kind == "decode" else size
        rows = TEXT[position : position + count]
        if pieces[number].first:
            rows = generator.standard_normal((count, model.manifest.config.hidden_size)).astype(np.float16)
        if len(rows) == 0 or position + len(rows) > 250:
            continue
        phase = Phase.PREFILL if kind == "prefill" else Phase.DECODE
        record = ["step", position, rows, phase, None]
        pending.append((driver.submit(step_of(name, position, rows, phase)), record))
        transcript(number).append(record)
        names[number][1] += len(rows)
        if random.random() < 0.4:
            pending = settle(driver, pending)
    settle(driver, pending)
    for span, entries in transcripts.values():
        alone = Driver(model.hosted(span))
        alone.core.open(name_of(1), model.digest, span, 250)
        for entry in entries:
            if entry[0] == "rewind":
                alone.rewind(name_of(1), entry[1])
                continue
            _, position, rows, phase, payload = entry
            [stepped] = alone.run(step_of(name_of(1), position, rows, phase))
            assert bytes(stepped.payload) == payload


def settle(driver, pending):
    outcomes = driver.settle()
    for ticket, record in pending:
        record[4] = bytes(outcomes[ticket].payload)
    return []


def test_replay_and_row_by_row_give_the_same_bits(model, monkeypatch):
    """The two ways to rebuild a cache; the second is what runs where the first cannot."""
    answers = []
    for replays in (True, False):
        driver = Driver(model.hosted(Span(0, 1), Span(1, 4)))
        hosted = next(iter(driver.core._models.values()))
        assert isinstance(hosted, HostedModel)
        assert hosted.replays
        hosted.replays = replays
        [name] = opened(driver, model, name_of(1))
        driver.run(step_of(name, 0, TEXT[:7]))
        [rebuilt] = driver.run(step_of(name, 7, TEXT[7:110], Phase.DECODE))
        [after] = driver.run(step_of(name, 110, TEXT[110:111], Phase.DECODE))
        answers.append((bytes(rebuilt.payload), bytes(after.payload)))
    assert answers[0] == answers[1]


def test_sessions_that_decode_together_move_together_and_nothing_changes(model):
    """Every third of nine sessions decodes. The others stay, one of them goes, and all can go on afterwards."""
    driver, alone = Driver(model.hosted(Span(0, 1), Span(1, 4))), Driver(model.hosted(Span(0, 1), Span(1, 4)))
    names = opened(driver, model, *map(name_of, range(9)), reserve_tokens=100)
    for number, name in enumerate(names):
        driver.run(step_of(name, 0, TEXT[: 4 + number]))
    driver.core.free(names[1])
    hosted = next(iter(driver.core._models.values()))
    answers = {name: [] for name in names}
    for offset in range(12):
        steps = [step_of(names[n], 4 + n + offset, TEXT[offset : offset + 1], Phase.DECODE) for n in (0, 3, 6)]
        for name, stepped in zip((names[0], names[3], names[6]), driver.run(*steps), strict=True):
            answers[name].append(bytes(stepped.payload))
    slots = sorted(driver.core._sessions[names[n]].slot for n in (0, 3, 6))
    assert slots == list(range(slots[0], slots[0] + 3))
    assert sorted(session.slot for session in driver.core._sessions.values()) != list(range(1, 9))
    assert hosted.slots.take() not in [session.slot for session in driver.core._sessions.values()]
    for number in (0, 2, 3, 6, 8):
        opened(alone, model, names[number], reserve_tokens=100)
        alone.run(step_of(names[number], 0, TEXT[: 4 + number]))
        for offset, answer in enumerate(answers[names[number]]):
            step = step_of(names[number], 4 + number + offset, TEXT[offset : offset + 1], Phase.DECODE)
            assert bytes(alone.run(step)[0].payload) == answer
        position = 4 + number + len(answers[names[number]])
        last = step_of(names[number], position, [7], Phase.DECODE)
        assert bytes(driver.run(last)[0].payload) == bytes(alone.run(last)[0].payload)
