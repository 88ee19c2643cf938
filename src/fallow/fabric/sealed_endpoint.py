"""A device's presence on the relay: links to peers that no direct path leads to, over the bus, sealed end to end.

Rules
- A device listens on `fallow.<cell>.relay.<its NodeId>.*` and sends to the receiver's subject under its own id. The bus
  holds everybody to their own id; nothing here relies on it (`sealing.py`).
- Dialling is one request and its answer; the dialler's proof goes out before its first frame. When nobody listens, the
  bus says so at once.
- What strangers can make this device hold is bounded: `HANDSHAKES_MAX` at a time, a few of them per sender, each for
  `HANDSHAKE_TIMEOUT_S`. A message of no link that is known is dropped without an answer.
- A peer's address offers the relay as `relay:<cell>`. Only devices of one cell reach each other here.
- The bus remains its owner's to close.
"""

import asyncio
import logging
from functools import partial
from typing import Final

from fallow.domain.errors import BusTimeout, BusUnavailable, FabricError, LinkClosed, PassportRefused, SealBroken
from fallow.domain.fleet import Subjects
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import NodeId
from fallow.fabric.accept_queue import AcceptQueue
from fallow.fabric.contract import DIAL_TIMEOUT_S, Bus, Subscription
from fallow.fabric.local_handshake import Identity
from fallow.fabric.sealed_link import SealedLink
from fallow.fabric.sealing import HEAD_BYTES, Dialler, Kind, Listener, Seals, busy, parse_head, record_head
from fallow.policy.relay import window_bytes

SCHEME: Final = "relay:"
HANDSHAKE_TIMEOUT_S: Final = 5.0
HANDSHAKES_MAX: Final = 64
HANDSHAKES_PER_SENDER_MAX: Final = 4
LINKS_MAX: Final = 1024
LINKS_PER_PEER_MAX: Final = 8
CLOSE_FLUSH_S: Final = 1.0
"""How long `close` waits until every peer was told."""

log = logging.getLogger(__name__)


class RelayEndpoint:
    """A `LinkEndpoint` over the bus. Make one with `open`."""

    def __init__(self, bus: Bus, cell: str, identity: Identity) -> None:
        self._bus = bus
        self._cell = cell
        self._identity = identity
        self._subjects = Subjects(cell)
        self._accepted = AcceptQueue()
        self._subscription: Subscription | None = None
        self._handshakes: dict[tuple[NodeId, bytes], Listener | None] = {}
        """By sender and link id; `None` for one that failed: it counts until its time is up, as floods must."""
        self._links: dict[tuple[NodeId, bytes], SealedLink] = {}
        """By sender and what every record of the link begins with."""
        self._closed = False

    @classmethod
    async def open(cls, bus: Bus, cell: str, seed: bytes) -> "RelayEndpoint":
        """Listen in `cell` as the owner of the Ed25519 seed (32 bytes).

        Raises `BusUnavailable`, and `PassportRefused` when the bus does not let this device listen there.
        """
        endpoint = cls(bus, cell, Identity.from_seed(seed))
        endpoint._subscription = await bus.subscribe(
            endpoint._subjects.relay(endpoint._identity.node, "*"), endpoint._arrived
        )
        return endpoint

    @property
    def address(self) -> PeerAddress:
        return PeerAddress(self._identity.node, (SCHEME + self._cell,))

    def offered_by(self, address: PeerAddress) -> bool:
        """Whether a peer can be dialled here."""
        return SCHEME + self._cell in address.endpoints and address.node != self._identity.node

    async def connect(self, address: PeerAddress) -> SealedLink:
        if self._closed:
            raise LinkClosed("this side is closing its links")
        if not self.offered_by(address):
            raise LinkClosed(f"{address.node[:8]} is not on the relay of cell {self._cell}")
        if len(self._links) >= LINKS_MAX:
            raise LinkClosed("too many links are open over the relay")
        dialler = Dialler(self._identity, address.node, self._cell)
        subject = self._subjects.relay(address.node, self._identity.node)
        try:
            answer = await self._bus.request(subject, dialler.dial, DIAL_TIMEOUT_S)
        except BusTimeout:
            raise LinkClosed(f"{address.node[:8]} did not answer within {DIAL_TIMEOUT_S} s over the relay") from None
        except (BusUnavailable, PassportRefused) as error:
            raise LinkClosed(f"cannot reach {address.node[:8]} over the relay: {error.message}") from None
        confirm, seals = dialler.answered(answer)
        if self._closed:
            raise LinkClosed("this side is closing its links")
        return self._adopt(seals, confirm)

    def accept(self) -> AcceptQueue:
        return self._accepted

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._accepted.close()
        self._handshakes.clear()
        if self._subscription is not None:
            await self._subscription.cancel()
        links = list(self._links.values())
        for link in links:
            link.abort("this side closed its relay")
        if links:
            _, late = await asyncio.wait([link.writer for link in links], timeout=CLOSE_FLUSH_S)
            for writer in late:
                writer.cancel()

    # --- what the bus brings ---

    async def _arrived(self, subject: str, message: bytes) -> bytes | None:
        sender = NodeId(subject.rpartition(".")[2])
        link = self._links.get((sender, message[:HEAD_BYTES]))
        if link is not None:
            link.arrived(message)
            return None
        try:
            head = parse_head(message)
            if head.kind is Kind.DIAL:
                return self._dialled(sender, head.link_id, message)
            if head.kind is Kind.CONFIRM:
                self._confirmed(sender, head.link_id, message)
        except FabricError as error:
            log.info("a relayed link from %s was not set up: %s", sender[:8], error)
        return None

    def _dialled(self, sender: NodeId, link_id: bytes, dial: bytes) -> bytes | None:
        key = (sender, link_id)
        if key in self._handshakes or (sender, record_head(link_id)) in self._links or self._closed:
            return None
        if not self._has_room(sender):
            return busy(link_id)
        self._handshakes[key] = None
        asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT_S, self._handshakes.pop, key, None)
        listener = self._handshakes[key] = Listener(self._identity, self._cell, sender, dial)
        return listener.answer

    def _has_room(self, sender: NodeId) -> bool:
        handshakes = sum(who == sender for who, _ in self._handshakes)
        links = sum(who == sender for who, _ in self._links)
        return (
            len(self._handshakes) < HANDSHAKES_MAX
            and handshakes < HANDSHAKES_PER_SENDER_MAX
            and len(self._links) < LINKS_MAX
            and links < LINKS_PER_PEER_MAX
        )

    def _confirmed(self, sender: NodeId, link_id: bytes, confirm: bytes) -> None:
        listener = self._handshakes.get((sender, link_id))
        if listener is None:
            raise SealBroken("expected a handshake that is under way, got the end of another")
        self._handshakes[(sender, link_id)] = None
        seals = listener.confirmed(confirm)
        del self._handshakes[(sender, link_id)]
        link = self._adopt(seals, None)
        if not self._accepted.offer(link):
            link.abort("too many links wait to be accepted")

    # --- links ---

    def _adopt(self, seals: Seals, opening: bytes | None) -> SealedLink:
        publish = partial(self._bus.publish, self._subjects.relay(seals.peer, self._identity.node))
        link = SealedLink(seals, publish, self._window_bytes, self._gone, opening)
        self._links[(seals.peer, record_head(seals.link_id))] = link
        return link

    def _window_bytes(self) -> int:
        return window_bytes(len(self._links))

    def _gone(self, link: SealedLink) -> None:
        self._links.pop((link.peer, record_head(link.link_id)), None)
