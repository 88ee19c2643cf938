"""Data links between processes of one user on one host: a Unix domain socket.

Several nodes on one host, or a gateway beside a node, need no network between them: a socket costs a tenth of QUIC.

Why the wire is not encrypted here: bytes pass through the kernel alone. The socket lies in a folder of mode 0700, so
only the same user (and root) can reach it, and whoever acts as that user can read these processes' memory, keys
included. Encryption would protect from nobody. It can be switched off in the configuration all the same.

Rules
- Both sides prove their ids before the first frame (`local_handshake.py`), so that one local process cannot claim
  another's id by mistake or malice. On Linux the kernel is asked for the peer's user as well.
- The endpoint's address is `unix:` and the socket's path. Sockets that an earlier run left behind are removed.
- Frames that are sent in one pass of the event loop go out in one write: what was computed together arrives together,
  and wakes its receiver once. They are joined here: from Python 3.12 on, `writelines` never gets rid of an empty piece
  (the loop spins, `close` never ends), and in some releases it does not say that the window is full.
- Not on Windows, which has no such sockets in asyncio: `supported()` says so.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import stat
import struct
import sys
from pathlib import Path
from typing import Final, cast

from fallow.domain.errors import ConfigError, LinkClosed
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import NodeId
from fallow.fabric.accept_queue import AcceptQueue
from fallow.fabric.codec import Buffer
from fallow.fabric.contract import LINK_WINDOW_BYTES
from fallow.fabric.link_core import LinkCore
from fallow.fabric.local_handshake import Handshake, Identity, Role

SCHEME: Final = "unix:"
HANDSHAKE_TIMEOUT_S: Final = 2.0
MAX_HANDSHAKES: Final = 64
READ_BYTES: Final = 64 * 1024
MAX_SOCKET_PATH_BYTES: Final = 100
JOIN_BYTES: Final = 64 * 1024
"""So much waits for the end of a pass, to be joined; more is written at once, and a payload that is larger by itself,
without a copy."""

log = logging.getLogger(__name__)


class PeerProcessGone(LinkClosed):
    """The peer's socket is there and nobody listens: its process ended without tidying up."""


def supported() -> bool:
    """Whether this platform has Unix domain sockets in asyncio."""
    return sys.platform != "win32"


def socket_path(address: PeerAddress) -> Path | None:
    """The socket of a peer on this host, if it is there and ours: same user, and really a socket."""
    for endpoint in address.endpoints:
        if endpoint.startswith(SCHEME):
            path = Path(endpoint.removeprefix(SCHEME))
            with contextlib.suppress(OSError):
                found = path.lstat()
                if stat.S_ISSOCK(found.st_mode) and found.st_uid == os.getuid():
                    return path
    return None


class LocalEndpoint:
    """A `LinkEndpoint` over a Unix domain socket. Make one with `open`."""

    def __init__(self, identity: Identity, path: Path) -> None:
        self._identity = identity
        self._path = path
        self._accepted = AcceptQueue()
        self._server: asyncio.AbstractServer | None = None
        self._handshakes = 0

    @classmethod
    async def open(cls, seed: bytes, directory: Path) -> "LocalEndpoint":
        """Listen in `directory` (made with mode 0700) as the owner of the Ed25519 seed. Raises `ConfigError`."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise ConfigError(f"{directory} must be a folder of your own with mode 0700, for links on this host")
        identity = Identity.from_seed(seed)
        prefix = identity.node[:16]
        for stale in directory.glob(f"{prefix}-*.sock"):
            stale.unlink(missing_ok=True)
        path = directory.resolve() / f"{prefix}-{secrets.token_hex(4)}.sock"
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise ConfigError(f"{directory} is too long a path for a socket; choose a shorter state folder")
        endpoint = cls(identity, path)
        loop = asyncio.get_running_loop()
        endpoint._server = await loop.create_unix_server(endpoint._incoming, str(path))
        return endpoint

    @property
    def address(self) -> PeerAddress:
        return PeerAddress(self._identity.node, (SCHEME + str(self._path),))

    def reaches(self, address: PeerAddress) -> Path | None:
        """A peer's socket, if it is in our own folder: an address is a stranger's word, and must not make us talk to
        other programs' sockets."""
        path = socket_path(address)
        return path if path is not None and path.parent == self._path.parent else None

    async def connect(self, address: PeerAddress) -> "LocalLink":
        path = self.reaches(address)
        if path is None:
            raise LinkClosed(f"{address.node[:8]} has no socket on this host")
        handshake = _Opening(self._identity, Role.DIALLER, expected=address.node)
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                await asyncio.get_running_loop().create_unix_connection(lambda: handshake, str(path))
                return await handshake.opened
        except TimeoutError:
            raise LinkClosed(f"{address.node[:8]} did not answer on its socket") from None
        except ConnectionRefusedError:
            raise PeerProcessGone(f"the process of {address.node[:8]} on this host is gone") from None
        except OSError as error:
            raise LinkClosed(f"cannot reach {address.node[:8]} on this host: {error.strerror}") from None
        finally:
            handshake.give_up()

    def accept(self) -> AcceptQueue:
        return self._accepted

    async def close(self) -> None:
        self._accepted.close()
        if self._server is not None:
            self._server.close()
            self._server = None
            self._path.unlink(missing_ok=True)

    def _incoming(self) -> "_Opening":
        opening = _Opening(self._identity, Role.LISTENER, expected=None)
        if self._handshakes >= MAX_HANDSHAKES or self._server is None:
            opening.give_up()
            return opening
        self._handshakes += 1
        asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT_S, opening.give_up)
        opening.opened.add_done_callback(self._opened)
        return opening

    def _opened(self, opened: "asyncio.Future[LocalLink]") -> None:
        self._handshakes -= 1
        if opened.cancelled():
            return
        error = opened.exception()
        if error is not None:
            log.info("a local link was not set up: %s", error)
        elif not self._accepted.offer(opened.result()):
            opened.result().abort("too many links wait to be accepted")


class _Opening(asyncio.Protocol):
    """A connection until both sides have proved their ids; then `LocalLink` takes it over."""

    def __init__(self, identity: Identity, role: Role, expected: NodeId | None) -> None:
        self._handshake = Handshake(identity, role, expected)
        self._transport: asyncio.Transport | None = None
        self._given_up = False
        self.opened: asyncio.Future[LocalLink] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._given_up or not _same_user(transport.get_extra_info("socket")):
            self._transport.abort()
            return
        self._transport.write(self._handshake.first())

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        try:
            reply = self._handshake.feed(data)
        except LinkClosed as error:
            self._fail(error)
            return
        if reply:
            self._transport.write(reply)
        peer = self._handshake.peer
        if peer is not None and not self.opened.done():
            link = LocalLink(peer, self._transport)
            self._transport.set_protocol(link)
            self.opened.set_result(link)
            rest = self._handshake.rest
            if rest:
                link._data(rest)

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(LinkClosed("the peer closed the connection during the handshake"))

    def give_up(self) -> None:
        """End the handshake, unless it is done."""
        self._given_up = True
        self._fail(LinkClosed("the handshake took too long"))

    def _fail(self, error: LinkClosed) -> None:
        if self.opened.done():
            return
        self.opened.set_exception(error)
        self.opened.exception()  # retrieved: a dialler that was cancelled does not wait for it
        if self._transport is not None:
            self._transport.abort()


class LocalLink(LinkCore, asyncio.BufferedProtocol):
    """One connection. asyncio's transport holds what is unsent, but for what waits for the end of this pass."""

    def __init__(self, peer: NodeId, transport: asyncio.Transport) -> None:
        super().__init__(peer)
        self._transport = transport
        self._lost: asyncio.Future[None] = self._loop.create_future()
        self._full = False
        self._joining: list[Buffer] = []
        self._joining_bytes = 0
        self._read_buffer = memoryview(bytearray(READ_BYTES))
        # `post` refuses from LINK_WINDOW_BYTES on, so the transport must pause, and later resume, from there on.
        transport.set_write_buffer_limits(high=LINK_WINDOW_BYTES - 1, low=LINK_WINDOW_BYTES // 2)

    # --- asyncio's side ---

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._data(self._read_buffer[:nbytes])

    def eof_received(self) -> bool:
        self._eof()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        if not self._lost.done():
            self._lost.set_result(None)
        self._eof()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._room()

    # --- LinkCore's side ---

    def _write(self, head: bytes, payload: Buffer) -> None:
        if not self._joining:
            self._loop.call_soon(self._write_joined)
        self._joining.append(head)
        self._joining_bytes += len(head)
        if len(payload) > JOIN_BYTES:
            self._write_joined()
            if not self._transport.is_closing():
                self._transport.write(memoryview(payload).cast("B"))
            return
        self._joining.append(payload)
        self._joining_bytes += len(payload)
        if self._joining_bytes > JOIN_BYTES:
            self._write_joined()

    def _write_joined(self) -> None:
        """Hand what waits to the transport. Idempotent."""
        joining, self._joining, self._joining_bytes = self._joining, [], 0
        if joining and not self._transport.is_closing():
            self._transport.write(b"".join(joining))
            self._room()

    def _unsent_bytes(self) -> int:
        # Full until the transport says otherwise, so that `post` and a waiting `send` agree.
        return LINK_WINDOW_BYTES if self._full else self._transport.get_write_buffer_size() + self._joining_bytes

    def _hold_reading(self) -> None:
        self._transport.pause_reading()

    def _resume_reading(self) -> None:
        self._transport.resume_reading()

    async def _finish(self) -> None:
        self._write_joined()
        self._transport.close()
        await self._lost

    def _drop(self) -> None:
        if not self._lost.done():
            self._transport.abort()


def _same_user(connection: socket.socket) -> bool:
    """Whether the peer's process is ours. Only Linux is asked; elsewhere the folder's mode decides."""
    if sys.platform != "linux":
        return True
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return bool(uid == os.getuid())
