"""A detailed simulated world: devices that come and go, cells with their real coordinators, clients who ask.

Rules
- Everything that decides is the product's own code; the engine's timing, the network and people are models.
- Before a run's first second there are `WARM_UP_S` in which nobody asks and files cost nothing, so that a run begins
  with a fleet at work and not with a thousand downloads. Devices that are away then find on their disks what a device
  of their cell holds, as if they had been there the day before.
- Times of the scenario are seconds from its start; the loop's time begins a warm-up earlier than the run.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

from fallow.domain.fleet import Subjects
from fallow.domain.frames import Frame
from fallow.domain.ids import Digest, NodeId
from fallow.fabric.memory_bus import Message
from fallow.fabric.memory_lease import MemoryLeases
from fallow.simulator.capacity import capacity_tokens_per_s
from fallow.simulator.cell import COORDINATORS, GATEWAYS, LEASE_TTL_S, SimulatedCoordinator, SimulatedStore
from fallow.simulator.devices import SimulatedDevice
from fallow.simulator.disk import SimulatedDisk
from fallow.simulator.events import carry_out
from fallow.simulator.gateways import Ask, Outcome, SimulatedGateway, Telling, Turn
from fallow.simulator.meter import Meter
from fallow.simulator.model import build
from fallow.simulator.network import WATCH, SimulatedClock, SimulatedHub, SimulatedNetwork, Site
from fallow.simulator.population import draw_devices
from fallow.simulator.results import Breakage
from fallow.simulator.scenario import Scenario
from fallow.simulator.streams import Streams
from fallow.simulator.trace import Trace
from fallow.simulator.traffic import Client, Traffic

WARM_UP_S: Final = 90.0
SETTLE_S: Final = 600.0
"""How long sessions may still run after the end of a run before they are counted as failed."""
OBSERVE_S: Final = 5.0
OPERATOR_BYTES_PER_S: Final = 125e6

log = logging.getLogger(__name__)


class Cell:
    """One cell's parts."""

    def __init__(self, world: "World", name: str, devices: list[SimulatedDevice]) -> None:
        self.name = name
        self.subjects = Subjects(name)
        self.devices = devices
        heartbeat_s = world.scenario.detailed.heartbeat_interval_s
        names = world.streams
        leases = MemoryLeases(world.network.hub, LEASE_TTL_S)
        self.coordinators = [
            SimulatedCoordinator(f"coordinator-{name}-{index}", name, world.network, leases, world.clock, heartbeat_s)
            for index in range(COORDINATORS)
        ]
        store = NodeId(names.node_id("store", name))
        self.store = SimulatedStore(store, self.subjects, world.network, world.model, world.clock, WATCH)
        self.gateways = [
            SimulatedGateway(
                NodeId(names.node_id("gateway", name, str(index))), names.seed, self.subjects, world.network,
                self.store.disk, world.clock, world.scenario.model.layer_count, WATCH, world.on_turn,
            )
            for index in range(GATEWAYS)
        ]  # fmt: skip
        self.traffic = Traffic(world.scenario, world.streams, name, len(devices))


class World:
    """One run. Make it and `run` it inside a `VirtualTimeLoop`."""

    def __init__(self, scenario: Scenario, seed: int, bin_s: float = 300.0) -> None:
        self.scenario = scenario
        self.streams = Streams(seed)
        self.clock = SimulatedClock()
        self.trace = Trace()
        self.model = build(scenario.model)
        self.from_s = scenario.detailed.start_after_s
        self.until_s = self.from_s + scenario.detailed.hours * 3600
        self.meter = Meter(self.from_s, self.until_s, bin_s)
        self.watchers: list[Callable[[NodeId, NodeId, Frame], None]] = []
        """Called for every frame that is delivered: sender, receiver, frame."""
        self.turn_watchers: list[Callable[[SimulatedGateway, Turn], None]] = []
        self.bus_watchers: list[Callable[[str, str, Message], None]] = []
        self.breakages: list[Breakage] = []
        self._turns = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._trouble: BaseException | None = None
        operator = self._operator()
        self.operator_region = operator.region
        self.network = SimulatedNetwork(
            scenario.network,
            operator,
            self.streams,
            scenario.model.activation_bytes_per_row,
            SimulatedHub(self._on_bus),
            self._on_frame,
        )
        self.clock.network = self.network
        self.devices = self._make_devices()
        names = sorted({device.figures.cell for device in self.devices})
        self.cells = [
            Cell(self, name, [device for device in self.devices if device.figures.cell == name]) for name in names
        ]
        self.by_id = {device.id: device for device in self.devices}

    def _operator(self) -> Site:
        """The operator's machines stand in the region of most devices."""
        counts: dict[str, int] = {}
        for population in self.scenario.populations:
            counts[population.region] = counts.get(population.region, 0) + population.count
        region = max(counts, key=lambda name: counts[name])
        near = next(population for population in self.scenario.populations if population.region == region)
        return Site(
            region=region,
            uplink_bytes_per_s=OPERATOR_BYTES_PER_S,
            downlink_bytes_per_s=OPERATOR_BYTES_PER_S,
            metro_rtt_s=near.metro_rtt_s,
        )

    def _make_devices(self) -> list[SimulatedDevice]:
        made: list[SimulatedDevice] = []
        for figures, site in draw_devices(self.scenario, self.streams, self.until_s):
            self.network.settle(figures.node, site)
            disk = SimulatedDisk(self._pieces_of)
            interval_s = self.scenario.detailed.heartbeat_interval_s
            made.append(
                SimulatedDevice(
                    figures,
                    self.network,
                    self.scenario.model,
                    disk,
                    self.clock,
                    interval_s,
                    WATCH,
                    self._on_device,
                )
            )
        return made

    # --- time -----------------------------------------------------------------------------------

    def now_s(self) -> float:
        """The scenario's time; before `from_s` while the world warms up."""
        return self.clock.monotonic_s() - WARM_UP_S + self.from_s

    @property
    def warm(self) -> bool:
        return self.clock.monotonic_s() >= WARM_UP_S

    def _pieces_of(self, digest: Digest) -> int:
        return self.model.pieces.get(digest, 0) if self.warm else 0

    # --- the run --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start everything, and let it settle for the warm-up."""
        for cell in self.cells:
            for coordinator in cell.coordinators:
                await coordinator.start()
            await cell.store.start()
            for gateway in cell.gateways:
                await gateway.start()
        for device in self.devices:
            self.spawn(device.live(self.now_s))
        await self.clock.sleep(WARM_UP_S)
        self._furnish_absent_disks()

    def _furnish_absent_disks(self) -> None:
        """Who is away has the files of somebody of its cell: most of a fleet has been there before."""
        draw = self.streams.stream("disks")
        for cell in self.cells:
            here = [device for device in cell.devices if device.is_here and device.disk.files]
            for device in cell.devices:
                if not device.disk.files and here:
                    device.disk.files = dict(draw.choice(here).disk.files)
                    device.disk.put_manifest(self.model.manifest)

    async def run(self) -> None:
        """Until the end of the scenario's part that is simulated. Raises what any part of the world raises."""
        for cell in self.cells:
            self.spawn(self._ask(cell))
        self.spawn(self._observe())
        for event in self.scenario.events:
            self.spawn(carry_out(event, self))
        while self.now_s() < self.until_s:
            await self.clock.sleep(min(1.0, self.until_s - self.now_s()))
            self._check_trouble()
        last_s = self.clock.monotonic_s() + SETTLE_S
        while self.running_turns() and self.clock.monotonic_s() < last_s:
            await self.clock.sleep(1.0)
            self._check_trouble()
        for cell in self.cells:
            for gateway in cell.gateways:
                gateway.give_up()

    def running_turns(self) -> int:
        return sum(len(gateway.turns) for cell in self.cells for gateway in cell.gateways)

    # --- clients --------------------------------------------------------------------------------

    async def _ask(self, cell: Cell) -> None:
        for at_s in cell.traffic.arrivals(self.from_s, self.until_s):
            await self.clock.sleep(at_s - self.now_s())
            client = cell.traffic.conversation()
            self.spawn(self._converse(client, cell.gateways[client.gateway(len(cell.gateways))]))

    async def _converse(self, client: Client, gateway: SimulatedGateway) -> None:
        telling = Telling(self.scenario.model.layer_count)
        ask = client.ask()
        while True:
            turn = self._new_turn(gateway, ask)
            await gateway.serve(turn, self.model.digest, ask, telling)
            if not ask.keep or turn.outcome is not Outcome.FINISHED:
                return
            await self.clock.sleep(client.pause_s())
            following = client.follow_up(ask, turn.answer)
            if following is None or self.now_s() >= self.until_s:
                return
            ask = following

    def _new_turn(self, gateway: SimulatedGateway, ask: Ask) -> Turn:
        self._turns += 1
        self.meter.asked(self.now_s(), ask.completion_tokens)
        return Turn(
            number=self._turns,
            gateway=gateway.id,
            asked_s=self.clock.monotonic_s(),
            prompt_tokens=len(ask.prompt),
            wanted_tokens=ask.completion_tokens,
        )

    # --- what happens -----------------------------------------------------------------------------

    def on_turn(self, gateway: SimulatedGateway, turn: Turn) -> None:
        """A session was accepted or has ended."""
        self.note(f"turn {turn.number} {turn.outcome} {turn.tokens}")
        if turn.ended_s is not None:
            self.meter.ended(self.now_s(), turn)
        for watch in self.turn_watchers:
            watch(gateway, turn)

    def _on_device(self, device: SimulatedDevice, what: str) -> None:
        self.note(f"{device.id[:8]} {what}")

    def _on_frame(self, sender: NodeId, receiver: NodeId, frame: Frame) -> None:
        header = frame.header
        self.note(
            f"{sender[:8]} {receiver[:8]} {type(header).__name__} {getattr(header, 'session', '')[:8]} "
            f"{getattr(header, 'epoch', '')} {getattr(header, 'position', '')}"
        )
        for watch in self.watchers:
            watch(sender, receiver, frame)

    def _on_bus(self, sender: str, receiver: str, message: Message) -> None:
        self.note(f"{sender[:8]} {receiver[:8]} {message.subject[-20:]}")
        if message.subject.endswith(".command"):
            self.meter.ordered(self.now_s())
        for watch in self.bus_watchers:
            watch(sender, receiver, message)

    def note(self, step: str) -> None:
        """A step of the run, for its hash."""
        self.trace.note(f"{self.clock.monotonic_s():.6f} {step}")

    async def _observe(self) -> None:
        while True:
            available = [device for device in self.devices if device.is_here]
            capacity = sum(
                capacity_tokens_per_s([d for d in cell.devices if d.is_here], self.scenario.model, self.model.digest)
                for cell in self.cells
            )
            self.meter.observed(self.now_s(), len(available), capacity, self.network.file_bytes_carried)
            await self.clock.sleep(OBSERVE_S)

    # --- tasks ------------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the rest; its failure ends the run."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._trouble = self._trouble or task.exception()

    def _check_trouble(self) -> None:
        if self._trouble is not None:
            raise self._trouble
