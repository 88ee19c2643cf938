"""Frames to a chain's devices, also to those that have to be dialled first.

What did not arrive is returned, not raised: a chain notes it and goes on with the others.
"""

import asyncio
from typing import Final

import msgspec

from fallow.domain.errors import FallowError
from fallow.domain.frames import Frame, PeerAddress
from fallow.domain.ids import NodeId
from fallow.fabric.peers import Peers
from fallow.gateway.opening import AVOID_ENGINE_S, AVOID_S

DIAL_PATIENCE_S: Final = 1.0
"""How long a chain waits for a link to a device that it needs. The dial itself goes on: another chain may use it."""


class Unreached(msgspec.Struct, frozen=True):
    """A device that a frame did not get to, why, and how long it is avoided for that."""

    node: NodeId
    reason: str
    avoid_s: float


async def send(peers: Peers, address: PeerAddress, frame: Frame) -> Unreached | None:
    """To a device of an open chain."""
    if peers.post(address.node, frame):
        return None
    try:
        await peers.send(address, frame)
    except FallowError as error:
        return Unreached(address.node, f"{error.code}: {error.message}", AVOID_S)
    return None


async def reach(peers: Peers, address: PeerAddress, frame: Frame) -> Unreached | None:
    """To a device that may have to be dialled, for `DIAL_PATIENCE_S` at most."""
    try:
        async with asyncio.timeout(DIAL_PATIENCE_S):
            return await send(peers, address, frame)
    except TimeoutError:
        reason = f"{address.node[:8]} was not reached in {DIAL_PATIENCE_S:g} s"
        return Unreached(address.node, reason, AVOID_ENGINE_S)
