"""Data links over iroh: QUIC between devices that know each other by public key, encrypted end to end.

Rules
- A link is one connection with one bidirectional stream. The dialler opens the stream with one byte (`PREAMBLE`),
  because QUIC tells the other side of a stream only once something is on it.
- iroh authenticates: a connection's remote id is the key that the peer proved, and dialling an id reaches that key or
  nobody. A device's id is the public key of its 32-byte Ed25519 seed.
- No relay and no discovery service is ever called. One thing cannot be switched off from Python: at bind, iroh sends
  one UPnP/SSDP multicast packet into the local network.
- iroh takes half a minute to notice a dead peer; `Peers` notices earlier, and dialling has a timeout here.
- Not here: framing and back-pressure (`link_core.py`), and how bytes cross into Rust (`iroh_fast.py`).
"""

import asyncio
import contextlib
import logging
import re
import socket
from collections import deque
from typing import Any, Final

import iroh

from fallow.domain.errors import LinkClosed
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import NodeId
from fallow.fabric import iroh_fast
from fallow.fabric.accept_queue import AcceptQueue
from fallow.fabric.codec import Buffer
from fallow.fabric.contract import DIAL_TIMEOUT_S
from fallow.fabric.iroh_stock import StockReader, StockWriter
from fallow.fabric.link_core import LinkCore

ALPN: Final = b"fallow/1"
PREAMBLE: Final = b"\x01"
READ_BYTES: Final = 256 * 1024
WRITE_BYTES: Final = 64 * 1024
"""Queued frames are joined into writes of about this size; a larger payload is cut into pieces of four times it."""
WRITES_PER_PASS: Final = 8
"""Writes that one link may do in a row before others get their turn."""
MAX_PENDING_INBOUND: Final = 64
"""Inbound connections that are being set up at once; more are refused."""
OTHER_FABRICS: Final = ("unix:", "relay:")
"""Endpoints that are no network addresses."""
CLOSE_TIMEOUT_S: Final = 1.0
"""iroh waits for dead peers to confirm; nobody needs that."""

log = logging.getLogger(__name__)


class _Loopback(iroh.Preset):
    """Binds to this host's loopback interface and nothing else."""

    def __init__(self, port: int) -> None:
        self._port = port

    def apply(self, builder: Any) -> None:
        builder.apply_minimal()
        builder.relay_mode(iroh.RelayMode.disabled())
        builder.bind_addr(f"127.0.0.1:{self._port}")
        if _has_ipv6_loopback():
            builder.bind_addr("[::1]:0")  # or iroh would bind every interface's IPv6 address


def _has_ipv6_loopback() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


class IrohEndpoint:
    """A `LinkEndpoint` over iroh. Make one with `bind`."""

    def __init__(self, endpoint: Any, loopback_only: bool) -> None:
        self._endpoint = endpoint
        self._loopback_only = loopback_only
        self._node = NodeId(str(endpoint.id()))
        self._accepted = AcceptQueue()
        self._pending: set[asyncio.Task[None]] = set()
        self._closed = False
        self._acceptor = asyncio.get_running_loop().create_task(self._accept_all())

    @classmethod
    async def bind(cls, seed: bytes, *, host: str = "127.0.0.1", port: int = 0) -> "IrohEndpoint":
        """Listen as the device whose 32-byte Ed25519 seed this is. Raises `LinkClosed` when binding fails.

        `host` 127.0.0.1 keeps to the loopback interface; 0.0.0.0 is reachable on every interface.
        """
        iroh_fast.enable()
        loopback_only = host in ("127.0.0.1", "localhost")
        options = iroh.EndpointOptions(
            preset=_Loopback(port) if loopback_only else iroh.preset_minimal(),
            secret_key=seed,
            alpns=[ALPN],
            relay_mode=iroh.RelayMode.disabled(),
            bind_addr=None if loopback_only else f"{host}:{port}",
        )
        try:
            return cls(await iroh.Endpoint.bind(options), loopback_only)
        except iroh.IrohError as error:
            raise LinkClosed(f"cannot open a data endpoint on {host}:{port}: {_words(error)}") from None

    @property
    def address(self) -> PeerAddress:
        found = self._endpoint.bound_sockets() if self._loopback_only else self._endpoint.addr().direct_addresses()
        return PeerAddress(self._node, tuple(found))

    async def connect(self, address: PeerAddress) -> "IrohLink":
        direct = [endpoint for endpoint in address.endpoints if not endpoint.startswith(OTHER_FABRICS)]
        if not direct:
            raise LinkClosed(f"no network address of {address.node[:8]} is known")
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                target = iroh.EndpointAddr(iroh.EndpointId.from_string(address.node), None, direct)
                connection = await self._endpoint.connect(target, ALPN)
                stream = await connection.open_bi()
                await stream.send().write_all(PREAMBLE)
        except TimeoutError:
            raise LinkClosed(f"{address.node[:8]} did not answer within {DIAL_TIMEOUT_S} s") from None
        except iroh.IrohError as error:
            raise LinkClosed(f"cannot reach {address.node[:8]}: {_words(error)}") from None
        return IrohLink(connection, stream)

    def accept(self) -> AcceptQueue:
        return self._accepted

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._accepted.close()
        tasks = [self._acceptor, *self._pending]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._endpoint.close()

    async def _accept_all(self) -> None:
        while (incoming := await self._endpoint.accept_next()) is not None:
            if len(self._pending) >= MAX_PENDING_INBOUND:
                await incoming.refuse()
                continue
            task = asyncio.get_running_loop().create_task(self._accept_one(incoming))
            self._pending.add(task)
            task.add_done_callback(self._pending.discard)

    async def _accept_one(self, incoming: Any) -> None:
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                connection = await (await incoming.accept()).connect()
                stream = await connection.accept_bi()
                if await stream.recv().read_exact(len(PREAMBLE)) != PREAMBLE:
                    connection.close(1, b"unknown preamble")
                    return
        except (iroh.IrohError, TimeoutError) as error:
            # A dialler that speaks something else, or nothing, must not end the accepting.
            log.info("an inbound connection was not set up: %s", _words(error))
            return
        link = IrohLink(connection, stream)
        if not self._accepted.offer(link):
            link.abort("too many links wait to be accepted")


class IrohLink(LinkCore):
    """One connection. Frames queue here until iroh takes them."""

    def __init__(self, connection: Any, stream: Any) -> None:
        super().__init__(NodeId(str(connection.remote_id())))
        self._connection = connection
        self._send_stream = stream.send()
        fast = iroh_fast.enable()
        reader, writer = (iroh_fast.FastReader, iroh_fast.FastWriter) if fast else (StockReader, StockWriter)
        self._reader: Any = reader(stream.recv(), READ_BYTES, self._arrived, self._failed)
        self._writer: Any = writer(self._send_stream, self._written, self._failed)
        self._queue: deque[Buffer] = deque()
        self._queued_bytes = 0
        self._in_flight_bytes = 0
        self._flush_scheduled = False
        self._flushed: asyncio.Future[None] | None = None
        self._dropped = False
        self._reader.start()

    # --- writing ---

    def _write(self, head: bytes, payload: Buffer) -> None:
        if len(payload) <= WRITE_BYTES:
            self._enqueue(b"".join((head, payload)))
        else:
            self._enqueue(head)
            view = memoryview(payload).cast("B")
            for start in range(0, len(view), 4 * WRITE_BYTES):
                self._enqueue(view[start : start + 4 * WRITE_BYTES])
        # The first frame goes out at once; what follows in the same pass of the loop is joined.
        if not self._flush_scheduled and not self._in_flight_bytes:
            self._schedule_flush()
            self._flush()

    def _enqueue(self, data: Buffer) -> None:
        self._queue.append(data)
        self._queued_bytes += len(data)

    def _schedule_flush(self) -> None:
        self._flush_scheduled = True
        self._loop.call_soon(self._flush_later)

    def _flush_later(self) -> None:
        self._flush_scheduled = False
        if not self._in_flight_bytes:
            self._flush()

    def _flush(self) -> None:
        """Write until iroh takes no more, the queue is empty, or others deserve a turn."""
        for _ in range(WRITES_PER_PASS):
            if not self._queue or self._dropped:
                break
            data = self._next_write()
            self._in_flight_bytes = len(data)
            if not self._writer.write(data):
                break
            self._taken()
        else:
            if not self._flush_scheduled:
                self._schedule_flush()
        # Here and not only when a write was waited for: iroh may have taken a whole window at once.
        self._room()

    def _next_write(self) -> bytes:
        pieces: list[Buffer] = []
        size = 0
        while self._queue and (not pieces or size + len(self._queue[0]) <= WRITE_BYTES):
            pieces.append(self._queue.popleft())
            size += len(pieces[-1])
        first = pieces[0]
        return first if len(pieces) == 1 and type(first) is bytes else b"".join(pieces)

    def _written(self) -> None:
        self._taken()
        self._flush()

    def _taken(self) -> None:
        self._queued_bytes -= self._in_flight_bytes
        self._in_flight_bytes = 0
        if not self._queue and self._flushed is not None and not self._flushed.done():
            self._flushed.set_result(None)

    def _unsent_bytes(self) -> int:
        return self._queued_bytes

    # --- reading ---

    def _arrived(self, data: bytes) -> None:
        if data:
            self._data(data)
        else:
            self._eof()

    def _failed(self, error: Exception) -> None:
        self._ended(LinkClosed(f"the connection broke: {_words(error)}"))
        if self._flushed is not None and not self._flushed.done():
            self._flushed.set_result(None)

    def _hold_reading(self) -> None:
        self._reader.pause()

    def _resume_reading(self) -> None:
        self._reader.resume()

    # --- closing ---

    async def _finish(self) -> None:
        if self._queue or self._in_flight_bytes:
            self._flushed = self._loop.create_future()
            self._flush_later()
            await self._flushed
        with contextlib.suppress(iroh.IrohError):
            await self._send_stream.finish()
            # Closing the connection at once would discard what is still under way; the peer closes it once it has
            # read our goodbye.
            await self._connection.closed()

    def _drop(self) -> None:
        if self._dropped:
            return
        self._dropped = True
        self._queue.clear()
        self._queued_bytes = 0
        self._reader.stop()
        self._writer.stop()
        with contextlib.suppress(iroh.IrohError):
            self._connection.close(0, b"")


def _words(error: Exception) -> str:
    """An error of the binding in one line, without the places in Rust source that it names."""
    if not isinstance(error, iroh.IrohError):
        return type(error).__name__
    return " ".join(re.sub(r"\(\S+\.rs:\d+:\d+\)", "", error.message()).split())
