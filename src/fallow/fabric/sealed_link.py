"""A link over the relay: a stream of sealed records, each one message on the bus.

Rules
- A record holds the next bytes of the stream of frames, up to `RECORD_BYTES_MAX`; a large frame takes several, small
  frames that wait together share one. Kinds, sessions and lengths of frames are all inside the seal.
- A record also tells how much the other side may send (`policy/relay.py`): credits, because the bus drops what a
  subscriber is too slow for. What may not be sent yet waits here, up to `LINK_WINDOW_BYTES`.
- The last record says that it is the last. A link that falls silent without it was cut, or its peer died: pings notice.
- Anything but the next record of the link ends it as `SealBroken`, after which nothing is taken from the relay any
  more, and the peer is told. The session layer repairs, as after every loss of a link.
- One task per link publishes, since publishing may wait. Not here: who may dial, and the handshake
  (`sealed_endpoint.py`, `sealing.py`).
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from enum import IntEnum
from struct import Struct
from typing import Final

from fallow.domain.errors import FabricError, FallowError, FrameError, LinkClosed, SealBroken
from fallow.fabric.codec import Buffer
from fallow.fabric.link_core import LinkCore
from fallow.fabric.sealing import Seals
from fallow.policy.relay import (
    RECORD_COST_BYTES,
    WINDOW_BYTES_MAX,
    WINDOW_BYTES_MIN,
    grant_due,
    record_cost_bytes,
)

RECORD_BYTES_MAX: Final = 64 * 1024
"""Of the stream, in one record. Heartbeats share the connection and wait behind one record, not behind a frame."""

_PREFIX: Final = Struct(">BQ")
"""What a record begins with: its kind, and what its receiver may send, counted from the link's beginning."""

log = logging.getLogger(__name__)


class _Kind(IntEnum):
    STREAM = 0
    """The next bytes of the stream; perhaps none, when only a grant is told."""
    END = 1


class SealedLink(LinkCore):
    """One end. `publish` sends a message to the peer, `window` says how much the peer may have under way to us."""

    def __init__(
        self,
        seals: Seals,
        publish: Callable[[bytes], Awaitable[None]],
        window: Callable[[], int],
        on_gone: Callable[["SealedLink"], None],
        opening: bytes | None = None,
    ) -> None:
        super().__init__(seals.peer)
        self._seals = seals
        self._publish = publish
        self._window = window
        self._on_gone = on_gone
        self._queue: deque[Buffer] = deque()
        self._queued_bytes = 0
        self._may_send_bytes = WINDOW_BYTES_MIN
        self._sent_bytes = 0
        self._granted_bytes = WINDOW_BYTES_MIN
        self._taken_bytes = 0
        self._deaf = False
        """Whether nothing is taken from the relay any more."""
        self._dropped = False
        self._idle: asyncio.Future[None] | None = None
        """What the writer waits for when it has nothing to do."""
        self._flushed: asyncio.Future[None] | None = None
        self.writer = self._loop.create_task(self._write_all(opening))

    @property
    def link_id(self) -> bytes:
        return self._seals.link_id

    # --- what the relay brings ---

    def arrived(self, message: bytes) -> None:
        """A message that says it is a record of this link."""
        if self._deaf:
            return
        try:
            plain = self._seals.opener.open(message)
            self._take(plain)
        except FabricError as error:
            self._deaf = True
            log.warning("closing a relayed link with %s: %s", self._peer[:8], error)
            self._garbage(error)

    def _take(self, plain: bytes) -> None:
        if len(plain) < _PREFIX.size:
            raise FrameError(f"expected a record of at least {_PREFIX.size} bytes, got {len(plain)}")
        kind, granted_bytes = _PREFIX.unpack_from(plain)
        self._may_send(granted_bytes)
        if kind == _Kind.END:
            self._deaf = True
            self._eof()
        elif kind != _Kind.STREAM:
            raise FrameError(f"unknown kind of record: {kind}")
        elif len(plain) > _PREFIX.size:
            self._taken_bytes += record_cost_bytes(len(plain) - _PREFIX.size)
            if self._taken_bytes > self._granted_bytes:
                raise FrameError(f"the peer sent {self._taken_bytes} bytes, {self._granted_bytes} were granted")
            self._data(memoryview(plain)[_PREFIX.size :])
            if self._grant() is not None:
                self._wake_writer()

    def _may_send(self, granted_bytes: int) -> None:
        if granted_bytes > self._may_send_bytes:
            # No honest peer grants more than a window: a larger number would only turn back-pressure off.
            self._may_send_bytes = min(granted_bytes, self._sent_bytes + WINDOW_BYTES_MAX)
            if self._queue:
                self._wake_writer()

    def _grant(self) -> int | None:
        """The grant to tell, when it is time to. What waits in a full inbox is not made more of."""
        if self._holding or self._end is not None:
            return None
        return grant_due(self._taken_bytes, self._granted_bytes, self._window())

    def _hold_reading(self) -> None:
        pass  # nothing is granted meanwhile

    def _resume_reading(self) -> None:
        if self._grant() is not None:
            self._wake_writer()

    # --- what goes to the relay ---

    def _write(self, head: bytes, payload: Buffer) -> None:
        self._enqueue(head)
        if len(payload):
            self._enqueue(payload)
        self._wake_writer()

    def _enqueue(self, data: Buffer) -> None:
        self._queue.append(data)
        self._queued_bytes += data.nbytes if type(data) is memoryview else len(data)

    def _unsent_bytes(self) -> int:
        return self._queued_bytes

    def _wake_writer(self) -> None:
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    async def _write_all(self, opening: bytes | None) -> None:
        try:
            if opening is not None:
                await self._publish(opening)
            while not self._dropped:
                record = self._next_record()
                if record is not None:
                    await self._publish(record)
                    self._room()
                    continue
                if self._flushed is not None and not self._queue and not self._flushed.done():
                    self._flushed.set_result(None)
                self._idle = self._loop.create_future()
                await self._idle
            await self._publish(self._sealed(_Kind.END, ()))
        except SealBroken as error:
            self._ended(error)
        except FallowError as error:
            self._ended(LinkClosed(f"the relay broke: {error.message}"))
        finally:
            self._dropped = True
            self._on_gone(self)
            self._ended(LinkClosed("the relay was closed"))

    def _next_record(self) -> bytes | None:
        """What may be sent now: bytes of the stream, or a grant alone."""
        room = self._may_send_bytes - self._sent_bytes - RECORD_COST_BYTES
        if self._queue and room > 0:
            pieces = self._next_pieces(min(room, RECORD_BYTES_MAX))
            return self._sealed(_Kind.STREAM, pieces)
        return None if self._grant() is None else self._sealed(_Kind.STREAM, ())

    def _next_pieces(self, bytes_max: int) -> list[Buffer]:
        pieces: list[Buffer] = []
        size = 0
        while self._queue and size < bytes_max:
            piece = self._queue.popleft()
            piece_bytes = piece.nbytes if type(piece) is memoryview else len(piece)
            if size + piece_bytes > bytes_max:
                view = memoryview(piece).cast("B")
                piece, rest = view[: bytes_max - size], view[bytes_max - size :]
                self._queue.appendleft(rest)
                piece_bytes = len(piece)
            pieces.append(piece)
            size += piece_bytes
        self._queued_bytes -= size
        self._sent_bytes += record_cost_bytes(size)
        return pieces

    def _sealed(self, kind: _Kind, pieces: list[Buffer] | tuple[()]) -> bytes:
        granted = self._grant()
        if granted is not None:
            self._granted_bytes = granted
        prefix = _PREFIX.pack(kind, self._granted_bytes)
        return self._seals.sealer.seal(b"".join((prefix, *pieces)) if pieces else prefix)

    # --- closing ---

    async def _finish(self) -> None:
        if not self._dropped:
            self._flushed = self._loop.create_future()
            self._wake_writer()
            await self._flushed

    def _drop(self) -> None:
        if self._dropped:
            return
        self._dropped = True
        self._queue.clear()
        self._queued_bytes = 0
        self._wake_writer()
        if self._flushed is not None and not self._flushed.done():
            self._flushed.set_result(None)
