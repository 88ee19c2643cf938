"""Goal: what a cell cannot serve, a neighbour serves; and nothing that happens to neighbours harms a cell.

Method: two or three real coordinators on one in-memory bus and virtual time; devices that report what they are told to
(`cells.py`). Each case is a script.
"""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from fallow.coordinator import checks, neighbours
from fallow.domain.cells import CellDigest, ModelDigest, digests
from fallow.domain.fleet import FindChain, PlaceStage, RouteReply, RouteRequest, Subjects
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import NodeId, SessionId
from fallow.domain.model import Span
from fallow.fabric.memory_bus import MemoryHub
from fallow.policy.cells import CellRules
from fallow.processes.nearest_cell import nearest_cell
from fallow.simulator.virtual_time import LoopClock, run_virtual
from fallow.trust.open_doors import OpenCellWords
from tests.simulation.cells import BACK, FRONT, LAYER_S, LAYERS, MODEL, WHOLE, ToyCell

RULES = CellRules(digest_interval_s=1.0, digest_silence_max_s=3.5, sent_counts_s=3.0)
CAPACITY = 16 / LAYER_S / LAYERS
"""Tokens/s of one device that holds everything."""


class Hub(MemoryHub):
    """A bus on which coordinators can be cut off from each other."""

    def __init__(self) -> None:
        super().__init__()
        self.cut: set[frozenset[str]] = set()
        self.far: dict[tuple[str, str], float] = {}

    def delay_s(self, sender: str, receiver: str) -> float | None:
        if frozenset((sender, receiver)) in self.cut:
            return None
        if (sender, receiver) in self.far:
            return self.far[sender, receiver]
        return 0.01 if sender != receiver and {sender, receiver} <= {"one", "two", "three"} else 0.0


class World:
    def __init__(self) -> None:
        self.clock = LoopClock()
        self.hub = Hub()
        self.outsider = self.hub.connect("outsider")

    async def cell(self, name: str, *held: tuple[Span, ...]) -> ToyCell:
        made = ToyCell(name, self.hub.connect(name), self.hub.connect(f"{name} devices"), self.clock, RULES)
        await made.start(*held)
        return made

    async def until(self, holds: Callable[[], bool], within_s: float) -> float:
        started_s = self.clock.monotonic_s()
        while not holds():
            assert self.clock.monotonic_s() - started_s < within_s, f"not within {within_s} s"
            await self.clock.sleep(0.05)
        return self.clock.monotonic_s() - started_s


def run(script: Callable[[World], Awaitable[None]]) -> None:
    async def program() -> None:
        await script(World())

    run_virtual(program())


def test_a_cell_without_holders_of_some_layers_has_its_sessions_served_by_its_neighbour() -> None:
    async def script(world: World) -> None:
        one = await world.cell("one", (FRONT,))
        two = await world.cell("two", (WHOLE,), (WHOLE,))
        await world.until(lambda: one.knows("two") and two.knows("one"), 3.0)
        reply = await one.route(1)
        assert two.serves(reply)
        assert one.coordinator.status().neighbours[0].sessions_sent == 1
        told = two.coordinator.status().neighbours[0].digest
        assert (told.devices, told.models[0].servable, told.models[0].missing) == (1, False, (BACK,))
        # Once its own devices can, they do.
        await one.join(BACK)
        assert one.serves(await one.route(2))

    run(script)


def test_round_trips_are_measured_and_the_nearer_neighbour_serves() -> None:
    async def script(world: World) -> None:
        one, two = await world.cell("one"), await world.cell("two", (WHOLE,))
        far = await world.cell("far", (WHOLE,))
        await world.until(lambda: one.knows("two", "far"), 3.0)
        rtts_s = {each.digest.cell: each.rtt_s for each in one.coordinator.status().neighbours}
        assert rtts_s == {"far": pytest.approx(0.0), "two": pytest.approx(0.02)}
        assert far.serves(await one.route(1))
        assert not two.serves(await one.route(2))

    run(script)


def test_a_loaded_cell_sends_new_sessions_to_its_neighbour_and_keeps_those_that_it_has() -> None:
    async def script(world: World) -> None:
        one, two = await world.cell("one", (WHOLE,)), await world.cell("two", (WHOLE,))
        await world.until(lambda: one.knows("two"), 3.0)
        assert one.serves(await one.route(1))
        await one.work(CAPACITY)
        await world.clock.sleep(1.5)
        assert two.serves(await one.route(2))
        kept = (await two.route(3)).hops
        assert two.serves(RouteReply(hops=kept))
        # A repair of a session of its own stays.
        mine = msgspec.structs.replace(kept[0], address=one.devices[0].address)
        assert one.serves(await one.route(1, keep=(mine,)))
        # A neighbour that is loaded as well is not asked, and would give nothing.
        await two.work(CAPACITY)
        await world.clock.sleep(1.5)
        assert one.serves(await one.route(4))
        request = FindChain(cell="one", request=_request(5))
        answer = await world.outsider.request(Subjects("two").ask, msgspec.json.encode(request), 1.0)
        assert "loaded" in (msgspec.json.decode(answer, type=RouteReply).error or "")

    run(script)


def test_a_loaded_cell_that_has_to_serve_a_lent_session_itself_repairs_it_itself() -> None:
    async def script(world: World) -> None:
        one, two = await world.cell("one", (WHOLE,), (WHOLE,)), await world.cell("two", (WHOLE,))
        await world.until(lambda: one.knows("two"), 3.0)
        await one.work(CAPACITY)
        await world.clock.sleep(1.5)
        assert two.serves(await one.route(1))
        world.hub.cut.add(frozenset(("one", "two")))
        reply = await one.route(1, exclude=(two.devices[0].id,))
        assert one.serves(reply)
        assert SessionId(f"{1:032x}") not in one.coordinator._neighbours._given

    run(script)


def test_the_cell_that_gave_a_chain_repairs_it() -> None:
    async def script(world: World) -> None:
        one = await world.cell("one")
        two = await world.cell("two", (FRONT,), (BACK,), (BACK,))
        await world.until(lambda: one.knows("two"), 3.0)
        first, last = (await one.route(1)).hops
        repaired = await one.route(1, keep=(first,), exclude=(last.address.node,))
        assert two.serves(repaired)
        assert repaired.hops[0] == first
        assert repaired.hops[1].address.node != last.address.node

    run(script)


def test_a_neighbour_that_dies_is_forgotten_and_its_last_digest_helps_nobody() -> None:
    async def script(world: World) -> None:
        one = await world.cell("one")
        await world.cell("two", (WHOLE,))
        await world.until(lambda: one.knows("two"), 3.0)
        world.hub.drop("two", "killed")
        reply = await one.route(1)
        assert (reply.hops, reply.code) == ((), "no_capacity")
        assert await world.until(one.knows, 6.0) > 2.0

    run(script)


def test_a_neighbour_that_hangs_delays_the_sessions_that_need_it_once_and_no_others() -> None:
    async def script(world: World) -> None:
        one = await world.cell("one", (WHOLE,))
        await world.cell("two", (WHOLE,))
        await world.until(lambda: one.knows("two"), 3.0)
        world.hub.cut.add(frozenset(("one", "two")))
        nobody = tuple(device.id for device in one.devices)
        asked_s = world.clock.monotonic_s()
        stuck = asyncio.create_task(one.route(1, exclude=nobody))
        await asyncio.sleep(0.01)
        assert one.serves(await one.route(2))
        assert world.clock.monotonic_s() - asked_s < 0.1, "others do not wait for it"
        assert (await stuck).code == "no_capacity"
        assert world.clock.monotonic_s() - asked_s == pytest.approx(neighbours.ASK_TIMEOUT_S, abs=0.02)
        asked_s = world.clock.monotonic_s()
        assert (await one.route(3, exclude=nobody)).hops == ()
        assert world.clock.monotonic_s() - asked_s < 0.1, "it is not asked again for a while"

    run(script)


def test_where_layers_are_missing_the_neighbours_holders_are_sources_of_their_files() -> None:
    async def script(world: World) -> None:
        one = await world.cell("one")
        two = await world.cell("two", (WHOLE,))
        await world.until(lambda: one.knows("two"), 3.0)
        await world.until(lambda: MODEL in one.coordinator.fleet.elsewhere, 3.0)
        device = await one.join()
        await world.until(lambda: bool(device.orders), 5.0)
        (order,) = device.orders[:1]
        assert isinstance(order, PlaceStage)
        assert two.devices[0].id in {source.node for source in order.sources}

    run(script)


def _request(session: int) -> RouteRequest:
    return RouteRequest(model=MODEL, session=SessionId(f"{session:032x}"), reserve_tokens=100)


DIGEST = CellDigest(
    cell="evil",
    boot="1",
    sequence=1,
    devices=1,
    devices_max=400,
    models=(
        ModelDigest(
            model=MODEL, servable=True, tokens_per_s_max=1e6, load=0.0, copies_min=1, kv_free_sessions=100, missing=()
        ),
    ),
)


def _lying(**fields: object) -> CellDigest:
    return msgspec.structs.replace(DIGEST, models=(msgspec.structs.replace(DIGEST.models[0], **fields),))


@pytest.mark.parametrize(
    ("subject", "digest"),
    [
        ("two", DIGEST),
        ("evil", msgspec.structs.replace(DIGEST, cell="e.v.i.l")),
        ("evil", msgspec.structs.replace(DIGEST, region="x" * 1000)),
        ("evil", msgspec.structs.replace(DIGEST, boot="\n")),
        ("evil", msgspec.structs.replace(DIGEST, devices=-1)),
        ("evil", msgspec.structs.replace(DIGEST, dissolves_into="evil")),
        ("evil", msgspec.structs.replace(DIGEST, dissolves_into="a b")),
        ("evil", msgspec.structs.replace(DIGEST, dissolves_into="")),
        ("evil", msgspec.structs.replace(DIGEST, models=DIGEST.models * (checks.MODELS_MAX + 1))),
        ("evil", _lying(model="x")),
        ("evil", _lying(tokens_per_s_max=-1.0)),
        ("evil", _lying(load=1e9)),
        ("evil", _lying(kv_free_sessions=-3)),
        ("evil", _lying(missing=(Span(0, 2),))),
        ("evil", _lying(servable=False, missing=(Span(2, 1),))),
        ("evil", _lying(servable=False, missing=tuple(Span(2 * at, 2 * at + 1) for at in range(65)))),
    ],
)
def test_digests_that_cannot_be_true_are_dropped_and_counted(subject: str, digest: CellDigest) -> None:
    async def script(world: World) -> None:
        one = await world.cell("one")
        await world.outsider.publish(digests(subject), msgspec.json.encode(digest))
        await world.clock.sleep(0.1)
        status = one.coordinator.status()
        assert status.dropped_messages == {"digest": 1}
        assert status.neighbours == ()

    run(script)


def test_a_digest_may_not_be_larger_than_it_ever_needs_to_be() -> None:
    async def script(world: World) -> None:
        one = await world.cell("one")
        padded = msgspec.json.encode(DIGEST) + b" " * checks.DIGEST_MAX_BYTES
        await world.outsider.publish(digests("evil"), padded)
        await world.clock.sleep(0.1)
        assert one.coordinator.status().dropped_messages == {"digest": 1}

    run(script)


def test_only_so_many_neighbours_are_known() -> None:
    async def script(world: World) -> None:
        one = await world.cell("one")
        for index in range(neighbours.NEIGHBOURS_MAX + 10):
            digest = msgspec.structs.replace(DIGEST, cell=f"cell-{index}")
            await world.outsider.publish(digests(digest.cell), msgspec.json.encode(digest))
        await world.clock.sleep(0.1)
        assert len(one.coordinator.status().neighbours) == neighbours.NEIGHBOURS_MAX

    run(script)


EVIL = PeerAddress(node=NodeId("ee" * 32), endpoints=())


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage",
        b'{"hops": 5}',
        msgspec.json.encode({"hops": [{"address": EVIL, "span": {"first": 0, "last": 3}}]}),
        msgspec.json.encode({"hops": [{"address": EVIL, "span": {"first": 1, "last": 6}}]}),
        msgspec.json.encode(
            {
                "hops": [
                    {"address": EVIL, "span": {"first": 0, "last": 3}},
                    {"address": EVIL, "span": {"first": 3, "last": 6}},
                ]
            }
        ),
        msgspec.json.encode({"hops": [{"address": {"node": "me", "endpoints": []}, "span": {"first": 0, "last": 6}}]}),
    ],
)
def test_a_neighbours_answer_that_is_no_chain_is_not_passed_on_and_it_is_left_alone(answer: bytes) -> None:
    async def script(world: World) -> None:
        one = await world.cell("one")
        asked: list[bytes] = []

        async def lie(_: str, message: bytes) -> bytes:
            if b"measure_rtt" not in message:
                asked.append(message)
            return answer

        await world.outsider.subscribe(Subjects("evil").ask, lie)
        await world.outsider.publish(digests("evil"), msgspec.json.encode(DIGEST))
        await world.clock.sleep(0.1)
        for session in (1, 2):
            reply = await one.route(session)
            assert (reply.hops, reply.code) == ((), "no_capacity")
        assert len(asked) == 1
        assert one.coordinator.status().dropped_messages == {"neighbour": 1}

    run(script)


@pytest.mark.parametrize(
    "question",
    [
        b"garbage",
        b'{"kind":"find_chain","cell":"x"}',
        b'{"kind":"halt","cell":"x"}',
        msgspec.json.encode({"kind": "find_files", "cell": "x", "model": "nonsense"}),
        msgspec.json.encode({"kind": "measure_rtt", "cell": "x" * 99}),
        msgspec.json.encode(FindChain(cell="x", request=msgspec.structs.replace(_request(1), reserve_tokens=-1))),
    ],
)
def test_a_neighbours_question_that_makes_no_sense_is_dropped_and_counted(question: bytes) -> None:
    async def script(world: World) -> None:
        one = await world.cell("one", (WHOLE,))
        await world.outsider.publish(Subjects("one").ask, question)
        await world.clock.sleep(0.1)
        assert one.coordinator.status().dropped_messages == {"neighbour": 1}
        assert one.serves(await one.route(1))

    run(script)


# --- which cell a device joins ----------------------------------------------------------------------


def test_a_device_joins_the_nearest_cell_with_room_and_its_own_when_they_are_alike() -> None:
    async def script(world: World) -> None:
        for name in ("one", "two", "three"):
            await world.cell(name, (WHOLE,))
        bus = world.hub.connect("newcomer")
        world.hub.far |= {("newcomer", "one"): 0.03, ("newcomer", "two"): 0.01, ("newcomer", "three"): 0.012}
        assert await nearest_cell(bus, world.clock, "one", OpenCellWords(), RULES) == "two"
        assert await nearest_cell(bus, world.clock, "three", OpenCellWords(), RULES) == "three"
        assert await nearest_cell(bus, world.clock, "elsewhere", OpenCellWords(), RULES) == "two"
        full = msgspec.structs.replace(RULES, devices_max=1)
        world.hub.drop("two", "replaced by a coordinator with less room")
        crowded = ToyCell("two", world.hub.connect("two"), world.hub.connect("more devices"), world.clock, full)
        await crowded.start((WHOLE,))
        assert await nearest_cell(bus, world.clock, "elsewhere", OpenCellWords(), RULES) == "three"

    run(script)


def test_a_device_that_hears_of_no_cell_or_only_of_ones_that_lie_or_are_dead_stays_with_its_own() -> None:
    async def script(world: World) -> None:
        bus = world.hub.connect("newcomer")
        assert await nearest_cell(bus, world.clock, "home", OpenCellWords(), RULES) == "home"

        async def lie() -> None:
            while True:
                await world.outsider.publish(digests("evil"), msgspec.json.encode(DIGEST))
                await world.outsider.publish(digests("worse"), b"garbage")
                await world.clock.sleep(0.3)

        lying = asyncio.create_task(lie())
        assert await nearest_cell(bus, world.clock, "home", OpenCellWords(), RULES) == "home"
        lying.cancel()

    run(script)
