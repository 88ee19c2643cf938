"""A device's data endpoint: a socket on this host, iroh from anywhere, the sealed relay where no direct path exists.

Rules
- A peer whose socket is here and ours is dialled there; when that fails, and for everybody else, the network. Only a
  socket that nobody listens on any more is final, because its process is gone.
- The direct way has a short head start over the relay, if the peer offers both (`policy/relay.py`). The first link
  that stands is taken. A direct dial that failed is remembered for a while, so that the next need not wait for it; one
  that was only late runs on, to be learnt from, and its link is let go.
- By policy the relay is never used, or nothing else is: then no port is opened and no network address is told.
- Whichever way, the peer's key is proved, so the choice changes the cost of a link and nothing else.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

from fallow.domain.errors import ConfigError, LinkClosed
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import NodeId
from fallow.fabric.accept_queue import AcceptQueue
from fallow.fabric.contract import Bus, Link, LinkEndpoint, PushLink
from fallow.fabric.iroh_link import OTHER_FABRICS, IrohEndpoint
from fallow.fabric.local_handshake import Identity
from fallow.fabric.local_link import LocalEndpoint, PeerProcessGone, supported
from fallow.fabric.sealed_endpoint import RelayEndpoint
from fallow.policy.relay import RelayUse, dial_plan

LOCAL_ATTEMPTS: Final = 2
LOCAL_RETRY_S: Final = 0.02
FAILURES_KEPT_MAX: Final = 4096
"""Peers whose direct way failed lately; the oldest are forgotten."""

log = logging.getLogger(__name__)


class CompositeEndpoint:
    """A `LinkEndpoint` that listens on every fabric it was given. Make one with `open_endpoint`."""

    def __init__(
        self,
        node: NodeId,
        *,
        local: LocalEndpoint | None = None,
        direct: LinkEndpoint | None = None,
        relay: RelayEndpoint | None = None,
        relay_use: RelayUse = RelayUse.WHEN_NEEDED,
    ) -> None:
        self._node = node
        self._local = local
        self._direct = direct
        self._relay = relay
        self._relay_use = relay_use
        self._direct_failed_s: OrderedDict[NodeId, float] = OrderedDict()
        self._attempts: set[asyncio.Task[Link]] = set()
        """Dials under way, for `DIAL_TIMEOUT_S` at most each."""
        self._accepted = AcceptQueue()
        self._endpoints: list[LinkEndpoint] = [part for part in (local, direct, relay) if part is not None]
        loop = asyncio.get_running_loop()
        self._pumps = [loop.create_task(self._pump(part.accept())) for part in self._endpoints]

    @property
    def address(self) -> PeerAddress:
        return PeerAddress(self._node, tuple(way for part in self._endpoints for way in part.address.endpoints))

    async def connect(self, address: PeerAddress) -> PushLink:
        link = await self._connect_here(address)
        if link is not None:
            return link
        failed_s = self._direct_failed_s.get(address.node)
        plan = dial_plan(
            self._relay_use,
            direct_known=self._direct is not None and _has_network_address(address),
            relay_known=self._relay is not None and self._relay.offered_by(address),
            direct_failed_s_ago=None if failed_s is None else asyncio.get_running_loop().time() - failed_s,
        )
        if plan.direct and plan.relay_after_s is not None:
            return await self._race(address, plan.relay_after_s)
        chosen = self._direct if plan.direct else self._relay if plan.relay_after_s is not None else None
        if chosen is None:
            raise LinkClosed(f"no way to {address.node[:8]} that this device may use is known")
        return cast(PushLink, await chosen.connect(address))

    def accept(self) -> AcceptQueue:
        return self._accepted

    async def close(self) -> None:
        self._accepted.close()
        tasks = [*self._pumps, *self._attempts]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for part in self._endpoints:
            await part.close()

    async def _connect_here(self, address: PeerAddress) -> PushLink | None:
        """A link to a peer on this host; `None` when there is no such way."""
        for _ in range(LOCAL_ATTEMPTS):
            if self._local is None or self._local.reaches(address) is None:
                break
            try:
                return await self._local.connect(address)
            except PeerProcessGone:
                raise  # its other endpoints went with it: dialling those would only take long
            except LinkClosed as error:
                # A process that is being killed drops its connections before it stops listening: look again.
                log.info("no local link: %s", error)
                await asyncio.sleep(LOCAL_RETRY_S)
        return None

    async def _race(self, address: PeerAddress, head_start_s: float) -> PushLink:
        """The first link that stands, direct or relayed. Raises the `LinkClosed` of the relay when neither does."""
        assert self._direct is not None and self._relay is not None
        direct = self._begin(self._direct.connect(address))
        direct.add_done_callback(partial(self._direct_ended, address.node))
        attempts = [direct]
        try:
            await asyncio.wait(attempts, timeout=head_start_s)
            if not _stands(direct):
                attempts.append(self._begin(self._relay.connect(address)))
            while not any(map(_stands, attempts)) and (running := [task for task in attempts if not task.done()]):
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            for task in attempts:
                task.cancel()
                task.add_done_callback(_discard)
            raise
        winner = next(filter(_stands, attempts), attempts[-1])
        if winner is not direct:
            self._note_failure(address.node)
            # Not cancelled: how it ends says whether the next dial may hope for it.
            direct.add_done_callback(_discard)
        elif len(attempts) > 1:
            attempts[1].cancel()
            attempts[1].add_done_callback(_discard)
        return cast(PushLink, winner.result())  # every adapter's is one

    def _begin(self, attempt: Coroutine[Any, Any, Link]) -> asyncio.Task[Link]:
        task = asyncio.get_running_loop().create_task(attempt)
        self._attempts.add(task)
        task.add_done_callback(self._attempts.discard)
        return task

    def _direct_ended(self, peer: NodeId, attempt: asyncio.Task[Link]) -> None:
        """Learn from a direct dial, also from one that was too late."""
        if attempt.cancelled():
            return
        error = attempt.exception()
        if error is None:
            self._direct_failed_s.pop(peer, None)
        else:
            log.info("no direct link to %s: %s", peer[:8], error)
            self._note_failure(peer)

    def _note_failure(self, peer: NodeId) -> None:
        self._direct_failed_s[peer] = asyncio.get_running_loop().time()
        self._direct_failed_s.move_to_end(peer)
        if len(self._direct_failed_s) > FAILURES_KEPT_MAX:
            self._direct_failed_s.popitem(last=False)

    async def _pump(self, links: AsyncIterator[Link]) -> None:
        async for accepted in links:
            link = cast(PushLink, accepted)
            if not self._accepted.offer(link):
                link.abort("too many links wait to be accepted")


def _has_network_address(address: PeerAddress) -> bool:
    return any(not way.startswith(OTHER_FABRICS) for way in address.endpoints)


def _stands(attempt: asyncio.Task[Link]) -> bool:
    return attempt.done() and attempt.exception() is None


def _discard(attempt: asyncio.Task[Link]) -> None:
    """Let go of a link that is not needed."""
    if not attempt.cancelled() and attempt.exception() is None:
        cast(PushLink, attempt.result()).abort("another way to the same peer was faster")


async def open_endpoint(
    seed: bytes,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    socket_dir: Path | None = None,
    relay: tuple[Bus, str] | None = None,
    relay_use: RelayUse = RelayUse.WHEN_NEEDED,
) -> LinkEndpoint:
    """The endpoint that nodes and gateways use. Without `socket_dir` every link is encrypted, on this host as well.

    `relay`: the bus and the cell on it, for links that no direct path carries. With `RelayUse.ONLY` neither a port nor
    a socket is opened. Raises `LinkClosed` when the port cannot be bound, `ConfigError` when the socket folder is not
    private or the policy asks for a relay that there is none of, and what `RelayEndpoint.open` raises.
    """
    if relay_use is RelayUse.ONLY and relay is None:
        raise ConfigError("links are to go over the relay only, and there is no bus to relay them")
    async with contextlib.AsyncExitStack() as opened:
        direct = local = relayed = None
        if relay_use is not RelayUse.ONLY:
            direct = await IrohEndpoint.bind(seed, host=host, port=port)
            opened.push_async_callback(direct.close)
            if socket_dir is not None and supported():
                local = await LocalEndpoint.open(seed, socket_dir)
                opened.push_async_callback(local.close)
        if relay is not None and relay_use is not RelayUse.NEVER:
            relayed = await RelayEndpoint.open(*relay, seed)
            opened.push_async_callback(relayed.close)
        opened.pop_all()
    if direct is not None and local is None and relayed is None:
        return direct
    node = Identity.from_seed(seed).node
    return CompositeEndpoint(node, local=local, direct=direct, relay=relayed, relay_use=relay_use)
