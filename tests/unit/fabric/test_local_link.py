"""Frames of one pass of the event loop leave in one write, in order, and none is lost when the link closes."""

import asyncio
import socket
from typing import cast

import pytest

from fallow.fabric.codec import FrameDecoder
from fallow.fabric.local_link import JOIN_BYTES, READ_BYTES, LocalLink
from tests.unit.fabric.support import node_id, rows


async def linked() -> tuple[LocalLink, socket.socket]:
    """A link, and the other end of its socket."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
    link = LocalLink(node_id(1), cast(asyncio.Transport, transport))
    transport.set_protocol(link)
    return link, theirs


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
