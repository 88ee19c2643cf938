"""Other cells: what they tell of themselves, and what this cell's coordinator asks of them and answers them.

Rules
- The leading coordinator of every cell publishes a `CellDigest` each `digest_interval_s`. A neighbour that is silent
  for `digest_silence_max_s` is forgotten; one that does not answer, or answers nonsense, is left alone for as long.
  A digest from before the last one is not taken, whichever leader told it: a captured bus may say it again. So a new
  leader whose clock is behind the last one's is first heard when the cell has been silent for that long.
- A session whose cell has no chain for it, or is loaded beyond `load_max`, gets a chain of a neighbour's devices. Its
  gateway sees a chain like any other. When that chain breaks, the cell that gave it repairs it.
- What a neighbour asks is answered from this cell alone, so that a question never travels further; a cell that is
  loaded beyond the bound itself gives no chains. A chain's grants are given by the cell whose devices they are for.
  What its gateways report of devices goes to this cell's book of suspects, as that cell's word.
- A cell that is too small for long says in its digest into which neighbour it dissolves. It serves whoever stays.
- Where layers of a model are held by nobody here, neighbours are asked who there has its files, and the placer names
  them as sources.
- What is told and asked is signed by a coordinator of the cell that says it (`trust/cell_words.py`), and checked like
  heartbeats, as answers are (`checks.py`). At most `NEIGHBOURS_MAX` cells are known, and
  `GIVEN_MAX` sessions remembered.

Which neighbour is asked is decided in `policy/cells.py`.
"""

import asyncio
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import TypeVar

import msgspec

from fallow.coordinator import checks, registry
from fallow.coordinator.cell_size import SizeWatch
from fallow.coordinator.registry import Fleet
from fallow.domain.cells import CellDigest, ModelDigest, NeighbourCell, digests, told_when
from fallow.domain.clock import Clock
from fallow.domain.errors import BusMessageError, FabricError, FallowError, NoRoute, TrustError
from fallow.domain.fleet import (
    CellQuestion,
    FilesFound,
    FindChain,
    FindFiles,
    MeasureRtt,
    ModelEntry,
    RouteReply,
    RouteRequest,
    Subjects,
)
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import Digest, SessionId
from fallow.fabric.contract import Bus, Subscription
from fallow.policy import cells
from fallow.policy.cells import CellRules, Neighbour
from fallow.policy.routing_weights import Weights
from fallow.trust.contract import CellWords

NEIGHBOURS_MAX = 64
GIVEN_MAX = 16_384
"""Sessions with another cell's chain; of more, the oldest are forgotten, and repaired as if the chain were ours."""
SENT_MAX = 4096
ASK_TIMEOUT_S = 0.5
ASKED_AT_ONCE = 16
"""Questions of neighbours that are answered at the same time."""
RTT_GAIN = 0.25
"""How much a new measurement of a round trip moves the estimate."""

_T = TypeVar("_T")

log = logging.getLogger(__name__)


class _Known(msgspec.Struct):
    """A neighbour, and what came of asking it."""

    digest: CellDigest
    heard_s: float
    rtt_s: float | None = None
    unwell_until_s: float = 0.0
    sent: deque[tuple[float, Digest]] = msgspec.field(default_factory=lambda: deque(maxlen=SENT_MAX))
    """When chains of which models were got from it, lately."""
    sent_total: int = 0


class Neighbours:
    """This cell among the others. `start` when the coordinator begins to lead, `close` when it stops; then again."""

    def __init__(
        self,
        cell: str,
        bus: Bus,
        clock: Clock,
        rules: CellRules,
        fleet: Fleet,
        route: Callable[[RouteRequest], RouteReply],
        weights: Callable[[Digest], Weights | None],
        drop: Callable[[str, FallowError], None],
        words: CellWords,
        accused: Callable[[str, RouteRequest], None],
    ) -> None:
        """`route` answers from this cell alone; `weights` are the router's of a model, once it has worked them out;
        `drop` counts what was not believed; `accused` takes what the named cell's gateways report of devices."""
        self._cell = cell
        self._bus = bus
        self._clock = clock
        self._rules = rules
        self._fleet = fleet
        self._route = route
        self._weights = weights
        self._drop = drop
        self._words = words
        self._accused = accused
        self._subjects = Subjects(cell)
        self._known: dict[str, _Known] = {}
        self._given: OrderedDict[SessionId, str] = OrderedDict()
        self._own: dict[Digest, ModelDigest] = {}
        self.size = SizeWatch(cell, clock, rules, fleet)
        """Whether this cell is too small or too large, and what it says of it."""
        self._boot = ""
        self._sequence = 0
        self._subscriptions: list[Subscription] = []
        self._telling: asyncio.Task[None] | None = None

    # --- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen to the others and tell of this cell. Raises `BusUnavailable`."""
        self._boot = f"{self._clock.unix_s():.6f}"  # another one for each term; not drawn, so that simulations repeat
        self._subscriptions = [
            await self._bus.subscribe(digests(), self._on_digest),
            await self._bus.subscribe(self._subjects.ask, self._on_question, at_once=ASKED_AT_ONCE),
            await self._bus.subscribe(self._subjects.ping, self._on_ping, at_once=ASKED_AT_ONCE),
        ]
        self._telling = asyncio.get_running_loop().create_task(self._tell())

    async def close(self) -> None:
        """Stop; what was learnt of the others is forgotten. Idempotent."""
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await subscription.cancel()
        telling, self._telling = self._telling, None
        if telling is not None:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
        self._known.clear()
        self.size.forget()
        self._fleet.elsewhere = {}

    def known(self) -> tuple[NeighbourCell, ...]:
        """The other cells, nearest first, for `fallow status`."""
        now_s = self._clock.monotonic_s()
        found = [
            NeighbourCell(
                digest=known.digest, silent_s=now_s - known.heard_s, rtt_s=known.rtt_s, sessions_sent=known.sent_total
            )
            for known in self._known.values()
        ]
        return tuple(sorted(found, key=lambda each: (each.rtt_s is None, each.rtt_s, each.digest.cell)))

    # --- telling and hearing --------------------------------------------------------------------

    async def _tell(self) -> None:
        # Not for ever: an answer that arrives together with the cancellation swallows it (`asyncio.wait_for`, 3.11).
        while self._telling is asyncio.current_task():
            try:
                await self._bus.publish(self._subjects.digest, self._words.tell(self.digest()))
                self._forget()
                await asyncio.gather(*(self._measure(cell) for cell in list(self._known)))
                await self._look_for_files()
            except FabricError as error:
                log.debug("the digest could not be told: %s", error)
            except Exception:
                log.exception("telling other cells of this one failed; the next attempt is in a moment")
            await self._clock.sleep(self._rules.digest_interval_s)

    def digest(self) -> CellDigest:
        """What this cell tells now."""
        models = tuple(self._model_digest(entry) for entry in self._fleet.entries().values())
        regions = Counter(beat.region for beat in self._fleet.present().values())
        self._own = {told.model: told for told in models}
        self._sequence += 1
        digest = CellDigest(
            cell=self._cell,
            boot=self._boot,
            sequence=self._sequence,
            devices=regions.total(),
            devices_max=self._rules.devices_max,
            region=max(regions, key=lambda region: (regions[region], region), default=""),
            models=models[: checks.MODELS_MAX],
        )
        others = [self._seen(known) for known in self._known.values()]
        return msgspec.structs.replace(digest, dissolves_into=self.size.look(digest, others))

    def _model_digest(self, entry: ModelEntry) -> ModelDigest:
        index = self._fleet.index(entry.model)
        carriers = list(self._fleet.carriers(entry.model).values())
        holders = [0] * entry.config.layer_count if index is None else index.holders
        weights = self._weights(entry.model)
        capacity = None if weights is None else weights.rows_per_s_max
        return cells.digest_of(entry.model, registry.shape_of(entry), carriers, holders, capacity)

    async def _on_digest(self, subject: str, message: bytes) -> None:
        try:
            digest = checks.cell_digest(subject, message, self._words.told)
        except (BusMessageError, TrustError) as error:
            self._drop("digest", error)
            return
        if digest.cell == self._cell:
            return
        known = self._known.get(digest.cell)
        if known is None:
            if len(self._known) < NEIGHBOURS_MAX:
                self._known[digest.cell] = _Known(digest, self._clock.monotonic_s())
                log.info("cell %s is a neighbour: %d devices", digest.cell, digest.devices)
        elif told_when(digest) > told_when(known.digest):
            known.digest, known.heard_s = digest, self._clock.monotonic_s()

    def _forget(self) -> None:
        oldest_s = self._clock.monotonic_s() - self._rules.digest_silence_max_s
        for cell in [cell for cell, known in self._known.items() if known.heard_s < oldest_s]:
            del self._known[cell]
            log.info("cell %s is forgotten: nothing was heard of it", cell)

    async def _measure(self, cell: str) -> None:
        known = self._known[cell]
        asked_s = self._clock.monotonic_s()
        if asked_s < known.unwell_until_s:
            return
        if await self._ask(cell, MeasureRtt(cell=self._cell), bytes) is not None:
            rtt_s = self._clock.monotonic_s() - asked_s
            known.rtt_s = rtt_s if known.rtt_s is None else known.rtt_s + RTT_GAIN * (rtt_s - known.rtt_s)

    async def _look_for_files(self) -> None:
        found: dict[Digest, tuple[PeerAddress, ...]] = {}
        for model, told in self._own.items():
            peers: list[PeerAddress] = []
            for cell in cells.lenders(told, self._well(), self._rules):
                files = await self._ask(cell, FindFiles(cell=self._cell, model=model), checks.files_found)
                peers += files.sources if files is not None else ()
            if peers:
                found[model] = tuple(dict.fromkeys(peers))[: checks.SOURCES_MAX]
        self._fleet.elsewhere = found

    # --- chains ---------------------------------------------------------------------------------

    async def route(self, request: RouteRequest, layer_count: int) -> RouteReply:
        """A chain of this cell's devices, or else of a neighbour's, or why there is none."""
        giver = self._given.get(request.session)
        if giver is not None and request.keep:
            repaired = await self._chain_of(giver, request, layer_count)
            if repaired is not None:
                return repaired
        own = self._own.get(request.model)
        if own is not None and cells.overloaded(own, self._rules) and not request.keep:
            return await self._chain_elsewhere(request, layer_count) or self._chain_here(request)
        here = self._chain_here(request)
        if here.hops:
            return here
        return await self._chain_elsewhere(request, layer_count) or here

    def _chain_here(self, request: RouteRequest) -> RouteReply:
        here = self._route(request)
        if here.hops:
            # Whoever gave the session its chain before does not repair this one.
            self._given.pop(request.session, None)
        return here

    async def _chain_elsewhere(self, request: RouteRequest, layer_count: int) -> RouteReply | None:
        # What is kept of the old chain is this cell's: the neighbour's is a whole one.
        fresh = msgspec.structs.replace(request, keep=())
        for cell in cells.overflow_order(request.model, self._well(), self._rules):
            reply = await self._chain_of(cell, fresh, layer_count)
            if reply is not None:
                return reply
        return None

    async def _chain_of(self, cell: str, request: RouteRequest, layer_count: int) -> RouteReply | None:
        def check(message: bytes) -> RouteReply:
            return checks.route_reply(message, request, layer_count)

        known = self._known.get(cell)
        if known is None:
            return None
        reply = await self._ask(cell, FindChain(cell=self._cell, request=request), check)
        if reply is None or not reply.hops:
            return None
        if self._given.get(request.session) != cell:
            known.sent.append((self._clock.monotonic_s(), request.model))
            known.sent_total += 1
        self._given[request.session] = cell
        self._given.move_to_end(request.session)
        if len(self._given) > GIVEN_MAX:
            self._given.popitem(last=False)
        return reply

    # --- asking and answering -------------------------------------------------------------------

    def _well(self) -> list[Neighbour]:
        now_s = self._clock.monotonic_s()
        return [self._seen(known) for known in self._known.values() if now_s >= known.unwell_until_s]

    def _seen(self, known: _Known) -> Neighbour:
        since_s = self._clock.monotonic_s() - self._rules.sent_counts_s
        sent = Counter(model for at_s, model in known.sent if at_s >= since_s)
        return Neighbour(digest=known.digest, rtt_s=known.rtt_s, sent=sent)

    async def _ask(self, cell: str, question: CellQuestion, check: Callable[[bytes], _T]) -> _T | None:
        """The checked answer of a cell; `None` when there is none to be believed, and then it is left alone a while."""
        try:
            answer = await self._bus.request(Subjects(cell).ask, self._words.ask(question, cell), ASK_TIMEOUT_S)
            return check(answer)
        except BusMessageError as error:
            self._drop("neighbour", error)
        except FabricError as error:
            log.info("cell %s does not answer: %s", cell, error)
        known = self._known.get(cell)
        if known is not None:
            known.unwell_until_s = self._clock.monotonic_s() + self._rules.digest_silence_max_s
        return None

    async def _on_question(self, _: str, message: bytes) -> bytes | None:
        try:
            question = checks.cell_question(message, self._words.asked)
        except (BusMessageError, TrustError) as error:
            self._drop("neighbour", error)
            return None
        match question:
            case FindChain(cell=cell, request=request):
                self._accused(cell, request)
                return msgspec.json.encode(self._lend(request))
            case FindFiles(model=model):
                now_s = self._clock.monotonic_s()
                sources = registry.sources_of(self._fleet, model, None, now_s, checks.SOURCES_MAX)
                return msgspec.json.encode(FilesFound(sources=sources))
            case MeasureRtt():
                return b""

    async def _on_ping(self, _: str, __: bytes) -> bytes:
        return b""

    def _lend(self, request: RouteRequest) -> RouteReply:
        own = self._own.get(request.model)
        if own is not None and cells.overloaded(own, self._rules) and not request.keep:
            return RouteReply(error=f"cell {self._cell} is loaded to the bound itself", code=NoRoute.code)
        return self._route(request)
