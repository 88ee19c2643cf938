"""Attacks between cells: on what a coordinator believes of other cells, and on what it does for them.

Two real coordinators of two cells on virtual time, each with its key and passport, and somebody on the bus who may say
anything: a captured server. What cells do with each other: `tests/simulation/test_cells.py`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import msgspec

from fallow.domain.cells import CellDigest, ModelDigest, digests
from fallow.domain.credentials import Role
from fallow.domain.errors import BusTimeout
from fallow.domain.fleet import FindChain, MeasureRtt, RouteReply, RouteRequest, Subjects
from fallow.domain.ids import SessionId
from fallow.fabric.memory_bus import MemoryHub
from fallow.policy.cells import CellRules
from fallow.processes.nearest_cell import cells_around
from fallow.simulator.virtual_time import run_virtual
from fallow.trust.cell_words import SignedCellWords
from fallow.trust.grants import Author
from fallow.trust.keys import Identity, identity_of
from tests.simulation.cells import MODEL, WHOLE, ToyCell
from tests.simulation.trusted import RunningClock
from tests.unit.trust.grant_world import STRANGER, passport, reader

RULES = CellRules(digest_interval_s=1.0, digest_silence_max_s=5.0)
LEADERS = {name: identity_of(name.encode() * 8 + b"\0" * 8) for name in ("one", "two", "six")}
QUESTION = FindChain(cell="one", request=RouteRequest(model=MODEL, session=SessionId("1" * 32), reserve_tokens=100))


class World:
    """Cell `one` has no device, cell `two` has one that holds the whole model; cell `six` is somewhere else."""

    def __init__(self) -> None:
        self.hub = MemoryHub()
        self.clock = RunningClock()
        self.bus = self.hub.connect("captured")
        self.cells = {
            name: ToyCell(
                name, self.hub.connect(name), self.hub.connect(f"{name}'s"), self.clock, RULES, words=self.words(name)
            )
            for name in ("one", "two")
        }

    def words(self, cell: str, who: Identity | None = None, role: Role = Role.COORDINATOR) -> SignedCellWords:
        """What somebody in a cell can sign; by itself, its coordinator."""
        signer = who or LEADERS[cell]
        shown = passport(signer, role, cell=cell)
        return SignedCellWords(Author(signer, lambda: shown, cell, self.clock.unix_s), reader(self.clock))

    def forgers(self) -> Iterator[SignedCellWords]:
        """Everybody who is admitted, and should not be believed."""
        for role in Role:
            if role is not Role.COORDINATOR:
                yield self.words("one", STRANGER, role)
        yield self.words("six")

    async def ask(self, message: bytes) -> RouteReply | None:
        """What cell `two` answers."""
        try:
            return msgspec.json.decode(await self.bus.request(Subjects("two").ask, message, 0.5), type=RouteReply)
        except BusTimeout:
            return None

    def dropped(self, cell: str, kind: str) -> int:
        return self.cells[cell].coordinator.status().dropped_messages.get(kind, 0)

    async def works(self) -> None:
        """Cell `one` still has its session served by cell `two`."""
        await self.clock.sleep(2.5)
        assert self.cells["one"].knows("two")
        assert self.cells["two"].serves(await self.cells["one"].route(9))


def run(script: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        await world.cells["one"].start()
        await world.cells["two"].start((WHOLE,))
        try:
            await world.works()
            await script(world)
        finally:
            for cell in world.cells.values():
                await cell.coordinator.close()

    run_virtual(main())


def paradise(cell: str) -> CellDigest:
    """As a cell without end would tell of itself."""
    told = ModelDigest(
        model=MODEL, servable=True, tokens_per_s_max=1e6, load=0.0, copies_min=9, kv_free_sessions=10_000
    )
    return CellDigest(cell=cell, boot="9", sequence=1 << 40, devices=10, devices_max=400, models=(told,))


def test_a_captured_bus_invents_a_cell_and_praises_another() -> None:
    """
    Attack: the bus tells, in the clear and under the seal of every other role and of another cell's coordinator, of a
        cell of endless room that does not exist, and of the neighbour what is not so.
    Expected: dropped and counted; no session is offered there.
    Unharmed: what the neighbour tells of itself is believed, and it serves.
    """

    async def script(world: World) -> None:
        said = 0
        for cell in ("two", "nowhere"):
            messages = [msgspec.json.encode(paradise(cell)), b"", *(by.tell(paradise(cell)) for by in world.forgers())]
            for message in messages:
                await world.bus.publish(digests(cell), message)
                said += 1
        await world.clock.sleep(0.1)
        assert world.dropped("one", "digest") == said
        (known,) = world.cells["one"].coordinator.status().neighbours
        assert known.digest.cell == "two" and known.digest.devices == 1
        await world.works()

    run(script)


def test_a_captured_bus_asks_for_chains_in_the_name_of_a_neighbour() -> None:
    """
    Attack: the bus asks a cell for a chain of its devices, in the clear, under the seal of every other role, and of the
        coordinator of a third cell.
    Expected: no answer, and no room is promised.
    Unharmed: the neighbour that asks under its own seal is answered.
    """

    async def script(world: World) -> None:
        forged = [msgspec.json.encode(QUESTION), *(by.ask(QUESTION, "two") for by in world.forgers())]
        for message in forged:
            assert await world.ask(message) is None
        assert world.dropped("two", "neighbour") == len(forged)
        reply = await world.ask(world.words("one").ask(QUESTION, "two"))
        assert reply is not None and world.cells["two"].serves(reply)
        await world.works()

    run(script)


def test_a_captured_bus_keeps_questions_and_digests_for_later_and_for_others() -> None:
    """
    Attack: the bus gives one cell the question that was for another, and says again what was true minutes ago.
    Expected: dropped: it is for another cell, or of another time.
    Unharmed: what is said now is believed.
    """

    async def script(world: World) -> None:
        one = world.words("one")
        elsewhere, kept = one.ask(QUESTION, "six"), one.ask(QUESTION, "two")
        told = world.words("two").tell(msgspec.structs.replace(paradise("two"), boot="old"))
        assert await world.ask(elsewhere) is None
        await world.clock.sleep(120)
        assert await world.ask(kept) is None
        await world.bus.publish(digests("two"), told)
        await world.clock.sleep(0.1)
        assert (world.dropped("two", "neighbour"), world.dropped("one", "digest")) == (2, 1)
        await world.works()

    run(script)


def test_a_digest_is_no_question_and_a_word_of_a_cell_no_order() -> None:
    """
    Attack: the bus puts a coordinator's true words where words of another kind belong.
    Expected: dropped: the kind is signed with them.
    Unharmed: the cells work together.
    """

    async def script(world: World) -> None:
        one, two = world.words("one"), world.words("two")
        assert await world.ask(one.tell(paradise("one"))) is None
        await world.bus.publish(digests("two"), two.ask(MeasureRtt(cell="two"), "one"))
        await world.clock.sleep(0.1)
        assert (world.dropped("two", "neighbour"), world.dropped("one", "digest")) == (1, 1)
        await world.works()

    run(script)


def test_a_captured_bus_says_again_what_a_cell_told_in_an_earlier_term() -> None:
    """
    Attack: a coordinator begins to lead anew; seconds later the bus says again, over and over, what the cell told in
        the term before, when it had room without end.
    Expected: not taken: a word of an earlier term is no news, though its time is not over yet.
    Unharmed: what the neighbour tells now is believed, and it serves.
    """

    async def script(world: World) -> None:
        (now,) = world.cells["one"].coordinator.status().neighbours
        term = float(now.digest.boot)
        earlier = msgspec.structs.replace(paradise("two"), boot=f"{term - 5:.6f}")
        for _ in range(3):
            await world.bus.publish(digests("two"), world.words("two").tell(earlier))
            await world.clock.sleep(0.1)
            (known,) = world.cells["one"].coordinator.status().neighbours
            assert known.digest.boot == now.digest.boot and known.digest.devices == 1
        assert world.dropped("one", "digest") == 0, "it is a true word, of then"
        later = msgspec.structs.replace(paradise("two"), boot=f"{term + 5:.6f}", sequence=1)
        await world.bus.publish(digests("two"), world.words("two").tell(later))
        await world.clock.sleep(0.1)
        (known,) = world.cells["one"].coordinator.status().neighbours
        assert known.digest == later, "a new term counts, though its sequence is lower"

    run(script)


def test_a_captured_bus_tells_devices_to_leave_their_cell() -> None:
    """
    Attack: the bus says to the devices of a cell that it dissolves into another, in the clear, under the seal of every
        other role and of that other cell's coordinator, and says again what their coordinator told in an earlier term.
    Expected: not believed: a device sees its cell as its own coordinator tells of it now.
    Unharmed: a cell that does dissolve, by its own coordinator's word, is heard.
    """

    async def script(world: World) -> None:
        device, rules = world.hub.connect("device"), msgspec.structs.replace(RULES, digest_interval_s=2.0)
        now = f"{world.clock.unix_s() + 1:.6f}"
        going = msgspec.structs.replace(paradise("one"), dissolves_into="two", boot=now)

        async def seen() -> set[tuple[str, str | None]]:
            offers = await cells_around(device, world.clock, "one", world.words("one", STRANGER, Role.NODE), rules)
            return {(offer.cell, offer.dissolves_into) for offer in offers}

        async def lie(*messages: bytes) -> None:
            while True:
                for message in messages:
                    await world.bus.publish(digests("one"), message)
                await world.clock.sleep(0.3)

        forged = [msgspec.json.encode(going), *(by.tell(going) for by in world.forgers())]
        forged.append(world.words("one").tell(msgspec.structs.replace(going, boot="1")))
        lying = asyncio.create_task(lie(*forged))
        await world.clock.sleep(0.1)
        assert await seen() == {("one", None), ("two", None)}
        lying.cancel()
        lying = asyncio.create_task(lie(world.words("one").tell(going)))
        assert await seen() == {("one", "two"), ("two", None)}
        lying.cancel()
        await asyncio.gather(lying, return_exceptions=True)
        await world.works()

    run(script)
