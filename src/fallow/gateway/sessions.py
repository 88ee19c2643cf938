"""The fleet as a `TokenSource`: opens chains, keeps finished ones for follow-up turns, and tells chains of trouble.

Rules
- A finished conversation's cache stays on its devices for a follow-up turn, which recomputes only what is new
  (`kept.py`). When a stage has no room for a conversation that begins, moves or is repaired, kept ones make way.
- A conversation goes on with the newest of its chains: the one that it has moved to (`moves.py`).
- What the coordinator believes about devices is a hint: a device reported gone is probed before its sessions move.
"""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial

import msgspec

from fallow.domain.clock import Clock
from fallow.domain.errors import (
    BusTimeout,
    BusUnavailable,
    ContextExceeded,
    FallowError,
    KvExhausted,
    NoRoute,
    NotWorking,
    NumericFault,
    StageRefused,
    UnknownModel,
)
from fallow.domain.fleet import Catalogue, GatewayReport, NodeGone, Subjects
from fallow.domain.frames import LEAVING, CloseSession, Fault, Frame, Phase, Refused, Result, StageState
from fallow.domain.ids import VISITS_MAX, Digest, NodeId, SessionId, at_visit
from fallow.domain.model import Manifest
from fallow.domain.sampling import Recipe
from fallow.domain.service import ServiceTier, Standby
from fallow.fabric.contract import Bus, Subscription
from fallow.fabric.peers import Peers
from fallow.gateway.accusations import Accusations
from fallow.gateway.bus_router import BusRouter
from fallow.gateway.chain import Chain
from fallow.gateway.contract import NOT_NOW, Candidates, Meanwhile
from fallow.gateway.fleet_owner import FleetOwner
from fallow.gateway.kept import KeptChains
from fallow.gateway.lost_devices import CarefulRouter, LostDevices
from fallow.gateway.moves import Moves
from fallow.gateway.ownership import Superseded
from fallow.gateway.questions import Questions
from fallow.gateway.renewals import Renewals
from fallow.gateway.results import Payload, last_candidates
from fallow.gateway.running_ahead import Leave, leave_for
from fallow.models.store import Store
from fallow.trust.contract import Lease, Routes
from fallow.trust.grants import require_working

ROUTE_TIMEOUT_S = 2.0
OPEN_ATTEMPTS_MAX = 6
OPEN_RETRY_S = 0.25
PROBE_TIMEOUT_S = 0.3
TICK_S = 1.0
CATALOGUE_INTERVAL_S = 2.0
EVENTS_MAX = 256

log = logging.getLogger(__name__)


class FleetConversation:
    """`Conversation` over a chain."""

    def __init__(self, source: "FleetTokenSource", chain: Chain, owner: str, prompt: Sequence[int], kept: int) -> None:
        self._source = source
        self._prompt = prompt
        self._closed = False
        self.chain = chain
        self.owner = owner
        self.cached_tokens = kept

    async def prefill(self) -> Candidates:
        return await self._advance(self._prompt[self.cached_tokens :], Phase.PREFILL)

    async def decode(self, token: int, meanwhile: Meanwhile | None = None) -> Candidates:
        self._source.tokens_decoded += 1
        return await self._advance((token,), Phase.DECODE, meanwhile)

    async def _advance(self, tokens: Sequence[int], phase: Phase, meanwhile: Meanwhile | None = None) -> Candidates:
        """On the newest chain. Each that is left in trouble ends a move, so that this comes to an end."""
        moves = self._source.moves
        if self.chain.ahead.untold and not self.chain.broken:
            self.chain.in_trouble("it has taken over, and is to run ahead", None)
        self.chain = moves.newest(self.chain)
        try:
            return await self.chain.advance(tokens, phase, meanwhile)
        except Superseded:
            self.chain = await moves.awaited(self.chain)
        while True:
            try:
                return await self.chain.outcome()
            except Superseded:
                self.chain = await moves.awaited(self.chain)

    async def close(self, *, keep: bool) -> None:
        if not self._closed:
            self._closed = True
            self._source.retire(self, keep=keep)


class FleetTokenSource:
    """`TokenSource` over the fleet. Feed it every session frame and every lost peer."""

    def __init__(
        self, bus: Bus, peers: Peers, store: Store, clock: Clock, subjects: Subjects, origin: NodeId, url: str = "",
        new_session: Callable[[], SessionId] = lambda: SessionId(secrets.token_hex(16)), *, lease: Lease,
        routes: Routes, run_ahead: bool = True, standby: Standby = Standby.PRIORITY,
    ) -> None:  # fmt: skip
        self._bus = bus
        self._peers = peers
        self._store = store
        self._clock = clock
        self._subjects = subjects
        self._origin = origin
        self._url = url
        self._new_session = new_session
        self._questions = Questions(bus, subjects, clock)
        self._lost = LostDevices(peers, clock)
        self._accusations = Accusations()
        asking = BusRouter(self._questions, subjects, origin, lease, routes, self._accusations)
        self._router = CarefulRouter(asking, self._lost)
        self._renewals = Renewals(self._router, peers, clock)
        self._lease = lease
        self._run_ahead = run_ahead
        self._standby = standby
        self.moves = Moves(self._beside, self._drop, self._on_event, clock)
        self._kept = KeptChains(clock)
        self._owner = FleetOwner(self._lost, self.moves, self._kept, lease)
        self._manifests: dict[Digest, Manifest] = {}
        self._live: dict[SessionId, Chain] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscription: Subscription | None = None
        self._tokens_at_report = 0
        self.tokens_decoded = 0
        self.repairs = 0
        self.quarantined = 0
        """Devices of the fleet that are out of service on suspicion, as the coordinator tells it."""
        self.events: deque[str] = deque(maxlen=EVENTS_MAX)

    async def start(self) -> None:
        await self._questions.start()
        self._subscription = await self._bus.subscribe(self._subjects.gone, self._on_node_gone)
        self._spawn(self._tick())
        self._spawn(self._refresh_catalogue())

    async def close(self) -> None:
        if self._subscription is not None:
            await self._subscription.cancel()
        await self._questions.close()
        await self._renewals.close()
        await self.moves.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for chain in self._live.values():
            chain.close()
        self._kept.close()

    # --- TokenSource ---------------------------------------------------------------------------

    def models(self) -> Sequence[Manifest]:
        return tuple(self._manifests.values())

    def tier(self, wanted: ServiceTier) -> ServiceTier:
        return wanted if self._standby.covers(wanted) else ServiceTier.DEFAULT

    async def open(
        self, model: Digest, prompt: Sequence[int], max_new_tokens: int, top_k: int | None, owner: str,
        recipe: Recipe | None = None, tier: ServiceTier = ServiceTier.DEFAULT,
    ) -> FleetConversation:  # fmt: skip
        require_working(self._lease)
        manifest = self._manifests.get(model)
        if manifest is None:
            raise UnknownModel(f"No device serves the model {model[:12]} now.")
        limit = manifest.config.context_length
        total = len(prompt) + max_new_tokens
        if not prompt or total > limit:
            message = f"{len(prompt)} prompt and {max_new_tokens} completion tokens do not fit a context of {limit}."
            raise ContextExceeded(message)
        leave = None
        if recipe is not None and self._run_ahead:
            leave = leave_for(recipe, top_k, len(prompt), total, manifest.eos_token_ids)
        conversation = await self._reuse(model, prompt, total, top_k, owner, leave)
        if conversation is None:
            chain = self._new_chain(model, total, top_k)
            await self._establish(chain, leave)
            conversation = FleetConversation(self, chain, owner, prompt, kept=0)
        if self._standby.covers(tier):
            self.moves.stand_by(conversation.chain, prompt[conversation.cached_tokens :])
        return conversation

    def _new_chain(self, model: Digest, reserve_tokens: int, top_k: int | None) -> Chain:
        manifest = self._manifests.get(model)
        return Chain(
            self._new_session(), model, reserve_tokens, top_k, self._peers, self._router, self._clock, self._on_event,
            self._owner, partial(self._read, manifest.config.vocab_size if manifest else None),
        )  # fmt: skip

    def _read(self, vocab_size: int | None, header: Result, payload: Payload) -> Candidates | None:
        """`last_candidates`; whose result is none, the coordinator hears of."""
        read = last_candidates(header, payload, vocab_size)
        chain = self._live_chain(header.session)
        if read is None and chain is not None:
            self._accusations.note(chain.nodes(), chain.nodes()[-1], None)
        return read

    def _beside(self, chain: Chain) -> Chain:
        """A chain to move to."""
        beside = self._new_chain(chain.model, chain.reserve_tokens, chain.top_k)
        self._live[beside.session] = beside
        return beside

    async def _reuse(
        self, model: Digest, prompt: Sequence[int], total: int, top_k: int | None, owner: str, leave: Leave | None
    ) -> FleetConversation | None:
        """A kept chain that shares a prefix with the prompt, rewound to it."""
        found = self._kept.take(model, prompt, owner)
        if found is None:
            return None
        chain, shared = found
        chain.top_k = top_k
        chain.reserve_tokens = max(chain.reserve_tokens, total)
        self._live[chain.session] = chain
        try:
            await chain.establish(keep_tokens=shared, leave=leave)
        except BaseException as error:
            self._drop(chain)
            if isinstance(error, NOT_NOW):
                return None
            raise
        return FleetConversation(self, chain, owner, prompt, kept=shared)

    async def _establish(self, chain: Chain, leave: Leave | None) -> None:
        self._live[chain.session] = chain
        try:
            for attempt in range(1, OPEN_ATTEMPTS_MAX + 1):
                require_working(self._lease)
                try:
                    await chain.establish(leave=leave)
                    return
                except KvExhausted:
                    chain.ask_for_room()
                    if attempt == OPEN_ATTEMPTS_MAX:
                        raise
                    await self._clock.sleep(OPEN_RETRY_S * attempt)
                except (BusTimeout, BusUnavailable) as error:
                    raise NoRoute(f"No coordinator could be asked for a chain: {error.message}") from error
                except NotWorking:
                    if attempt == OPEN_ATTEMPTS_MAX:
                        raise
                    await self._clock.sleep(OPEN_RETRY_S)
                except (NoRoute, StageRefused) as error:
                    if attempt == OPEN_ATTEMPTS_MAX:
                        raise NoRoute(f"No chain of devices could be opened: {error.message}") from error
                    await self._clock.sleep(OPEN_RETRY_S)
            raise NoRoute("No chain of devices has room at present.")
        except BaseException:
            self._drop(chain)
            raise

    # --- ends of conversations -----------------------------------------------------------------

    def retire(self, conversation: FleetConversation, *, keep: bool) -> None:
        """A conversation has ended; keep its chain for a follow-up turn, or free it everywhere."""
        self.moves.stand_down(conversation.chain)
        chain = conversation.chain = self.moves.newest(conversation.chain) if keep else conversation.chain
        self._live.pop(chain.session, None)
        self.repairs += chain.repairs
        chain.repairs = 0
        chain.ahead.forget()
        moving = self.moves.end(chain)
        if not keep or moving or chain.broken or not chain.hops:
            chain.close()
            return
        self._kept.keep(chain, conversation.owner)

    def _drop(self, chain: Chain) -> None:
        self._live.pop(chain.session, None)
        self.moves.end(chain)
        chain.close()

    # --- what arrives --------------------------------------------------------------------------

    def on_frame(self, peer: NodeId, frame: Frame) -> None:
        """Frames of sessions; other kinds are not for gateways and are ignored."""
        header = frame.header
        if isinstance(header, Result | StageState | Refused | Fault):
            chain = self._live_chain(header.session)
            if chain is not None:
                if isinstance(header, Fault) and header.code == NumericFault.code:
                    self._accusations.note(chain.nodes(), header.suspect or peer, peer)
                chain.on_frame(peer, frame)
            elif isinstance(header, Fault):
                if header.code == LEAVING:  # it waits for sessions to go that are no one's any more
                    self._peers.post(peer, Frame(CloseSession(session=header.session)))
                self._kept.forget(lambda chain: (peer, header.session) in chain.stages())

    def _live_chain(self, stage: SessionId) -> Chain | None:
        """The chain of which a device named a stage: by its session's name, or that of a later visit."""
        for visit in range(VISITS_MAX):
            chain = self._live.get(at_visit(stage, visit))
            if chain is not None:
                return chain
        return None

    def on_lost(self, peer: NodeId, reason: str) -> None:
        """A link is gone, and every chain over it is broken."""
        self._lost.note(peer)
        for chain in list(self._live.values()):
            if peer in chain.nodes():
                chain.in_trouble(f"{peer[:8]} is gone ({reason})", peer)
        self._kept.forget(lambda chain: peer in chain.nodes())

    async def _on_node_gone(self, _subject: str, message: bytes) -> None:
        try:
            gone = msgspec.json.decode(message, type=NodeGone)
        except msgspec.DecodeError as error:
            log.debug("an announcement of a loss was not one: %s", error)
            return
        if any(gone.node in chain.nodes() for chain in (*self._live.values(), *self._kept.chains())):
            await self._peers.probe(gone.node, PROBE_TIMEOUT_S)

    # --- housekeeping --------------------------------------------------------------------------

    def _on_event(self, event: str) -> None:
        log.info("%s", event)
        self.events.append(event)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the gateway failed", exc_info=task.exception())

    async def _tick(self) -> None:
        while True:
            await self._clock.sleep(TICK_S)
            for chain in self._live.values():
                chain.check_stall()
            self._renewals.look(self._live.values())
            self._kept.expire()
            await self._report()

    async def _report(self) -> None:
        rate = (self.tokens_decoded - self._tokens_at_report) / TICK_S
        self._tokens_at_report = self.tokens_decoded
        serving = [chain for chain in self._live.values() if not chain.stands_by_for]
        report = GatewayReport(
            gateway=self._origin,
            url=self._url,
            sessions=len(serving),
            tokens_per_s=rate,
            chains=tuple(chain.nodes() for chain in serving[:EVENTS_MAX]),
        )
        try:
            await self._bus.publish(self._subjects.gateway(report.gateway), msgspec.json.encode(report))
        except BusUnavailable:
            log.debug("the bus is away; no report")

    async def _refresh_catalogue(self) -> None:
        while True:
            try:
                answer = await self._bus.request(self._subjects.catalogue, b"", ROUTE_TIMEOUT_S)
                self._adopt(msgspec.json.decode(answer, type=Catalogue))
            except (BusTimeout, BusUnavailable, msgspec.DecodeError) as error:
                log.debug("no catalogue: %s", error)
            await self._clock.sleep(CATALOGUE_INTERVAL_S if self._manifests else OPEN_RETRY_S)

    def _adopt(self, catalogue: Catalogue) -> None:
        """Serve what the catalogue names and the store holds; manifests are immutable, so each is read once.

        Others may announce models to the same cell: those are for other gateways.
        """
        self.quarantined = catalogue.quarantined
        adopted: dict[Digest, Manifest] = {}
        for entry in catalogue.models:
            try:
                adopted[entry.model] = self._manifests.get(entry.model) or self._store.manifest(entry.model)
            except (FallowError, OSError) as error:
                log.debug("the catalogue names %s, which is not in this store: %s", entry.model[:12], error)
        self._manifests = adopted
