"""Goal: each invariant of the simulator catches the bug that it is there to catch, and a sound fleet breaks none.

Method: a small simulated world of the real parts, one of which is sabotaged for the test; seed 1 throughout.
"""

import asyncio
import itertools
from typing import Any

import msgspec
import pytest

from fallow.coordinator import registry
from fallow.coordinator.leadership import Leadership
from fallow.domain.frames import Phase, Rows
from fallow.domain.ids import NodeId
from fallow.engine.contract import Step, Stepped
from fallow.engine.memory import MemoryEngine
from fallow.gateway.chain import Chain
from fallow.node.running_ahead import Told
from fallow.node.stage_pump import StagePump
from fallow.node.stage_session import HELD_ROWS_MAX
from fallow.node.stages import StageRelay
from fallow.simulator import invariants
from fallow.simulator.engine_model import SimulatedEngine
from fallow.simulator.scenario import Traffic
from fallow.simulator.view import NodeView, StageView
from fallow.simulator.world import WARM_UP_S, World
from tests.simulation.worlds import broken, people, run_world, small

CALM = small(minutes=1.0, populations=(people(median_up_s=1e6),))
"""A minute in which nobody comes or goes."""
HANG_AT_S = WARM_UP_S + 50.0
HOARDED_CALLS = 2_000
RESTLESS = small(minutes=2.0, populations=(people(median_up_s=200.0, median_down_s=30.0),))


def test_a_sound_fleet_breaks_no_invariant() -> None:
    _, checker = run_world(RESTLESS)
    assert checker.violations == []


def test_an_engine_that_drops_a_row_alters_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = MemoryEngine._compute

    def forgetful(self: MemoryEngine, held: Any, step: Step) -> Stepped:
        stepped = compute(self, held, step)
        if held.span.first > 0 and step.position > 30:
            held.prefixes[-1] = [0] * held.span.layer_count
        return stepped

    monkeypatch.setattr(MemoryEngine, "_compute", forgetful)
    world, checker = run_world(CALM)
    assert broken(checker) == {"answers_are_unaltered"}
    assert world.meter.totals().sessions_altered


def test_a_chain_that_does_not_raise_its_epoch_is_served_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chain, "_epoch", property(lambda self: 1, lambda self, _: None), raising=False)
    _, checker = run_world(RESTLESS)
    assert "one_chain_serves" in broken(checker)


def test_a_stage_that_sends_a_row_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = StagePump._forward

    async def stutter(self: StagePump, session: Any, flow: Any, rows: Any) -> None:
        await forward(self, session, flow, rows)
        await forward(self, session, flow, rows)

    monkeypatch.setattr(StagePump, "_forward", stutter)
    _, checker = run_world(CALM)
    assert broken(checker) == {"positions_rise"}, "positions make rows idempotent, so the answers are right"


def test_a_device_that_ignores_close_keeps_what_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StageRelay, "_on_close", lambda *_: None)
    _, checker = run_world(CALM)
    assert broken(checker) == {"nothing_outlives_its_session"}


def test_an_engine_that_promises_too_much_cache_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryEngine, "_kv_free_bytes", lambda self: 1 << 40)
    thirsty = msgspec.structs.replace(CALM.model, kv_bytes_per_token_layer=24 << 10)
    # Long prompts, since they take a simulated second; as many tokens to generate would take minutes.
    long = Traffic(sessions_per_hour_per_device=60.0, prompt_tokens=1640, completion_tokens=300, spread=0.01)
    calm = msgspec.structs.replace(CALM, detailed=small(minutes=0.5).detailed)
    _, checker = run_world(msgspec.structs.replace(calm, model=thirsty, traffic=long))
    assert "kv_is_within_its_budget" in broken(checker)


def test_a_coordinator_that_believes_in_more_memory_places_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    room_of = registry.room_of

    def generous(*args: Any, **kwargs: Any) -> Any:
        room = room_of(*args, **kwargs)
        return msgspec.structs.replace(room, weights_bytes=10 * room.weights_bytes)

    monkeypatch.setattr(registry, "room_of", generous)
    _, checker = run_world(CALM)
    assert broken(checker) >= {"placement_fits", "memory_is_within_the_owners_limit"}


def test_logs_that_nobody_trims_outgrow_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StagePump, "_trim_logs", lambda *_: None)

    def shrink(world: World) -> None:
        for device in world.devices:
            if device.agent is not None:
                device.agent.relay._pump._log_budget_bytes = device.log_budget_bytes

    monkeypatch.setattr("fallow.simulator.devices.LOG_BUDGET_BYTES", 64 << 10)
    _, checker = run_world(CALM, prepare=shrink)
    assert "logs_are_within_their_budget" in broken(checker)


def test_logs_that_are_booked_wrongly_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StagePump, "forget", lambda *_: None)
    _, checker = run_world(CALM)
    assert "logs_are_within_their_budget" in broken(checker)


def test_a_device_that_goes_on_after_it_was_taken_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def work_on(self: SimulatedEngine) -> None:
        def compute() -> None:
            self.rows_computed += 1

        asyncio.get_running_loop().call_later(1.0, compute)

    monkeypatch.setattr(SimulatedEngine, "crash", work_on)
    _, checker = run_world(RESTLESS)
    assert "who_is_gone_computes_nothing" in broken(checker)


def test_an_engine_that_does_not_empty_its_queue_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    take = SimulatedEngine._take
    calls = itertools.count()

    def hoard(self: SimulatedEngine) -> Any:
        if next(calls) > HOARDED_CALLS:  # answers end, so that the run does
            return take(self)
        taken = list(self._ready)
        asyncio.get_running_loop().call_later(0.01, self._wake.set)
        self._ready = taken * 2 if len(taken) < 64 else taken
        return taken

    monkeypatch.setattr(SimulatedEngine, "_take", hoard)
    _, checker = run_world(msgspec.structs.replace(CALM, traffic=Traffic(sessions_per_hour_per_device=10.0)))
    assert "queues_are_bounded" in broken(checker)


@pytest.mark.parametrize(
    "changes",
    [
        {"bus_waiting": 5000},
        {"stages": (StageView(session="s", gateway=NodeId("g"), waiting_rows=HELD_ROWS_MAX + 1, waiting_bytes=0),)},
        {"stages": (StageView(session="s", gateway=NodeId("g"), waiting_rows=0, waiting_bytes=1 << 30),)},
    ],
)
def test_queues_that_are_too_long_are_named(changes: dict[str, Any]) -> None:
    sound = NodeView(
        name="node", gone=False, memory_bytes=10, weights_bytes=1, kv_budget_bytes=1, kv_reserved_bytes=0,
        log_budget_bytes=1, log_bytes=0, log_bytes_booked=0, rows_computed=0, rows_when_gone=0, engine_sessions=0,
        engine_waiting=0, bus_waiting=0, stages=(),
    )  # fmt: skip
    assert all(invariant(sound) is None for invariant in invariants.NODE_INVARIANTS)
    assert "node" in (invariants.queues_are_bounded(msgspec.structs.replace(sound, **changes)) or "")


def test_a_chain_that_heeds_no_bound_runs_ahead_of_its_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gateway's tokens come late, and the first stage goes on without them."""
    confirm = Told.confirm

    def late(self: Told[Any], rows: Rows, payload: Any) -> int | None:
        return None if rows.phase is Phase.DECODE else confirm(self, rows, payload)

    monkeypatch.setattr(Told, "confirm", late)
    monkeypatch.setattr("fallow.node.running_ahead.AHEAD_ROWS", 1 << 30)
    _, checker = run_world(CALM)
    assert broken(checker) == {"chains_run_ahead_within_bounds"}


def test_two_coordinators_that_both_believe_to_lead_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """For half a second only: less than a lease."""
    epoch = Leadership.epoch

    def overlapping(self: Leadership) -> int | None:
        return 7 if 100.0 <= asyncio.get_running_loop().time() < 100.5 else epoch(self)

    monkeypatch.setattr(Leadership, "epoch", overlapping)
    _, checker = run_world(CALM)
    assert "one_leads" in broken(checker)


def test_sessions_that_hang_at_the_end_have_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chain, "check_stall", lambda self: None)
    compute = SimulatedEngine.step

    async def hang(self: SimulatedEngine, step: Any) -> Any:
        if asyncio.get_running_loop().time() > HANG_AT_S:
            await asyncio.sleep(1e6)
        return await compute(self, step)

    monkeypatch.setattr(SimulatedEngine, "step", hang)
    world, _ = run_world(CALM)
    assert world.meter.totals().sessions_failed > 0
    assert world.meter.totals().success_rate < 1.0


def test_a_session_that_waits_for_ever_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chain, "check_stall", lambda self: None)

    def hang(world: World) -> None:
        for device in world.devices:
            if device.engine is not None:
                device.engine.hang()

    _, checker = run_world(msgspec.structs.replace(CALM, detailed=small(minutes=2.2).detailed), prepare=hang)
    assert broken(checker) == {"sessions_make_progress"}


def test_rows_header_is_what_the_checker_reads() -> None:
    assert {"session", "epoch", "position", "count"} <= set(Rows.__struct_fields__)
