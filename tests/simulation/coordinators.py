"""Coordinators of one cell whose processes stop, whose networks stall, and who must never lead at the same time.

What a stopped or cut-off process had under way is not lost: it goes out when the process goes on or the network heals,
which is the worst that can happen. A stopped process keeps its connection, and its clock goes on.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from fallow.coordinator.leadership import Leadership
from fallow.coordinator.service import Coordinator, CoordinatorConfig
from fallow.domain.errors import BusTimeout, BusUnavailable
from fallow.domain.fleet import Accepted, LeaderChanged, NodeCommand, RouteReply, RouteRequest
from fallow.domain.ids import SessionId
from fallow.fabric.contract import BusHandler, LeaseEntry, LeaseKey, Subscription
from fallow.fabric.memory_bus import MemoryBus
from fallow.fabric.memory_lease import MemoryLeases
from fallow.gateway.questions import Questions
from fallow.policy.leadership import LeaseRules
from fallow.policy.placement_board import PlacementRules
from fallow.trust.open_doors import open_coordinator
from tests.simulation.control import CELL, SUBJECTS, Cell, Device

T = TypeVar("T")
RULES = LeaseRules()
LOOK_S = 0.005
LEASE_TIMEOUT_S = 1.0


class Trouble:
    """What holds a process back now."""

    def __init__(self) -> None:
        self.stopped = False
        self.cut = False
        self._over = asyncio.Event()

    def end(self) -> None:
        self.stopped = self.cut = False
        self._over.set()
        self._over = asyncio.Event()

    async def goes_on(self) -> None:
        """While the process is stopped, its code does not run."""
        while self.stopped:
            await self._over.wait()

    async def passes(self) -> None:
        """While it is stopped or cut off, nothing comes in or goes out."""
        while self.stopped or self.cut:
            await self._over.wait()


class TroubledBus:
    """A process's connection to the bus."""

    def __init__(self, bus: MemoryBus, trouble: Trouble) -> None:
        self._bus, self._trouble = bus, trouble
        self._late: set[asyncio.Task[object]] = set()

    async def publish(self, subject: str, message: bytes) -> None:
        await self._trouble.goes_on()
        if self._trouble.cut:
            self._later(self._bus.publish, subject, message)
            return
        await self._bus.publish(subject, message)

    async def request(self, subject: str, message: bytes, timeout_s: float) -> bytes:
        await self._trouble.goes_on()
        if self._trouble.cut:
            self._later(self._bus.publish, subject, message)
            await asyncio.sleep(timeout_s)
            await self._trouble.goes_on()
            raise BusTimeout("nothing comes back")
        answer = await self._bus.request(subject, message, timeout_s)
        await self._trouble.goes_on()
        return answer

    async def subscribe(
        self, subject: str, handler: BusHandler, queue: str | None = None, at_once: int = 1
    ) -> Subscription:
        async def handle(subject: str, message: bytes) -> bytes | None:
            await self._trouble.passes()
            answer = await handler(subject, message)
            await self._trouble.passes()
            return answer

        return await self._bus.subscribe(subject, handle, queue, at_once)

    async def close(self) -> None:
        await self._bus.close()

    def _later(self, act: Callable[[str, bytes], Awaitable[None]], subject: str, message: bytes) -> None:
        async def once_it_heals() -> None:
            await self._trouble.passes()
            await act(subject, message)

        self._keep(asyncio.get_running_loop().create_task(once_it_heals()))

    def _keep(self, task: "asyncio.Task[object] | asyncio.Task[None]") -> None:
        self._late.add(task)  # type: ignore[arg-type]
        task.add_done_callback(lambda done: done.cancelled() or done.exception())


class TroubledKey:
    """A process's view of the lease. A write that times out may be carried out later."""

    def __init__(self, key: LeaseKey, trouble: Trouble) -> None:
        self._key, self._trouble = key, trouble
        self._late: set[asyncio.Task[object]] = set()

    @property
    def connection(self) -> int | None:
        return self._key.connection

    async def read(self) -> LeaseEntry | None:
        return await self._through(self._key.read)

    async def write(self, value: bytes, after: int) -> int | None:
        return await self._through(lambda: self._key.write(value, after))

    async def watch(self, on_write: Callable[[], None]) -> Subscription:
        def heard() -> None:
            if not self._trouble.stopped and not self._trouble.cut:
                on_write()

        return await self._key.watch(heard)

    async def _through(self, act: Callable[[], Awaitable[T]]) -> T:
        await self._trouble.goes_on()

        async def there_and_back() -> T:
            await self._trouble.passes()
            done = await act()
            await self._trouble.passes()
            return done

        task = asyncio.get_running_loop().create_task(there_and_back())
        self._late.add(task)  # type: ignore[arg-type]
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            async with asyncio.timeout(LEASE_TIMEOUT_S):
                return await asyncio.shield(task)
        except TimeoutError:
            await self._trouble.goes_on()
            raise BusTimeout("no answer for the lease") from None


class StoppableLeadership(Leadership):
    """Its loop does not run while the process is stopped."""

    trouble: Trouble

    async def _pause(self, duration_s: float) -> None:
        await super()._pause(duration_s)
        await self.trouble.goes_on()


class Process:
    """One coordinator process."""

    def __init__(self, cell: "LedCell", number: int) -> None:
        self.id = f"coordinator-{number}"
        self.cell = cell
        self.trouble = Trouble()
        self.alive = True
        self.bus = cell.fabric.bus(self.id)
        key = TroubledKey(cell.leases.key(self.bus, "leader"), self.trouble)
        self.authority = StoppableLeadership(key, self.id, self.id, cell.clock, RULES)
        self.authority.trouble = self.trouble
        config = CoordinatorConfig(cell=CELL, placement=cell.rules)
        self.coordinator = Coordinator(
            config,
            TroubledBus(self.bus, self.trouble),
            cell.clock,
            cell.fabric.presence(),
            self.authority,
            id=self.id,
            name=self.id,
            trust=open_coordinator(),
        )

    @property
    def leads(self) -> bool:
        return self.authority.epoch() is not None

    async def kill(self) -> None:
        """kill -9."""
        self.alive = False
        self.cell.fabric.hub.drop(self.id, "Client Closed")
        self.trouble.end()
        await self.coordinator.close()

    async def leave(self) -> None:
        """SIGTERM."""
        self.alive = False
        await self.coordinator.close()
        await self.bus.close()

    def stop(self) -> None:
        """SIGSTOP."""
        self.trouble.stopped = True

    def cut_off(self) -> None:
        """Its network stalls, and nobody is told."""
        self.trouble.cut = True


class LedCell(Cell):
    """A cell with several coordinators, and a look at who leads every `LOOK_S`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, PlacementRules(max_share=0.7))
        self.leases = MemoryLeases(self.fabric.hub, RULES.ttl_s)
        self.processes: list[Process] = []
        self.epochs: list[int] = []
        self.refused = 0
        self._count = 0
        self._asker = self.fabric.bus("gateway")
        self.questions = Questions(self._asker, SUBJECTS, self.clock)
        self._look: asyncio.Task[None] | None = None

    async def start_led(self, coordinators: int, devices: int) -> None:
        """Start everything; who leads is looked at from now on."""

        async def on_leader(_: str, message: bytes) -> None:
            self.epochs.append(msgspec.json.decode(message, type=LeaderChanged).epoch)

        await self._observer.subscribe(SUBJECTS.leader, on_leader)
        await self.questions.start()
        self._look = asyncio.get_running_loop().create_task(self._keep_looking())
        for _ in range(coordinators):
            await self.start_coordinator()
        self.coordinator = self.processes[0].coordinator
        await self._observer.subscribe(SUBJECTS.gone, self._on_gone)
        await self.store.start()
        for _ in range(devices):
            await self.join()

    async def _on_gone(self, _: str, message: bytes) -> None:
        from fallow.domain.fleet import NodeGone

        self.gone.append(msgspec.json.decode(message, type=NodeGone))

    async def join(self) -> Device:
        device = await super().join()
        take = device.agent.hosting.order

        def order(command: NodeCommand) -> Accepted:
            # What the device believes must be the newest leader's word, as far as it was told of one.
            assert command.epoch >= max(device.agent._epoch, 0)
            assert command.epoch >= max(self.epochs, default=0), "an order of a replaced coordinator was taken"
            self.orders.append(msgspec.json.encode(command))
            return take(command)

        device.agent.hosting.order = order  # type: ignore[method-assign]
        return device

    async def start_coordinator(self) -> Process:
        self._count += 1
        process = Process(self, self._count)
        self.processes.append(process)
        await process.coordinator.start()
        return process

    async def _keep_looking(self) -> None:
        while True:
            self.check()
            await asyncio.sleep(LOOK_S)

    def check(self) -> None:
        """At most one may act; what a stopped process would find when it goes on counts as well."""
        leaders = [process.id for process in self.processes if process.leads]
        assert len(leaders) <= 1, f"{leaders} lead at {self.clock.monotonic_s():.3f} s"
        assert self.epochs == sorted(set(self.epochs)), f"epochs rise: {self.epochs}"

    def looked(self) -> None:
        """Raise what the looking found."""
        assert self._look is not None
        if self._look.done():
            self._look.result()

    def leader(self) -> Process | None:
        self.looked()
        found = [process for process in self.processes if process.leads]
        return found[0] if found else None

    async def lead(self, within_s: float) -> Process:
        """Wait for a leader that answers."""
        await self.until(lambda: self.leader() is not None and bool(self.leader().coordinator._questions), within_s)
        leader = self.leader()
        assert leader is not None
        self.coordinator = leader.coordinator
        return leader

    async def ask_as_gateway(self, session: int = 0) -> RouteReply:
        """A chain, asked for as gateways do. Raises `BusUnavailable`, `BusTimeout`."""
        model = self.store.entries[0].model
        request = RouteRequest(model=model, session=SessionId(f"{session:032x}"), reserve_tokens=100)
        answer = await self.questions.ask(SUBJECTS.route("asker"), msgspec.json.encode(request))
        return msgspec.json.decode(answer, type=RouteReply)

    async def keep_asking(self, every_s: float, for_s: float) -> list[float]:
        """Ask over and over as clients would; how long each took. A question without an answer fails."""
        took_s: list[float] = []
        end_s = self.clock.monotonic_s() + for_s
        while self.clock.monotonic_s() < end_s:
            began_s = self.clock.monotonic_s()
            try:
                reply = await self.ask_as_gateway(len(took_s))
            except (BusTimeout, BusUnavailable) as error:
                raise AssertionError(f"a client saw: {error}") from error
            assert reply.hops, reply.error
            took_s.append(self.clock.monotonic_s() - began_s)
            await asyncio.sleep(every_s)
        return took_s
