"""A simulated gateway: the real door, token source and chains, asked by simulated clients.

Rules
- A client asks, reads greedily to the end, and sometimes goes on with a follow-up turn, as a chat does.
- Every answer is compared with the undisturbed one, token by token.
- A session that was told at once to come later is refused; one that was accepted and ends without its answer failed.
"""

import itertools
from collections.abc import Callable
from enum import StrEnum
from typing import Final

import msgspec

from fallow.domain.clock import Clock
from fallow.domain.errors import FallowError, KvExhausted
from fallow.domain.fleet import Subjects
from fallow.domain.frames import Frame, Phase
from fallow.domain.ids import Digest, NodeId, SessionId
from fallow.domain.sampling import Recipe
from fallow.domain.service import ServiceTier
from fallow.fabric.peers import Peers
from fallow.gateway.admission import Admission
from fallow.gateway.chain import Chain
from fallow.gateway.metrics import GatewayMetrics
from fallow.gateway.problems import Problem
from fallow.gateway.sessions import FleetConversation, FleetTokenSource
from fallow.models.store import Store
from fallow.policy.admission import AdmissionRules
from fallow.policy.liveness import Liveness
from fallow.simulator.model import Undisturbed
from fallow.simulator.network import SimulatedNetwork
from fallow.simulator.streams import number
from fallow.trust.open_doors import OpenAdmission, OpenLease, OpenRoutes

GREEDY_TOP_K: Final = 1


class Outcome(StrEnum):
    """How a session ended."""

    RUNNING = "running"
    FINISHED = "finished"
    ALTERED = "altered"
    """Finished, with other tokens than an undisturbed run would give."""
    REFUSED = "refused"
    FAILED = "failed"


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What a client wants: a prompt of random tokens, so many tokens in return."""

    key: str
    prompt: tuple[int, ...]
    completion_tokens: int
    keep: bool
    """Whether a follow-up turn comes."""
    tier: ServiceTier = ServiceTier.DEFAULT


class Turn(msgspec.Struct):
    """A session as its client saw it. `number` counts all of a run."""

    number: int
    gateway: str
    asked_s: float
    prompt_tokens: int
    wanted_tokens: int
    outcome: Outcome = Outcome.RUNNING
    accepted_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    ended_s: float | None = None
    tokens: int = 0
    gaps_s: list[float] = []
    repairs: int = 0
    hops: int = 0
    session: SessionId | None = None
    answer: list[int] = []
    error: str | None = None


class Telling:
    """One conversation's tokens so far, and how each was first computed."""

    def __init__(self, layer_count: int) -> None:
        self._layer_count = layer_count
        self.tokens: list[int] = []
        self.phases: list[Phase] = []

    def restart(self, kept: int) -> Undisturbed:
        """A device that never failed and holds the first `kept` tokens."""
        self.tokens, self.phases = self.tokens[:kept], self.phases[:kept]
        undisturbed = Undisturbed(self._layer_count)
        for phase, run in itertools.groupby(range(kept), key=self.phases.__getitem__):
            undisturbed.feed([self.tokens[index] for index in run], phase)
        return undisturbed

    def add(self, tokens: list[int], phase: Phase) -> None:
        self.tokens += tokens
        self.phases += [phase] * len(tokens)


class SimulatedGateway:
    """One gateway of a cell."""

    def __init__(
        self, node: NodeId, seed: int, subjects: Subjects, network: SimulatedNetwork, store: Store, clock: Clock,
        layer_count: int, liveness: Liveness, on_turn: Callable[["SimulatedGateway", Turn], None],
    ) -> None:  # fmt: skip
        self.id = node
        self.turns: dict[int, Turn] = {}
        """Those that run, by number."""
        self._clock = clock
        self._layer_count = layer_count
        self._on_turn = on_turn
        self._open: dict[int, tuple[Turn, FleetConversation]] = {}
        self.peers = Peers(
            network.endpoint(node),
            clock,
            role="gateway",
            admission=OpenAdmission(),
            on_frame=self._on_frame,
            on_lost=self._on_lost,
            liveness=liveness,
        )
        self._door = Admission(AdmissionRules(), clock, GatewayMetrics())
        names = (SessionId(f"{number(seed, node, str(i)):016x}" * 2) for i in itertools.count())
        self.source = FleetTokenSource(
            network.bus(node),
            self.peers,
            store,
            clock,
            subjects,
            node,
            new_session=names.__next__,
            lease=OpenLease(),
            routes=OpenRoutes(),
        )

    def answering(self) -> list[Chain]:
        """The chains of answers of which the client has seen the first token and not the last."""
        return [conversation.chain for turn, conversation in self._open.values() if turn.first_token_s is not None]

    async def start(self) -> None:
        await self.peers.start()
        await self.source.start()

    def _on_frame(self, peer: NodeId, frame: Frame) -> None:
        self.source.on_frame(peer, frame)

    def _on_lost(self, peer: NodeId, reason: str) -> None:
        self.source.on_lost(peer, reason)

    async def serve(self, turn: Turn, model: Digest, ask: Ask, telling: Telling) -> None:
        """One session from question to end; whatever happens is in `turn`."""
        self.turns[turn.number] = turn
        try:
            async with self._door.place(ask.key, 1, len(ask.prompt)) as place:
                try:
                    await self._converse(turn, model, ask, telling)
                finally:
                    place.tokens = turn.tokens
        except Problem as problem:
            turn.outcome, turn.error = Outcome.REFUSED, f"{problem.status} {problem.body.message}"
        finally:
            self._end(turn)

    def give_up(self) -> None:
        """The run is over: sessions that still run have failed."""
        for turn in list(self.turns.values()):
            turn.outcome, turn.error = Outcome.FAILED, "it still ran when the run had ended"
            self._end(turn)

    def _end(self, turn: Turn) -> None:
        if self.turns.pop(turn.number, None) is not None:
            turn.ended_s = self._clock.monotonic_s()
            self._on_turn(self, turn)

    async def _converse(self, turn: Turn, model: Digest, ask: Ask, telling: Telling) -> None:
        conversation: FleetConversation | None = None
        try:
            conversation = await self.source.open(
                model, ask.prompt, ask.completion_tokens, GREEDY_TOP_K, ask.key, Recipe(), ask.tier
            )
            turn.accepted_s = self._clock.monotonic_s()
            turn.session = conversation.chain.session
            self._open[turn.number] = turn, conversation
            self._on_turn(self, turn)
            await self._answer(turn, conversation, ask, telling)
        except FallowError as error:
            full = isinstance(error, KvExhausted)
            if full:
                self._door.no_room()
            turn.outcome = Outcome.REFUSED if full and turn.accepted_s is None else Outcome.FAILED
            turn.error = f"{error.code}: {error.message}"
        finally:
            self._open.pop(turn.number, None)
            if conversation is not None:
                turn.repairs = conversation.chain.repairs
                turn.hops = turn.hops or len(conversation.chain.hops)
                await conversation.close(keep=ask.keep and turn.outcome is Outcome.FINISHED)

    async def _answer(self, turn: Turn, conversation: FleetConversation, ask: Ask, telling: Telling) -> None:
        right = telling.restart(conversation.cached_tokens)
        candidates = await conversation.prefill()
        turn.hops = len(conversation.chain.hops)
        fresh = list(ask.prompt[conversation.cached_tokens :])
        telling.add(fresh, Phase.PREFILL)
        expected = right.feed(fresh, Phase.PREFILL)
        altered = False
        while True:
            now_s = self._clock.monotonic_s()
            if turn.last_token_s is None:
                turn.first_token_s = now_s
                self._door.first_token(now_s - turn.asked_s)
            else:
                turn.gaps_s.append(now_s - turn.last_token_s)
                self._door.next_token(now_s - turn.last_token_s)
            turn.last_token_s = now_s
            turn.tokens += 1
            token = int(candidates.ids[0])
            turn.answer.append(token)
            altered = altered or token != expected
            if turn.tokens >= ask.completion_tokens:
                break
            telling.add([token], Phase.DECODE)
            expected = right.feed((token,), Phase.DECODE)
            candidates = await conversation.decode(token)
        turn.outcome = Outcome.ALTERED if altered else Outcome.FINISHED

    async def close(self) -> None:
        await self.source.close()
        await self.peers.close()
