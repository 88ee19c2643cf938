"""`Peers` over the sealed relay on virtual time: a loss on the bus is a lost peer, by name and in time, and a new dial
makes a new link; a bus that falls silent is noticed by pings, as a dead peer is."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fallow.domain.frames import Frame
from fallow.domain.ids import NodeId
from fallow.fabric.local_handshake import Identity
from fallow.fabric.memory_bus import MemoryHub, Message
from fallow.fabric.peers import Peers
from fallow.fabric.sealed_endpoint import RelayEndpoint
from fallow.policy.liveness import Liveness
from fallow.trust.open_doors import OpenAdmission
from tests.unit.fabric.support import LoopClock, rows, run_virtual

SEEDS = (b"\x01" * 32, b"\x02" * 32)
A, B = (Identity.from_seed(seed).node for seed in SEEDS)


class LossyHub(MemoryHub):
    """Carries messages, or loses them."""

    def __init__(self) -> None:
        super().__init__()
        self.lose = 0
        """How many of the next messages to B."""

    def deliver(self, message: Message) -> bool:
        if self.lose and f".relay.{B}." in message.subject:
            self.lose -= 1
            return True
        return super().deliver(message)


class Party:
    """A process on the relay."""

    def __init__(self, endpoint: RelayEndpoint) -> None:
        self.endpoint = endpoint
        self.came: list[int] = []
        self.lost: list[tuple[str, float]] = []
        self.peers = Peers(
            endpoint,
            LoopClock(),
            role="node",
            admission=OpenAdmission(),
            on_frame=self._on_frame,
            on_lost=self._on_lost,
        )

    def _on_frame(self, _: NodeId, frame: Frame) -> None:
        self.came.append(frame.header.position)  # type: ignore[union-attr]

    def _on_lost(self, _: NodeId, reason: str) -> None:
        self.lost.append((reason, asyncio.get_running_loop().time()))


@asynccontextmanager
async def meeting() -> AsyncIterator[tuple[LossyHub, Party, Party]]:
    hub = LossyHub()
    a, b = [
        Party(await RelayEndpoint.open(hub.connect(node), "test", seed))
        for node, seed in zip((A, B), SEEDS, strict=True)
    ]
    for party in (a, b):
        await party.peers.start()
    try:
        await a.peers.connect(b.endpoint.address)
        yield hub, a, b
    finally:
        for party in (a, b):
            await party.peers.close()
            await party.endpoint.close()


def test_frames_flow_and_the_round_trip_is_known() -> None:
    async def main() -> None:
        async with meeting() as (_, a, b):
            for i in range(50):
                assert a.peers.post(B, rows(i))
            await asyncio.sleep(2)
            assert b.came == list(range(50)) and not a.lost and not b.lost
            assert a.peers.rtt_s(B) is not None and await b.peers.probe(A, 1)

    run_virtual(main())


def test_a_message_lost_on_the_bus_is_a_lost_peer_by_name_and_a_new_dial_goes_on() -> None:
    async def main() -> None:
        async with meeting() as (hub, a, b):
            a.peers.post(B, rows(0))
            await asyncio.sleep(0.01)
            hub.lose = 1
            a.peers.post(B, rows(1))
            await asyncio.sleep(0.01)
            a.peers.post(B, rows(2))
            await asyncio.sleep(0.01)
            assert b.came == [0], "nothing behind the gap"
            assert "lost or held back" in b.lost[0][0] and "seal_broken" in a.lost[0][0]
            await a.peers.connect(b.endpoint.address)
            a.peers.post(B, rows(1))
            await asyncio.sleep(0.01)
            assert b.came == [0, 1]

    run_virtual(main())


def test_a_bus_that_carries_nothing_is_noticed_within_the_time_of_silence() -> None:
    async def main() -> None:
        async with meeting() as (hub, a, b):
            liveness = Liveness()
            await asyncio.sleep(3)
            hub.stop()
            stopped_s = asyncio.get_running_loop().time()
            await asyncio.sleep(5)
            for party in (a, b):
                (reason, lost_s), *more = party.lost
                assert not more and "silent" in reason
                assert lost_s - stopped_s <= liveness.silence_s + 2 * liveness.tick_s + liveness.ping_interval_s

    run_virtual(main())
