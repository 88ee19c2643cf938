"""The agent: a device's side of the control bus, and what ties its parts together.

Rules
- It says what the device is and does: a heartbeat every interval, and one at once when something changes, at most one
  in `HEARTBEAT_GAP_S`.
- It obeys the coordinator's orders about what to host, and nobody else's about anything: orders are signed, for this
  run of it alone (`trust/grants.py`). Whom it serves is the session frames' business (`stages.py`).
- Orders of a coordinator that has been replaced are refused: those of a lower epoch than was heard of. So are those for
  models that the council does not allow; what it allows no longer is dropped.
- It works under a lease alone (`Lease`). When that ends or the council halts, sessions end, the engine is closed at
  once, its process with it, and orders are refused; when it may work again, the engine is started and loads what was
  there.
- When the engine is lost, sessions are told at once, it is started again (`engine_keeper.py`), and what was hosted is
  loaded again.
- `drain` leaves politely: no new sessions, gateways are asked to move theirs, and those that are there have time for
  it. `move_out` does so for another cell: the device's stay goes on, with another agent, there.

Without a bus it goes on serving the sessions that it has.
"""

import asyncio
import logging
import secrets
from collections.abc import Coroutine
from typing import Any

import msgspec

from fallow.domain.charter import Charter, Standing
from fallow.domain.clock import Clock
from fallow.domain.errors import FabricError, FallowError, TrustError
from fallow.domain.fleet import (
    Accepted,
    Heartbeat,
    NodeLeaving,
    PlaceStage,
    StageStatus,
    Subjects,
)
from fallow.domain.frames import Chunk, FetchChunk, Frame
from fallow.domain.ids import NodeId
from fallow.engine.contract import Loss, StageEngine
from fallow.fabric.contract import Bus, LinkEndpoint, Subscription
from fallow.fabric.peers import Peers
from fallow.models.store import Store
from fallow.node.engine_keeper import EngineKeeper
from fallow.node.fetch import ChunkServer, Fetcher
from fallow.node.history import StayHistory
from fallow.node.hosting import Hosting
from fallow.node.row_checks import RowChecks
from fallow.node.shelf import Shelf, ShelfReader
from fallow.node.stages import StageRelay
from fallow.policy.liveness import Liveness
from fallow.trust.contract import NodeTrust

HEARTBEAT_GAP_S = 0.02
LINKS_TOLD_MAX = 256
HISTORY_LOOK_S = 60.0
SHELF_LOOK_S = 300.0
"""The room left on the disk is looked up so often; what is cached, when a stage has become ready or failed, too."""
DRAIN_POLL_S = 0.05
PASSPORT_BEATS = 30
"""A heartbeat in so many tells the passport again, in case that the one that told it was lost."""

log = logging.getLogger(__name__)


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the owner allows, and the agent's intervals."""

    cell: str
    name: str
    """For people; up to 128 printable characters."""
    memory_bytes: int
    """What the owner allows for weights and KV cache together."""
    kv_budget_bytes: int
    """The part of it that the engine was given for its KV cache."""
    log_budget_bytes: int = 64 << 20
    """For the activations that are kept for replay."""
    heartbeat_interval_s: float = 1.0
    drain_timeout_s: float = 10.0
    version: str = ""
    region: str = ""
    """Where its owner says that it is."""


class Agent:
    """One device. `start`, then it works until `drain` or `close`.

    It owns what it makes (links, hosting, sessions) and starts the engine; bus, endpoint and store remain the caller's
    to close, and so does the engine's budget to choose.
    """

    def __init__(
        self, config: AgentConfig, node: NodeId, bus: Bus, endpoint: LinkEndpoint, engine: StageEngine, store: Store,
        clock: Clock, *, trust: NodeTrust, history: StayHistory | None = None, liveness: Liveness = Liveness(),  # noqa: B008 (frozen)
    ) -> None:  # fmt: skip
        self._config = config
        self.node = node
        self._bus = bus
        self._endpoint = endpoint
        self._engine = engine
        self._clock = clock
        self._trust = trust
        self._lease = trust.lease
        self._subjects = Subjects(config.cell)
        self._history = history
        self.peers = Peers(
            endpoint, clock, role="node", admission=trust.admission, on_frame=self._on_frame, on_lost=self._on_lost,
            liveness=liveness,
        )  # fmt: skip
        checks = RowChecks()
        self.relay = StageRelay(engine, self.peers, clock, config.log_budget_bytes, trust.grants, trust.lease, checks)
        self._server = ChunkServer(store, self.peers)
        self._fetcher = Fetcher(store, self.peers)
        self.hosting = Hosting(engine, store, self._fetcher, clock, self._changed, checks)
        self._shelf = Shelf()
        self._shelf_reader = ShelfReader(store)
        self._shelf_stale = asyncio.Event()
        self._settled: frozenset[object] = frozenset()
        self._epoch = 0
        """The highest of a coordinator that was heard of."""
        self._charter: Charter | None = None
        """By which what is hosted was looked over last."""
        self._passport_told = ""
        self._boot = secrets.token_hex(8)
        self._sequence = 0
        self._draining = False
        self._closed = False
        self._beat_now = asyncio.Event()
        self._subscriptions: list[Subscription] = []
        self._tasks: set[asyncio.Task[None]] = set()

    # --- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine if the device may work, open for links, report. Raises `EngineError`, `BusUnavailable`."""
        runs = self._may_work()
        if runs:
            await self._engine.start()
        await self.peers.start()
        for subject, handler in (
            (self._subjects.command(self.node), self._on_command),
            (self._subjects.hello, self._on_hello),
            (self._subjects.leader, self._on_leader),
        ):
            self._subscriptions.append(await self._bus.subscribe(subject, handler))
        if self._history is not None:
            self._history.begin()
            self._spawn(self._keep_history(self._history))
        keeper = EngineKeeper(
            self._engine, self._lease, self._clock, on_stop=self._on_stop, on_lost=self._on_engine_lost,
            on_running=self._on_running, on_change=self._changed,
        )  # fmt: skip
        self._spawn(keeper.watch_standing())
        self._spawn(keeper.watch_engine(runs=runs))
        self._spawn(self._watch_shelf())
        self._spawn(self._beat())

    async def drain(self) -> None:
        """Leave politely: have sessions moved, wait for it up to `drain_timeout_s`, say goodbye, close. Idempotent."""
        if self._closed:
            return
        await self._hand_over()
        if self._history is not None:
            self._history.end()
        await self.close()

    async def move_out(self) -> None:
        """Leave politely for another cell: as `drain` does, but the history of stays counts no end. Idempotent."""
        if self._closed:
            return
        await self._hand_over()
        if self._history is not None:
            self._history.look()
            await self._history.save()
        await self.close()

    async def _hand_over(self) -> None:
        self._draining = True
        await self._send_heartbeat()
        self.relay.drain()
        deadline_s = self._clock.monotonic_s() + self._config.drain_timeout_s
        while self._moves_are_awaited() and self._clock.monotonic_s() < deadline_s:
            await self._clock.sleep(DRAIN_POLL_S)
        await self._say_goodbye()

    def _moves_are_awaited(self) -> bool:
        """Whether there is a session whose gateway is there to move it. Nobody moves the others."""
        return any(session.orphaned_at_s is None for session in self.relay.sessions())

    async def _say_goodbye(self) -> None:
        try:
            await self._bus.publish(self._subjects.leaving(self.node), msgspec.json.encode(NodeLeaving(node=self.node)))
        except FabricError as error:
            log.info("the coordinator could not be told that we leave: %s", error)

    async def close(self) -> None:
        """Stop at once. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for subscription in self._subscriptions:
            await subscription.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.hosting.close()
        await self.relay.close()
        await self._server.close()
        await self.peers.close()
        await self._engine.close()

    # --- links ----------------------------------------------------------------------------------

    def _on_frame(self, peer: NodeId, frame: Frame) -> None:
        if self.relay.handle(peer, frame):
            return
        match frame.header:
            case Chunk():
                self._fetcher.on_chunk(peer, frame.header, frame.payload)
            case FetchChunk():
                self._server.handle(peer, frame.header)
            case other:
                log.debug("a frame of kind %s from %s is not for a node", type(other).__name__, peer[:8])

    def _on_lost(self, peer: NodeId, reason: str) -> None:
        self._fetcher.peer_lost(peer, reason)
        self.relay.peer_lost(peer, reason)

    # --- the bus --------------------------------------------------------------------------------

    async def _on_command(self, _: str, message: bytes) -> bytes:
        try:
            command = self._trust.orders.unseal(message, self.node, self._boot)
        except TrustError as error:
            log.warning("%s: an order was refused: %s", error.code, error)
            return msgspec.json.encode(Accepted(ok=False, message=error.message, boot=self._boot))
        if command.epoch < self._epoch:
            refusal = f"an order of epoch {command.epoch} came after epoch {self._epoch} was heard of"
            return msgspec.json.encode(Accepted(ok=False, message=refusal, epoch=self._epoch))
        self._epoch = command.epoch
        if self._draining:
            return msgspec.json.encode(Accepted(ok=False, message="this device is leaving"))
        if not self._may_work():
            return msgspec.json.encode(Accepted(ok=False, message=self._lease.why))
        if isinstance(command, PlaceStage) and not self._lease.allows(command.stage.model):
            refusal = f"the council does not allow the model {command.stage.model[:12]}"
            return msgspec.json.encode(Accepted(ok=False, message=refusal))
        return msgspec.json.encode(self.hosting.order(command))

    async def _on_hello(self, _: str, __: bytes) -> None:
        self._passport_told = ""
        self._changed()

    async def _on_leader(self, _: str, message: bytes) -> None:
        try:
            changed = self._trust.orders.heard(message)
        except TrustError as error:
            log.warning("%s: a leader's word was not believed: %s", error.code, error)
            return
        self._epoch = max(self._epoch, changed.epoch)

    def _changed(self) -> None:
        self._beat_now.set()
        settled = frozenset(
            (stage.stage, stage.status)
            for stage in self.hosting.hosted()
            if stage.status in (StageStatus.READY, StageStatus.FAILED)
        )
        if settled != self._settled:
            self._settled = settled
            self._shelf_stale.set()

    async def _beat(self) -> None:
        while True:
            await self._send_heartbeat()
            # A burst of changes is one heartbeat, with the last state in it.
            await self._clock.sleep(HEARTBEAT_GAP_S)
            try:
                async with asyncio.timeout(self._config.heartbeat_interval_s - HEARTBEAT_GAP_S):
                    await self._beat_now.wait()
            except TimeoutError:
                pass
            self._beat_now.clear()

    async def _send_heartbeat(self) -> None:
        self._look_over()
        self._sequence += 1
        heartbeat = self.heartbeat()
        passport = self._trust.admission.passport
        if passport != self._passport_told or self._sequence % PASSPORT_BEATS == 0:
            heartbeat = msgspec.structs.replace(heartbeat, passport=passport)
        try:
            await self._bus.publish(self._subjects.heartbeat(self.node), msgspec.json.encode(heartbeat))
            self._passport_told = passport
        except FabricError as error:
            log.debug("a heartbeat could not be sent: %s", error)

    def _look_over(self) -> None:
        """Drop what a new charter allows no longer."""
        if self._lease.charter is not self._charter:
            self._charter = self._lease.charter
            for model in self.hosting.drop_all_but(self._lease.allows):
                log.warning("the council does not allow the model %s any more; it is dropped", model[:12])
                self.relay.forbid(model)

    def heartbeat(self) -> Heartbeat:
        """This device's public state now."""
        load = self._engine.load_now
        rtts = {peer: self.peers.rtt_s(peer) for peer in sorted(self.peers.connected())[:LINKS_TOLD_MAX]}
        return Heartbeat(
            node=self.node,
            name=self._config.name,
            sequence=self._sequence,
            boot=self._boot,
            address=self._endpoint.address,
            memory_bytes=self._config.memory_bytes,
            kv_budget_bytes=self._config.kv_budget_bytes,
            kv_free_bytes=max(load.kv_free_bytes, 0),
            hosted=self.hosting.hosted(),
            session_count=self.relay.session_count,
            tokens_per_s=load.rows_per_s,
            link_rtt_s={peer: rtt_s for peer, rtt_s in rtts.items() if rtt_s is not None},
            draining=self._draining,
            version=self._config.version,
            region=self._config.region,
            disk_free_bytes=self._shelf.disk_free_bytes,
            cached=self._shelf.cached,
            outlook=None if self._history is None else self._history.outlook(),
            standing=self._lease.standing,
        )

    # --- what the device knows of itself --------------------------------------------------------

    async def _keep_history(self, history: StayHistory) -> None:
        while True:
            await self._clock.sleep(HISTORY_LOOK_S)
            if history.look():
                await history.save()

    async def _watch_shelf(self) -> None:
        while True:
            self._shelf_stale.clear()
            try:
                shelf = await self._shelf_reader.read({stage.stage.model for stage in self.hosting.hosted()})
            except (FallowError, OSError) as error:
                log.warning("the model files on this disk could not be listed: %s", error)
            else:
                if shelf.cached != self._shelf.cached:
                    self._beat_now.set()
                self._shelf = shelf
            try:
                async with asyncio.timeout(SHELF_LOOK_S):
                    await self._shelf_stale.wait()
            except TimeoutError:
                pass

    # --- work -----------------------------------------------------------------------------------

    def _may_work(self) -> bool:
        return self._lease.standing is Standing.WORKING

    def _on_stop(self, standing: Standing, why: str) -> None:
        self.relay.stop(standing, why)
        self.hosting.stop()

    def _on_running(self) -> None:
        self._look_over()  # what the council took back meanwhile is not loaded again
        self.hosting.reload()

    def _on_engine_lost(self) -> None:
        loss = self._engine.loss or Loss("The device's engine crashed.")
        self.relay.engine_lost(loss.reason)
        if loss.damaged:
            self.hosting.engine_damaged(loss.reason)
        else:
            self.hosting.engine_lost()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the agent failed", exc_info=task.exception())
