"""A device's data endpoint: reachable on this host through a socket, and from anywhere through iroh.

Rules: a peer whose socket is here and ours is dialled there; when that fails, and for everybody else, iroh. Only a
socket that nobody listens on any more is final, because its process is gone. Either way the peer's key is proved, so
the choice changes the cost of a link and nothing else.
"""

import asyncio
import logging
from pathlib import Path
from typing import Final

from fallow.domain.errors import LinkClosed
from fallow.domain.frames import PeerAddress
from fallow.fabric.accept_queue import AcceptQueue
from fallow.fabric.contract import PushLink
from fallow.fabric.iroh_link import IrohEndpoint
from fallow.fabric.local_link import LocalEndpoint, PeerProcessGone, socket_path, supported

LOCAL_ATTEMPTS: Final = 2
LOCAL_RETRY_S: Final = 0.02

log = logging.getLogger(__name__)


class CompositeEndpoint:
    """A `LinkEndpoint` that listens on both transports. Make one with `open`."""

    def __init__(self, local: LocalEndpoint, remote: IrohEndpoint) -> None:
        self._local = local
        self._remote = remote
        self._accepted = AcceptQueue()
        loop = asyncio.get_running_loop()
        self._pumps = [loop.create_task(self._pump(endpoint.accept())) for endpoint in (local, remote)]

    @property
    def address(self) -> PeerAddress:
        remote = self._remote.address
        return PeerAddress(remote.node, (*self._local.address.endpoints, *remote.endpoints))

    async def connect(self, address: PeerAddress) -> PushLink:
        for _ in range(LOCAL_ATTEMPTS):
            if socket_path(address) is None:
                break
            try:
                return await self._local.connect(address)
            except PeerProcessGone:
                raise  # its other endpoint went with it: dialling that would only take long
            except LinkClosed as error:
                # A process that is being killed drops its connections before it stops listening: look again.
                log.info("no local link: %s", error)
                await asyncio.sleep(LOCAL_RETRY_S)
        return await self._remote.connect(address)

    def accept(self) -> AcceptQueue:
        return self._accepted

    async def close(self) -> None:
        self._accepted.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        await self._local.close()
        await self._remote.close()

    async def _pump(self, links: AcceptQueue) -> None:
        async for link in links:
            if not self._accepted.offer(link):
                link.abort("too many links wait to be accepted")


async def open_endpoint(
    seed: bytes, *, host: str = "127.0.0.1", port: int = 0, socket_dir: Path | None = None
) -> CompositeEndpoint | IrohEndpoint:
    """The endpoint that nodes and gateways use. Without `socket_dir` every link is encrypted, on this host as well.

    Raises `LinkClosed` when the port cannot be bound and `ConfigError` when the socket folder is not private.
    """
    remote = await IrohEndpoint.bind(seed, host=host, port=port)
    if socket_dir is None or not supported():
        return remote
    try:
        return CompositeEndpoint(await LocalEndpoint.open(seed, socket_dir), remote)
    except BaseException:
        await remote.close()
        raise
