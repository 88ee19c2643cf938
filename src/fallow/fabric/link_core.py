"""What every link adapter shares: decoding, delivery, back-pressure, and how a link ends.

Rules
- An adapter calls `_data` with what arrived, `_ended` when the transport broke, and `_room` when unsent bytes went
  out; it implements `_write`, `_unsent_bytes`, `_hold_reading`, `_resume_reading`, `_finish` and `_drop`.
- A link has one state: open until `_end` holds why it ended. Whoever ends it first decides the reason.
- A `Goodbye` frame is the link's own: the sender's `close` writes it last, the receiver ends with its words.
- Frames that arrived before the end are delivered before the end is.
- One event loop; nothing here is thread-safe, and there are no timers except the flush limit of `close`.
"""

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Final

from fallow.domain.errors import FabricError, FrameError, LinkClosed
from fallow.domain.frames import Frame, Goodbye
from fallow.domain.ids import NodeId
from fallow.fabric.codec import Buffer, FrameDecoder, encode_parts
from fallow.fabric.contract import LINK_WINDOW_BYTES
from fallow.fabric.frame_checks import MAX_MESSAGE_CHARS, MAX_NAME_CHARS

INBOX_BYTES_MAX: Final = 4 << 20
"""Bytes of frames that wait for `receive` before the link stops reading; a single frame may be larger."""
INBOX_FRAMES_MAX: Final = 4096
CLOSE_FLUSH_S: Final = 2.0
"""How long `close` waits for a peer that reads slowly before it drops what is unsent."""

log = logging.getLogger(__name__)


class LinkCore(ABC):
    """The transport-independent part of a `PushLink`."""

    def __init__(self, peer: NodeId) -> None:
        self._peer = peer
        self._loop = asyncio.get_running_loop()
        self._decoder = FrameDecoder()
        self._inbox: deque[Frame] = deque()
        self._inbox_bytes = 0
        self._holding = False
        self._on_frame: Callable[[Frame], None] | None = None
        self._on_end: Callable[[FabricError], None] | None = None
        self._end: FabricError | None = None
        self._receivers: deque[asyncio.Future[None]] = deque()
        self._senders: deque[asyncio.Future[None]] = deque()
        self.bytes_received = 0
        self.frames_sent = 0

    # --- what the adapter does ---

    @abstractmethod
    def _write(self, head: bytes, payload: Buffer) -> None:
        """Queue these bytes, in order, without waiting."""

    @abstractmethod
    def _unsent_bytes(self) -> int:
        """Bytes queued that the transport has not taken yet."""

    @abstractmethod
    def _hold_reading(self) -> None:
        """Stop reading from the transport."""

    @abstractmethod
    def _resume_reading(self) -> None:
        """Read on."""

    @abstractmethod
    async def _finish(self) -> None:
        """Flush what is queued and close the transport. May be cancelled when that takes too long."""

    @abstractmethod
    def _drop(self) -> None:
        """Close the transport at once. Idempotent."""

    # --- the contract ---

    @property
    def peer(self) -> NodeId:
        return self._peer

    @property
    def rtt_s(self) -> float | None:
        return None

    def post(self, frame: Frame) -> bool:
        if self._end is not None or self._unsent_bytes() >= LINK_WINDOW_BYTES:
            return False
        head, payload = encode_parts(frame)
        self.frames_sent += 1
        self._write(head, payload)
        return True

    async def send(self, frame: Frame) -> None:
        while not self.post(frame):
            if self._end is not None:
                raise _as_closed(self._end)
            await self._wait(self._senders)

    async def receive(self) -> Frame:
        while not self._inbox:
            if self._end is not None:
                raise self._end
            await self._wait(self._receivers)
        frame = self._inbox.popleft()
        self._inbox_bytes -= len(frame.payload)
        if self._holding and not self._inbox_full():
            self._holding = False
            self._resume_reading()
        return frame

    def set_receiver(self, on_frame: Callable[[Frame], None], on_end: Callable[[FabricError], None]) -> None:
        self._on_frame, self._on_end = on_frame, on_end
        waiting, self._inbox, self._inbox_bytes = list(self._inbox), deque(), 0
        self._deliver(waiting)
        if self._end is not None:
            self._report_end(self._end)
        elif self._holding:
            self._holding = False
            self._resume_reading()

    async def close(self, code: str = "done", message: str = "") -> None:
        if self._end is not None:
            return
        self._write(_goodbye(code, message), b"")
        self._end_with(LinkClosed(f"this side closed the link: {code} {message}".rstrip()))
        await self._flush_and_drop()

    def abort(self, message: str) -> None:
        self._ended(LinkClosed(message))

    # --- what the adapter calls ---

    def _data(self, data: Buffer) -> None:
        """Bytes arrived."""
        self.bytes_received += len(data)
        if self._end is not None:
            return
        try:
            frames = self._decoder.feed(data)
        except FrameError as error:
            self._garbage(error)
            return
        self._deliver(frames)
        if self._decoder.failure is not None:
            self._garbage(self._decoder.failure)

    def _garbage(self, error: FabricError) -> None:
        """End the link, and tell the peer what was wrong."""
        if self._end is None:
            self._write(_goodbye(error.code, error.message), b"")
            self._end_with(error)
            closing = self._loop.create_task(self._flush_and_drop())
            _closing.add(closing)
            closing.add_done_callback(_closing.discard)

    def _eof(self) -> None:
        """The peer will send nothing more."""
        try:
            self._decoder.finish()
        except FrameError as error:
            self._ended(LinkClosed(f"the peer went away: {error}"))
        else:
            self._ended(LinkClosed("the peer closed the link without a word"))

    def _ended(self, error: FabricError) -> None:
        """The link is over: wake everybody, and let the transport go."""
        if self._end is None:
            self._end_with(error)
            self._drop()

    def _room(self) -> None:
        """Unsent bytes went out."""
        if self._senders and self._unsent_bytes() < LINK_WINDOW_BYTES:
            _wake(self._senders)

    # --- inside ---

    def _deliver(self, frames: list[Frame]) -> None:
        for frame in frames:
            if self._end is not None:
                return
            if type(frame.header) is Goodbye:
                self._ended(
                    LinkClosed(f"the peer closed the link: {frame.header.code} {frame.header.message}".rstrip())
                )
            elif self._on_frame is None:
                self._inbox.append(frame)
                self._inbox_bytes += len(frame.payload)
            else:
                self._push(self._on_frame, frame)
        if self._inbox:
            _wake(self._receivers)
            if not self._holding and self._inbox_full():
                self._holding = True
                self._hold_reading()

    def _push(self, on_frame: Callable[[Frame], None], frame: Frame) -> None:
        try:
            on_frame(frame)
        except Exception:
            # One peer's frame must not take the others' links down with it.
            log.exception("handling %s from %s failed; closing that link", type(frame.header).__name__, self._peer)
            self._ended(LinkClosed("this side failed to handle a frame"))

    def _inbox_full(self) -> bool:
        return self._inbox_bytes >= INBOX_BYTES_MAX or len(self._inbox) >= INBOX_FRAMES_MAX

    def _end_with(self, error: FabricError) -> None:
        self._end = error
        _wake(self._receivers)
        _wake(self._senders)
        self._report_end(error)

    def _report_end(self, error: FabricError) -> None:
        on_end, self._on_end = self._on_end, None
        self._on_frame = None
        if on_end is not None:
            try:
                on_end(error)
            except Exception:
                log.exception("handling the end of a link with %s failed", self._peer)

    async def _flush_and_drop(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_FLUSH_S):
                await self._finish()
        self._drop()

    async def _wait(self, waiters: deque[asyncio.Future[None]]) -> None:
        waiter = self._loop.create_future()
        waiters.append(waiter)
        try:
            await waiter
        finally:
            with contextlib.suppress(ValueError):
                waiters.remove(waiter)


_closing: set[asyncio.Task[None]] = set()
"""Links that garbage ended, until their peers were told; kept so that their tasks are not collected half-way."""


def _goodbye(code: str, message: str) -> bytes:
    return encode_parts(Frame(Goodbye(code=code[:MAX_NAME_CHARS], message=message[:MAX_MESSAGE_CHARS])))[0]


def _wake(waiters: deque[asyncio.Future[None]]) -> None:
    while waiters:
        waiter = waiters.popleft()
        if not waiter.done():
            waiter.set_result(None)


def _as_closed(error: FabricError) -> LinkClosed:
    """Sending on a link that garbage ended is sending on a closed link."""
    return error if isinstance(error, LinkClosed) else LinkClosed(f"link closed after garbage: {error}")
