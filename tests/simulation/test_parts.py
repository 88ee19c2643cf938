"""Goal: the models inside the simulator are what they say: streams, engine, network lines, traffic, meter, disks.

Method: properties where there is arithmetic; the engine and the yardstick of answers are compared with each other.
"""

import asyncio
import itertools
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.frames import Phase
from fallow.domain.ids import SessionId
from fallow.domain.model import Span, StageSpec
from fallow.engine.contract import Step
from fallow.engine.memory import next_row
from fallow.policy.batching import BUSY_CHUNK_ROWS
from fallow.simulator.disk import SimulatedDisk
from fallow.simulator.engine_model import BATCH_COST, SimulatedEngine, batch_cost, weights_bytes
from fallow.simulator.gateways import Outcome, Telling, Turn
from fallow.simulator.meter import Meter, quantile
from fallow.simulator.model import VOCABULARY, Undisturbed, build
from fallow.simulator.population import draw_devices
from fallow.simulator.scenario import Event, EventKind, SimulatedModel
from fallow.simulator.streams import Streams
from fallow.simulator.trace import Trace
from fallow.simulator.traffic import Traffic
from fallow.simulator.virtual_time import Deadlock, LoopClock, run_virtual
from tests.simulation.worlds import MODEL, people, small

SESSION = SessionId("0" * 32)


# --- the engine and the right answers -------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=12),
    cut=st.integers(1, 7),
    prefill=st.integers(1, 12),
)
def test_an_undisturbed_fleet_answers_as_the_yardstick(tokens: list[int], cut: int, prefill: int) -> None:
    """Whatever the cut between two devices and between prompt and answer."""
    phases = [Phase.PREFILL if index < prefill else Phase.DECODE for index in range(len(tokens))]
    right = Undisturbed(MODEL.layer_count)
    expected = [right.feed((token,), phase) for token, phase in zip(tokens, phases, strict=True)]

    async def program() -> list[int]:
        built = build(MODEL)
        engines = []
        for span in (Span(0, cut), Span(cut, MODEL.layer_count)):
            engine = SimulatedEngine(MODEL, 0.001, 1 << 30, VOCABULARY)
            await engine.start()
            await engine.load(StageSpec(model=built.digest, pieces=(span,)), built.manifest, {})
            await engine.open(SESSION, built.digest, span, 100)
            engines.append(engine)
        came = []
        for position, (token, phase) in enumerate(zip(tokens, phases, strict=True)):
            payload: bytes | bytearray | memoryview = token.to_bytes(4, "little")
            for engine in engines:
                step = Step(
                    session=SESSION, position=position, count=1, phase=phase, logits_from=position, top_k=1,
                    payload=payload,
                )  # fmt: skip
                payload = (await engine.step(step)).payload
            came.append(int.from_bytes(payload[:4], "little"))
        return came

    assert run_virtual(program()) == expected


@settings(max_examples=200)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4095), st.sampled_from(list(Phase))), min_size=2, max_size=10),
    place=st.integers(0, 9),
    kind=st.sampled_from(["lost", "doubled", "swapped", "altered", "phase"]),
)
def test_a_row_that_is_disturbed_changes_the_last_one(rows: list[tuple[int, Phase]], place: int, kind: str) -> None:
    place %= len(rows) - 1
    disturbed = list(rows)
    match kind:
        case "lost":
            del disturbed[place]
        case "doubled":
            disturbed.insert(place, disturbed[place])
        case "swapped":
            disturbed[place], disturbed[place + 1] = disturbed[place + 1], disturbed[place]
        case "altered":
            disturbed[place] = ((disturbed[place][0] + 1) % 4096, disturbed[place][1])
        case _:
            other = Phase.DECODE if disturbed[place][1] is Phase.PREFILL else Phase.PREFILL
            disturbed[place] = (disturbed[place][0], other)

    def last(sequence: list[tuple[int, Phase]]) -> int:
        prefix = [0] * 4
        return [next_row(prefix, 0, token, phase) for token, phase in sequence][-1]

    assert disturbed == rows or last(disturbed) != last(rows)


def test_a_follow_up_turn_begins_where_the_cache_ends() -> None:
    telling = Telling(MODEL.layer_count)
    telling.add([1, 2, 3], Phase.PREFILL)
    telling.add([4, 5], Phase.DECODE)
    whole = Undisturbed(MODEL.layer_count)
    whole.feed((1, 2, 3), Phase.PREFILL)
    whole.feed((4,), Phase.DECODE)
    assert telling.restart(4).feed((9,), Phase.PREFILL) == whole.feed((9,), Phase.PREFILL)
    assert telling.tokens == [1, 2, 3, 4]


def test_batches_cost_what_was_measured_and_more_rows_cost_more() -> None:
    assert [batch_cost(rows) for rows, _ in BATCH_COST] == [cost for _, cost in BATCH_COST]
    costs = [batch_cost(rows) for rows in range(1, 200)]
    assert all(low < high for low, high in itertools.pairwise(costs))
    assert all(cost <= rows for rows, cost in enumerate(costs, 1))


def test_calls_take_turns_between_all_decode_rows_and_one_chunk() -> None:
    async def program() -> tuple[list[int], float]:
        model = msgspec.structs.replace(MODEL, head_bytes=0)
        built = build(model)
        engine = SimulatedEngine(model, 0.01, 1 << 40, VOCABULARY)
        await engine.start()
        span = Span(0, 4)
        await engine.load(StageSpec(model=built.digest, pieces=(span,)), built.manifest, {})
        order: list[int] = []
        began_s = asyncio.get_running_loop().time()

        async def step(number: int, count: int, phase: Phase) -> None:
            session = SessionId(f"{number:032x}")
            await engine.open(session, built.digest, span, 1000)
            rows = Step(
                session=session, position=0, count=count, phase=phase, logits_from=count, top_k=1,
                payload=bytes(4 * count),
            )  # fmt: skip
            await engine.step(rows)
            order.append(number)

        await asyncio.gather(
            step(1, 128, Phase.PREFILL), step(2, 128, Phase.PREFILL), *(step(i, 1, Phase.DECODE) for i in (3, 4))
        )
        return order, asyncio.get_running_loop().time() - began_s

    order, took_s = run_virtual(program())
    assert set(order[:2]) == {3, 4}, "decode rows go first"
    assert order[2:] == [2, 1], "who has had a chunk already waits for who had none"
    chunks = (BUSY_CHUNK_ROWS, 128, 128 - BUSY_CHUNK_ROWS)
    assert took_s == pytest.approx(0.04 * (batch_cost(2) + sum(map(batch_cost, chunks))))


def test_weights_are_the_scenarios() -> None:
    model = SimulatedModel(layer_count=4, layer_bytes=10, embedding_bytes=100, head_bytes=1000)
    built = build(model)
    assert weights_bytes(StageSpec(model=built.digest, pieces=(Span(0, 2),)), model) == 120
    assert weights_bytes(StageSpec(model=built.digest, pieces=(Span(1, 2), Span(3, 4))), model) == 1020
    assert built.entry.weights_bytes == (100, 1000, (10,) * 4)


# --- randomness -----------------------------------------------------------------------------------


def test_streams_do_not_shift_each_other() -> None:
    streams = Streams(7)
    alone = [streams.stream("a").random() for _ in range(3)]
    assert alone == [Streams(7).stream("a").random()] * 3
    assert Streams(7).stream("b").random() != alone[0] != Streams(8).stream("a").random()


def test_a_larger_fleet_has_the_devices_of_a_smaller_one() -> None:
    def drawn(count: int) -> dict[str, object]:
        scenario = small(devices=count, populations=(people(count=1000),))
        return {figures.name: figures for figures, _ in draw_devices(scenario, Streams(1), 300.0)}

    few, many = drawn(10), drawn(40)
    assert len(few) == 10 and len(many) == 40
    for name, device in few.items():
        assert msgspec.structs.replace(many[name], cell="") == msgspec.structs.replace(device, cell="")  # type: ignore[type-var]


def test_events_take_devices_away() -> None:
    outage = Event(kind=EventKind.OUTAGE, at_s=100, duration_s=50)
    scenario = small(outage, devices=10, populations=(people(median_up_s=1e9),))
    for figures, _ in draw_devices(scenario, Streams(1), 300.0):
        assert not any(stay.from_s < 149 and stay.until_s > 101 for stay in figures.stays)
        assert any(stay.until_s == pytest.approx(100) and stay.departure == "silent" for stay in figures.stays)


def test_traffic_has_its_rate_and_its_crowd() -> None:
    crowd = Event(kind=EventKind.FLASH_CROWD, at_s=36_000, duration_s=36_000, factor=3.0)
    scenario = small(crowd, hours=24.0)
    traffic = Traffic(scenario, Streams(1), "cell0", 12)
    arrivals = list(traffic.arrivals(0, 86_400))
    inside = sum(36_000 <= at_s < 72_000 for at_s in arrivals)
    rate = 45.0 * 12 / 3600
    assert inside == pytest.approx(3 * rate * 36_000, rel=0.05)
    assert len(arrivals) - inside == pytest.approx(rate * 50_400, rel=0.05)
    assert arrivals == sorted(arrivals)


# --- figures --------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0.01, 1.0))
def test_a_quantile_has_its_share_at_or_below_it(values: list[float], share: float) -> None:
    found = quantile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= math.ceil(share * len(values) - 1e-9)


def test_the_meter_counts_each_session_once() -> None:
    meter = Meter(100.0, 400.0, 100.0)
    for at_s, outcome in ((110.0, Outcome.FINISHED), (250.0, Outcome.FAILED), (1000.0, Outcome.REFUSED)):
        meter.asked(at_s, 10)
        turn = Turn(number=1, gateway="g", asked_s=0.0, prompt_tokens=5, wanted_tokens=10, outcome=outcome, tokens=4)
        meter.ended(at_s, turn)
    samples, totals = meter.samples(), meter.totals()
    assert [sample.at_s for sample in samples] == [100.0, 200.0, 300.0]
    assert [sample.sessions_finished for sample in samples] == [1, 0, 0]
    assert [sample.sessions_refused for sample in samples] == [0, 0, 1]
    assert (totals.sessions_started, totals.sessions_failed, totals.success_rate) == (3, 1, 0.5)
    assert totals.first_token_p50_s is None and totals.stall_p95_s is None


def test_a_trace_depends_on_every_step_and_its_order() -> None:
    def digest(*steps: str) -> str:
        trace = Trace()
        for step in steps:
            trace.note(step)
        return trace.digest()

    many = [str(index) for index in range(2000)]
    assert digest(*many) == digest(*many)
    assert len({digest(*many), digest(*many[1:]), digest(*reversed(many)), digest(*many, "x")}) == 4


def test_a_disk_goes_on_with_an_interrupted_transfer() -> None:
    built = build(MODEL)
    disk = SimulatedDisk(lambda _: 3)
    ref = built.manifest.layers[0]
    first = disk.partial(ref)
    assert first.missing() == [0, 1, 2]
    first.write_chunk(1, b"")
    again = disk.partial(ref)
    assert again.missing() == [0, 2]
    assert not disk.has(ref.digest)
    for index in again.missing():
        again.write_chunk(index, b"")
    again.complete()
    assert disk.has(ref.digest)


# --- time -----------------------------------------------------------------------------------------


def test_time_jumps_and_timers_of_one_moment_keep_their_order() -> None:
    async def program() -> tuple[list[int], float]:
        loop, order = asyncio.get_running_loop(), []
        for index in range(100):
            loop.call_at(3600.0, order.append, index)
        cancelled = [loop.call_at(1800.0, order.append, -1) for _ in range(2000)]
        for timer in cancelled:
            timer.cancel()
        await LoopClock().sleep(7200.0)
        return order, loop.time()

    assert run_virtual(program()) == (list(range(100)), 7200.0)


def test_who_waits_for_what_cannot_come_is_told() -> None:
    async def program() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock):
        run_virtual(program())


def test_a_timeout_ends_what_waits_and_leaves_no_timer() -> None:
    async def program() -> float:
        for _ in range(2000):
            async with asyncio.timeout(1000.0):
                await asyncio.sleep(0.001)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5.0):
                await asyncio.get_running_loop().create_future()
        return asyncio.get_running_loop().time()

    assert run_virtual(program()) == pytest.approx(7.0)
