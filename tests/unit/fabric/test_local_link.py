"""Frames of one pass of the event loop leave in one write, in order, and none is lost when the link closes."""

import asyncio
import socket
from collections.abc import Iterable
from typing import cast

import pytest

from fallow.domain.frames import Frame, Ping
from fallow.fabric.codec import FrameDecoder
from fallow.fabric.local_link import JOIN_BYTES, READ_BYTES, LocalLink
from tests.unit.fabric.support import node_id, rows


class Handed:
    """The real transport, and what it was handed."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.pieces: list[bytes] = []

    def write(self, piece: bytes) -> None:
        self.pieces.append(bytes(piece))
        self._transport.write(piece)

    def writelines(self, pieces: Iterable[bytes]) -> None:
        copies = [bytes(piece) for piece in pieces]
        self.pieces += copies
        self._transport.writelines(copies)

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)


async def linked() -> tuple[LocalLink, socket.socket]:
    """A link, and the other end of its socket."""
    link, theirs, _ = await watched()
    return link, theirs


async def watched() -> tuple[LocalLink, socket.socket, Handed]:
    """The same, and what the link's transport is handed."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
    handed = Handed(transport)
    link = LocalLink(node_id(1), cast(asyncio.Transport, handed))
    transport.set_protocol(link)
    return link, theirs, handed


def test_frames_of_one_pass_leave_in_one_write() -> None:
    async def scenario() -> None:
        link, theirs = await linked()
        frames = [rows(position, payload=bytes([position])) for position in range(4)]
        for frame in frames:
            assert link.post(frame)
        with pytest.raises(BlockingIOError):
            theirs.recv(READ_BYTES)
        await asyncio.sleep(0)
        assert FrameDecoder().feed(theirs.recv(READ_BYTES)) == frames
        link.abort("done")
        theirs.close()

    asyncio.run(scenario())


def test_much_does_not_wait() -> None:
    async def scenario() -> None:
        link, theirs = await linked()
        assert link.post(rows(0, payload=bytes(JOIN_BYTES)))
        assert theirs.recv(READ_BYTES)
        link.abort("done")
        theirs.close()

    asyncio.run(scenario())


def test_what_waits_goes_out_before_the_goodbye() -> None:
    async def scenario() -> None:
        link, theirs = await linked()
        link.post(rows(0, payload=b"x"))
        closing = asyncio.create_task(link.close())
        received = await asyncio.get_running_loop().sock_recv(theirs, READ_BYTES)
        assert [type(frame.header).__name__ for frame in FrameDecoder().feed(received)] == ["Rows", "Goodbye"]
        theirs.close()
        await closing

    asyncio.run(scenario())


@pytest.mark.parametrize("payload", [b"", b"x", bytes(JOIN_BYTES), bytes(3 * JOIN_BYTES)])
def test_no_empty_piece_reaches_the_transport_and_the_order_stays(payload: bytes) -> None:
    """From Python 3.12 on, a transport never gets rid of an empty piece: the loop spins, and `close` does not end."""

    async def scenario() -> None:
        link, theirs, handed = await watched()
        frames = [Frame(Ping(nonce=1)), rows(0, payload=payload), Frame(Ping(nonce=2))]
        for frame in frames:
            assert link.post(frame)
        received: list[Frame] = []
        decoder = FrameDecoder()
        while len(received) < len(frames):
            received += decoder.feed(await asyncio.get_running_loop().sock_recv(theirs, READ_BYTES))
        assert received == frames
        closing = asyncio.create_task(link.close())
        async with asyncio.timeout(5):
            assert await asyncio.get_running_loop().sock_recv(theirs, READ_BYTES)
            theirs.close()
            await closing
        assert handed.pieces
        assert all(handed.pieces)

    asyncio.run(scenario())
