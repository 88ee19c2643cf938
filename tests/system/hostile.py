"""What the hostile tests share: strangers with fresh identities, and the neighbour that must not notice them.

A stranger dials real processes over the real links, local socket or iroh. `RawLink` puts any bytes on the wire;
`Tenant` speaks the protocol like a gateway, so that it can misuse it. `Neighbour` streams greedy answers through the
API all the while, each of which must equal the undisturbed one.
"""

import asyncio
import contextlib
import secrets
import struct
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np
import psutil

from fallow.domain.errors import LinkClosed
from fallow.domain.fleet import Catalogue, Hop, RouteReply, RouteRequest, Subjects
from fallow.domain.frames import (
    CloseSession,
    Fault,
    Flow,
    Frame,
    Header,
    Hello,
    OpenStage,
    PeerAddress,
    Phase,
    Refused,
    Result,
    Rows,
    StageState,
)
from fallow.domain.ids import Digest, NodeId, SessionId
from fallow.fabric.contract import PushLink
from fallow.fabric.iroh_link import IrohEndpoint
from fallow.fabric.local_link import LocalEndpoint
from fallow.fabric.nats_bus import NatsBus
from fallow.fabric.peers import Peers
from fallow.processes.local_service import LocalService
from fallow.processes.runfile import running
from fallow.system_clock import SystemClock
from fallow.trust.open_doors import OpenAdmission
from tests.system.harness import Answer, ask

PREFIX = struct.Struct("<II")
ANSWER_LIMIT_S = 20.0
TRANSPORTS = ("local", "iroh")
HELLO = Hello(version_min=1, version_max=1)


# --- the neighbour ------------------------------------------------------------------------------


class Neighbour:
    """Asks the same question again and again while the block lasts; `check` compares every answer."""

    def __init__(self, url: str, key: str | None, question: str, tokens: int, expected: Answer) -> None:
        self._ask = (url, question, tokens, key)
        self._expected = expected
        self._first_piece = threading.Event()
        self._over = threading.Event()
        self._news = threading.Condition()
        self._answers: list[Answer] = []
        self._thread = threading.Thread(target=self._talk)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._first_piece.wait(ANSWER_LIMIT_S), f"the neighbour got no answer: {self._answers}"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        if error is None:
            self._compare()

    def check(self) -> None:
        """Wait for the answer that streams now; it and all before it are what was expected."""
        with self._news:
            until = len(self._answers) + 1
            came = self._news.wait_for(
                lambda: len(self._answers) >= until or not self._thread.is_alive(), ANSWER_LIMIT_S
            )
        assert came, "the neighbour's answer does not end"
        self._compare()

    def _compare(self) -> None:
        assert self._answers
        for answer in self._answers:
            assert answer.error is None
            assert answer.text == self._expected.text

    def _talk(self) -> None:
        while not self._over.is_set():
            answer = ask(*self._ask, on_piece=lambda _: self._first_piece.set())
            with self._news:
                self._answers.append(answer)
                self._news.notify_all()
            if answer.error is not None:
                self._first_piece.set()
                return


# --- whom to attack -----------------------------------------------------------------------------


class Targets(msgspec.Struct, frozen=True):
    """Where everybody is: the stages of the one chain, in order, and the gateway."""

    model: Digest
    hidden_size: int
    vocab_size: int
    hops: tuple[Hop, ...]
    gateway: PeerAddress

    @property
    def first(self) -> Hop:
        return self.hops[0]

    @property
    def last(self) -> Hop:
        return self.hops[-1]


def find_targets(service: LocalService) -> Targets:
    """What the coordinator tells a gateway."""
    return asyncio.run(_find_targets(service))


async def _find_targets(service: LocalService) -> Targets:
    found = running(service.state_dir)
    assert found is not None
    subjects = Subjects(found.cell)
    bus = await NatsBus.connect(found.bus_url, "hostile-tests")
    try:
        catalogue = msgspec.json.decode(await bus.request(subjects.catalogue, b"", 5.0), type=Catalogue)
        [entry] = catalogue.models
        asked = RouteRequest(model=entry.model, session=new_session(), reserve_tokens=64)
        answer = await bus.request(subjects.route("hostile-tests"), msgspec.json.encode(asked), 5.0)
        route = msgspec.json.decode(answer, type=RouteReply)
    finally:
        await bus.close()
    assert route.hops, route.error
    return Targets(
        model=entry.model,
        hidden_size=entry.config.hidden_size,
        vocab_size=entry.config.vocab_size,
        hops=route.hops,
        gateway=catalogue.stores[0],
    )


def resident_bytes(service: LocalService) -> dict[str, int]:
    """Resident memory of every process of the service, by its command and id."""
    sizes: dict[str, int] = {}
    for process in [*psutil.Process(service.pid).children(recursive=True), psutil.Process(service.pid)]:
        with contextlib.suppress(psutil.Error):
            sizes[f"{process.pid} {' '.join(process.cmdline()[1:5])}"] = process.memory_info().rss
    return sizes


# --- strangers ----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def endpoint(transport: str, folder: Path) -> AsyncIterator[Any]:
    """A `LinkEndpoint` of a fresh identity."""
    seed = secrets.token_bytes(32)
    opened = await (LocalEndpoint.open(seed, folder) if transport == "local" else IrohEndpoint.bind(seed))
    try:
        yield opened
    finally:
        await opened.close()


@contextlib.asynccontextmanager
async def dialled(address: PeerAddress, transport: str, folder: Path) -> AsyncIterator[PushLink]:
    """A link of a fresh identity on which nothing was said yet."""
    async with endpoint(transport, folder) as here:
        link = await here.connect(address)
        try:
            yield link
        finally:
            link.abort("the test is over")


def put(link: PushLink, data: bytes) -> None:
    """Bytes on the wire, whatever they are."""
    link._write(data, b"")  # type: ignore[attr-defined]


def frame_bytes(header: bytes, payload: bytes = b"") -> bytes:
    return PREFIX.pack(PREFIX.size + len(header) + len(payload), len(header)) + header + payload


async def farewell(link: PushLink, limit_s: float = ANSWER_LIMIT_S) -> str:
    """Read until the other side ends the link; its words."""
    async with asyncio.timeout(limit_s):
        while True:
            try:
                await link.receive()
            except LinkClosed as closed:
                return closed.message


class Tenant:
    """A stranger that speaks the protocol: it opens sessions of its own at devices, as gateways do."""

    def __init__(self, here: Any) -> None:
        self._arrived: list[tuple[NodeId, Frame]] = []
        self._news = asyncio.Event()
        self.lost: list[str] = []
        self.peers = Peers(
            here,
            SystemClock(),
            role="gateway",
            admission=OpenAdmission(),
            on_frame=self._on_frame,
            on_lost=lambda _, reason: self.lost.append(reason),
        )

    def _on_frame(self, peer: NodeId, frame: Frame) -> None:
        self._arrived.append((peer, frame))
        self._news.set()

    async def say(self, address: PeerAddress, header: Any, payload: bytes = b"") -> None:
        await self.peers.send(address, Frame(header, payload))

    async def hear(self, *kinds: type[Header], session: SessionId | None = None) -> Frame:
        """The next frame of these kinds; others that came before it are dropped."""
        async with asyncio.timeout(ANSWER_LIMIT_S):
            while True:
                self._news.clear()
                while self._arrived:
                    _, frame = self._arrived.pop(0)
                    if isinstance(frame.header, kinds) and session in (None, getattr(frame.header, "session", None)):
                        return frame
                await self._news.wait()

    async def open(
        self, hop: Hop, targets: Targets, session: SessionId, reserve_tokens: int = 64, epoch: int = 1
    ) -> StageState | Refused:
        opening = OpenStage(
            session=session, epoch=epoch, model=targets.model, span=hop.span, reserve_tokens=reserve_tokens
        )
        await self.say(hop.address, opening)
        header = (await self.hear(StageState, Refused, session=session)).header
        assert isinstance(header, StageState | Refused)
        return header

    async def open_chain(self, targets: Targets, session: SessionId, reserve_tokens: int = 64, epoch: int = 1) -> None:
        """Open every stage and let rows flow from the first to the last."""
        hops = targets.hops
        for hop in hops:
            state = await self.open(hop, targets, session, reserve_tokens, epoch)
            assert isinstance(state, StageState), state
        for index, hop in enumerate(hops):
            flow = Flow(
                session=session,
                epoch=epoch,
                previous=hops[index - 1].address.node if index else None,
                next=hops[index + 1].address if index + 1 < len(hops) else None,
                forward_from=0,
                results_from=0,
            )
            await self.say(hop.address, flow)

    async def feed(
        self, targets: Targets, session: SessionId, position: int, tokens: Sequence[int], epoch: int = 1
    ) -> None:
        """Token rows to the first stage; logits for the last of them."""
        phase = Phase.PREFILL if len(tokens) > 1 else Phase.DECODE
        header = rows(session, position, len(tokens), epoch, phase, logits_from=position + len(tokens) - 1)
        await self.say(targets.first.address, header, np.asarray(tokens, np.int32).tobytes())

    async def token(self, session: SessionId) -> int:
        """The best next token of the next result."""
        frame = await self.hear(Result, Fault, session=session)
        assert isinstance(frame.header, Result), frame.header
        return int(np.frombuffer(frame.payload, np.int32, 1)[0])

    async def close_session(self, targets: Targets, session: SessionId) -> None:
        for hop in targets.hops:
            await self.say(hop.address, CloseSession(session=session))


def rows(
    session: SessionId,
    position: int,
    count: int,
    epoch: int = 1,
    phase: Phase = Phase.PREFILL,
    logits_from: int = 0,
    top_k: int | None = 1,
) -> Rows:
    return Rows(
        session=session,
        epoch=epoch,
        position=position,
        count=count,
        phase=phase,
        logits_from=logits_from,
        top_k=top_k,
    )


def new_session() -> SessionId:
    return SessionId(secrets.token_hex(16))


@contextlib.asynccontextmanager
async def tenant(transport: str, folder: Path) -> AsyncIterator[Tenant]:
    async with endpoint(transport, folder) as here:
        stranger = Tenant(here)
        await stranger.peers.start()
        try:
            yield stranger
        finally:
            await stranger.peers.close()
