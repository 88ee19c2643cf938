"""Conversations with peers: dialling, the handshake, liveness, and which link to use.

Rules
- Nodes and gateways use the same `Peers`. Its caller sees frames and losses; `Hello`, `Credentials`, `Ping`, `Pong` and
  `Goodbye` never leave here.
- The first frame on a link is `Hello`, in both directions; anything else first closes the link. Versions are
  negotiated there (`ProtocolVersionMismatch`), and peers admitted (`not_admitted`): each side shows its passport, and a
  newer one before that runs out. Who was revoked, or shows none in time, loses its links at once.
- `on_frame` is called synchronously, in order per link, from where the bytes arrive: no task and no queue per frame.
  It must be quick. An exception in it closes that link alone.
- Two peers that dial each other at once have two links. Sending sticks to one while it lives; frames are taken from
  both. `on_lost` is called once, when the last link with a peer is gone.
- When a peer is lost is decided in `policy/liveness.py`. `close` says goodbye to everybody; the endpoint remains its
  owner's to close.
- Not here: reconnecting, addresses, and what frames mean.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Coroutine
from typing import Any, Final, cast

import msgspec

from fallow.domain.clock import Clock
from fallow.domain.credentials import Role
from fallow.domain.errors import LinkClosed
from fallow.domain.frames import PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, Frame, Hello, PeerAddress
from fallow.domain.ids import NodeId
from fallow.fabric.contract import DIAL_TIMEOUT_S, Admission, LinkEndpoint, PushLink
from fallow.fabric.peer_link import INSTANCE_PREFIX, PeerLink
from fallow.policy.liveness import Liveness, pause_s

MAX_INBOUND_LINKS: Final = 1024
MAX_LINKS_PER_PEER: Final = 4
HANDSHAKE_TIMEOUT_S: Final = 5.0
"""From the open link to the peer's `Hello`."""

log = logging.getLogger(__name__)


class Peers:
    """Every peer that this process talks to."""

    def __init__(
        self,
        endpoint: LinkEndpoint,
        clock: Clock,
        *,
        role: str,
        admission: Admission,
        on_frame: Callable[[NodeId, Frame], None],
        on_lost: Callable[[NodeId, str], None],
        capabilities: tuple[str, ...] = (),
        liveness: Liveness = Liveness(),  # noqa: B008 (frozen)
    ) -> None:
        self.own = endpoint.address.node
        """Our own id. There is no link to ourselves."""
        self._endpoint = endpoint
        self._clock = clock
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._liveness = liveness
        self._admission = admission
        self._hello = Hello(
            version_min=PROTOCOL_VERSION_MIN,
            version_max=PROTOCOL_VERSION,
            capabilities=(*capabilities, INSTANCE_PREFIX + secrets.token_hex(8)),
            role=role,
        )
        self._links: dict[NodeId, list[PeerLink]] = {}
        """Links whose handshake is done, in the order to use them."""
        self._greeting: dict[PeerLink, None] = {}
        """Links whose handshake is not done. A dict, because its order is the same in every run."""
        self._dials: dict[NodeId, asyncio.Task[PeerLink]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._inbound_count = 0
        self._closed = False

    # --- life ---

    async def start(self) -> None:
        """Accept links from peers and watch over all."""
        self._spawn(self._accept())
        self._spawn(self._watch())

    async def close(self) -> None:
        """Say goodbye to everybody. `on_lost` is not called for what we close ourselves. Idempotent."""
        if self._closed:
            return
        self._closed = True
        tasks = [*self._tasks, *self._dials.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        links = [*self._greeting, *(link for links in self._links.values() for link in links)]
        self._links.clear()
        await asyncio.gather(*(link.close("leaving", "") for link in links), return_exceptions=True)

    # --- sending ---

    def post(self, peer: NodeId, frame: Frame) -> bool:
        """Queue a frame on an open link, without waiting. False when there is none or its window is full.

        Raises `FrameError` for a frame that no peer would take: too large, or a payload where none belongs.
        """
        links = self._links.get(peer)
        return links is not None and links[0].link.post(frame)

    async def send(self, address: PeerAddress, frame: Frame) -> None:
        """Send, dialling when needed, waiting under back-pressure. Raises `LinkClosed`, `ProtocolVersionMismatch`."""
        links = self._links.get(address.node)
        link = links[0] if links else await self._dial_once(address)
        if not link.link.post(frame):
            await link.link.send(frame)

    async def connect(self, address: PeerAddress) -> None:
        """Have an open link with a peer. Raises `LinkClosed` or `ProtocolVersionMismatch`."""
        if address.node not in self._links:
            await self._dial_once(address)

    # --- what is known of peers ---

    def connected(self) -> frozenset[NodeId]:
        """Peers with an open link whose handshake is done."""
        return frozenset(self._links)

    def rtt_s(self, peer: NodeId) -> float | None:
        """Round trip to a peer, smoothed, as measured by our own pings; `None` before the first."""
        return next((link.rtt_s for link in self._links.get(peer, ()) if link.rtt_s is not None), None)

    def role(self, peer: NodeId) -> Role | None:
        """What a peer with an open link is, by its passport."""
        links = self._links.get(peer)
        return links[0].role if links else None

    def computes(self, peer: NodeId) -> bool:
        """Whether a peer with an open link is a device, by its passport."""
        links = self._links.get(peer)
        return links is not None and links[0].computes

    def drop(self, peer: NodeId, why: str) -> None:
        """Close every link with a peer that is not welcome any more (`not_admitted`)."""
        for link in [*self._links.get(peer, ()), *(link for link in self._greeting if link.peer == peer)]:
            link.expel(why)

    async def probe(self, peer: NodeId, timeout_s: float) -> bool:
        """Ask a peer for a sign of life. Without one in time its links are dropped, `on_lost` is called: false."""
        links = list(self._links.get(peer, ()))
        if not links:
            return False
        if await links[0].answers(timeout_s):
            return True
        # Only what was asked is condemned: a link opened meanwhile has proved itself.
        for link in links:
            link.drop(f"no answer to a probe within {timeout_s} s")
        return False

    # --- dialling and accepting ---

    async def _dial_once(self, address: PeerAddress) -> PeerLink:
        if self._closed:
            raise LinkClosed("this side is closing its links")
        dial = self._dials.get(address.node)
        if dial is None:
            dial = asyncio.get_running_loop().create_task(self._dial(address))
            self._dials[address.node] = dial
            dial.add_done_callback(lambda done: self._dialled(address.node, done))
        try:
            # Shielded: others may wait for the same attempt.
            return await asyncio.shield(dial)
        except asyncio.CancelledError:
            ours = asyncio.current_task()
            if dial.cancelled() and not (ours is not None and ours.cancelling()):
                raise LinkClosed("this side is closing its links") from None
            raise

    def _dialled(self, peer: NodeId, dial: asyncio.Task[PeerLink]) -> None:
        self._dials.pop(peer, None)
        if not dial.cancelled():
            dial.exception()  # retrieved, in case that every waiter was cancelled

    async def _dial(self, address: PeerAddress) -> PeerLink:
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                opened = await self._endpoint.connect(address)
        except TimeoutError:
            raise LinkClosed(f"{address.node[:8]} did not answer within {DIAL_TIMEOUT_S} s") from None
        if opened.peer != address.node:
            await opened.close("wrong_peer", "")
            raise LinkClosed(f"expected {address.node[:8]} at its address, found {opened.peer[:8]}")
        link = self._adopt(opened)
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                await link.greeted
        except TimeoutError:
            link.drop(f"no hello within {HANDSHAKE_TIMEOUT_S} s")
            raise LinkClosed(f"{address.node[:8]} did not say hello within {HANDSHAKE_TIMEOUT_S} s") from None
        except asyncio.CancelledError:
            link.drop("dial cancelled")
            raise
        return link

    async def _accept(self) -> None:
        async for opened in self._endpoint.accept():
            if self._inbound_count >= MAX_INBOUND_LINKS or self._links_with(opened.peer) >= MAX_LINKS_PER_PEER:
                log.warning("refusing a link from %s: too many are open", opened.peer[:8])
                self._spawn(opened.close("too_many_links", "too many links are open"))
                continue
            link = self._adopt(opened)
            self._inbound_count += 1
            link.ended.add_done_callback(self._inbound_gone)
            # A peer that connects and says nothing must not hold a place for ever.
            asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT_S, link.drop_unless_greeted)

    def _inbound_gone(self, _: asyncio.Future[str]) -> None:
        self._inbound_count -= 1

    def _links_with(self, peer: NodeId) -> int:
        return len(self._links.get(peer, ())) + sum(link.peer == peer for link in self._greeting)

    def _adopt(self, opened: object) -> PeerLink:
        link = PeerLink(cast(PushLink, opened), self._clock, self._liveness, self._admission)
        self._greeting[link] = None
        hello = msgspec.structs.replace(self._hello, passport=self._admission.passport)
        link.open(hello, self._on_frame, self._greeted, self._ended)
        return link

    # --- events of links ---

    def _greeted(self, link: PeerLink) -> None:
        self._greeting.pop(link, None)
        for older in list(self._links.get(link.peer, ())):
            # The peer's process is a new one: what it knew is gone, so its loss is reported before its return.
            if older.instance != link.instance:
                older.drop("the peer's process was restarted")
        self._links.setdefault(link.peer, []).append(link)

    def _ended(self, link: PeerLink, reason: str) -> None:
        self._greeting.pop(link, None)
        links = self._links.get(link.peer)
        if links is None or link not in links:
            return
        links.remove(link)
        if links:
            return
        del self._links[link.peer]
        try:
            self._on_lost(link.peer, reason)
        except Exception:
            log.exception("handling the loss of %s failed", link.peer)

    # --- liveness ---

    async def _watch(self) -> None:
        previous_s = self._clock.monotonic_s()
        while True:
            await self._clock.sleep(self._liveness.tick_s)
            now_s = self._clock.monotonic_s()
            paused_s = pause_s(previous_s, now_s, self._liveness)
            previous_s = now_s
            for links in list(self._links.values()):
                for link in list(links):
                    link.tick(now_s, paused_s)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        with contextlib.suppress(asyncio.CancelledError):
            error = task.exception()
            if error is not None:
                log.error("a task of the links failed", exc_info=error)
