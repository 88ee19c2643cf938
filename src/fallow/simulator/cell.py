"""One simulated cell: its coordinators, the operator's store, its gateways. The real parts, put together."""

from typing import Final

from fallow.coordinator.leadership import Leadership
from fallow.coordinator.service import Coordinator, CoordinatorConfig
from fallow.domain.clock import Clock
from fallow.domain.fleet import ModelEntry, Subjects
from fallow.domain.frames import Frame
from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import Manifest
from fallow.fabric.memory_lease import MemoryLeases
from fallow.fabric.peers import Peers
from fallow.policy.liveness import Liveness
from fallow.policy.membership import MembershipRules
from fallow.processes.store_server import StoreServer
from fallow.simulator.disk import SimulatedDisk
from fallow.simulator.model import BuiltModel
from fallow.simulator.network import SimulatedNetwork
from fallow.trust.open_doors import OpenAdmission, open_coordinator

GATEWAYS: Final = 2
COORDINATORS: Final = 2
LEASE_KEY: Final = "leader"
LEASE_TTL_S: Final = 3.0
"""As the product sets it for its bucket of leases."""


class _DeclaredStore(StoreServer):
    """Announces the scenario's sizes instead of those of its empty files."""

    entry: ModelEntry

    def _entry(self, digest: Digest, manifest: Manifest) -> ModelEntry:
        return self.entry


class SimulatedStore:
    """The operator's store of a cell."""

    def __init__(
        self,
        node: NodeId,
        subjects: Subjects,
        network: SimulatedNetwork,
        model: BuiltModel,
        clock: Clock,
        liveness: Liveness,
    ) -> None:
        disk = SimulatedDisk(lambda _: 0)
        disk.put_manifest(model.manifest)
        disk.files = dict.fromkeys(model.pieces)
        endpoint = network.endpoint(node)
        self.disk = disk
        self._peers = Peers(
            endpoint,
            clock,
            role="store",
            admission=OpenAdmission(),
            on_frame=self._on_frame,
            on_lost=lambda *_: None,
            liveness=liveness,
        )
        self._server = _DeclaredStore(disk, network.bus(node), self._peers, clock, subjects, endpoint.address)
        self._server.entry = model.entry

    async def start(self) -> None:
        await self._peers.start()
        await self._server.start()

    def _on_frame(self, peer: NodeId, frame: Frame) -> None:
        self._server.on_frame(peer, frame)


class SimulatedCoordinator:
    """One of a cell's coordinator processes: it leads or stands by, and can be killed and started again."""

    def __init__(
        self, name: str, cell: str, network: SimulatedNetwork, leases: MemoryLeases, clock: Clock, heartbeat_s: float
    ) -> None:
        self.name = name
        self.process: Coordinator | None = None
        self._network = network
        self._leases = leases
        self._clock = clock
        self._config = CoordinatorConfig(cell=cell, membership=MembershipRules(heartbeat_interval_s=heartbeat_s))
        self._leadership: Leadership | None = None

    async def start(self) -> None:
        bus = self._network.bus(self.name)
        self._leadership = Leadership(self._leases.key(bus, LEASE_KEY), self.name, self.name, self._clock)
        self.process = Coordinator(
            self._config,
            bus,
            self._clock,
            self._network.presence(),
            self._leadership,
            id=self.name,
            name=self.name,
            trust=open_coordinator(),
        )
        await self.process.start()

    def epoch(self) -> int | None:
        """The epoch that it leads under; `None` when it does not lead."""
        return None if self._leadership is None or self.process is None else self._leadership.epoch()

    async def kill(self) -> None:
        """kill -9: its connection breaks and it says nothing."""
        process, self.process = self.process, None
        self._network.hub.drop(self.name, "Client Closed")
        if process is not None:
            await process.close()
