"""`Peers` over the in-memory fabric on virtual time: handshake, liveness, bounds, and one bad link among good ones."""

import asyncio

import pytest

from fallow.domain.errors import LinkClosed, ProtocolVersionMismatch
from fallow.domain.frames import Frame, Hello, PeerAddress, Ping
from fallow.domain.ids import NodeId
from fallow.fabric import peers as peers_module
from fallow.fabric.memory import MemoryFabric, MemoryLink
from fallow.fabric.peers import MAX_LINKS_PER_PEER, Peers
from fallow.trust.open_doors import OpenAdmission
from tests.unit.fabric.support import LoopClock, node_id, rows, run_virtual

A, B, C = node_id(0xA), node_id(0xB), node_id(0xC)


class Party:
    """A process: its peers, and what they told it."""

    def __init__(self, fabric: MemoryFabric, node: NodeId) -> None:
        self.fabric, self.node = fabric, node
        self.endpoint = fabric.endpoint(node)
        self.frames: list[tuple[NodeId, int]] = []
        self.lost: list[tuple[NodeId, str, float]] = []
        self.peers = Peers(
            self.endpoint,
            LoopClock(),
            role="node",
            admission=OpenAdmission(),
            on_frame=self.on_frame,
            on_lost=self.on_lost,
            capabilities=("f16",),
        )

    def on_frame(self, peer: NodeId, frame: Frame) -> None:
        if frame.payload == b"poison":
            raise ValueError("cannot handle this")
        self.frames.append((peer, frame.header.position))  # type: ignore[union-attr]

    def on_lost(self, peer: NodeId, reason: str) -> None:
        self.lost.append((peer, reason, asyncio.get_running_loop().time()))

    @property
    def address(self) -> PeerAddress:
        return self.endpoint.address


async def parties(fabric: MemoryFabric, *nodes: NodeId) -> list[Party]:
    made = [Party(fabric, node) for node in nodes]
    for party in made:
        await party.peers.start()
    return made


async def close(*made: Party) -> None:
    for party in made:
        await party.peers.close()


def test_frames_arrive_in_order_both_ways_over_one_dial() -> None:
    async def main() -> None:
        fabric = MemoryFabric(latency_s=0.01)
        a, b = await parties(fabric, A, B)
        assert not a.peers.post(B, rows(0)), "no link yet"
        await asyncio.gather(*(a.peers.send(b.address, rows(i)) for i in range(20)))
        await asyncio.sleep(0.1)
        assert b.frames == [(A, i) for i in range(20)]
        assert b.peers.post(A, rows(7)) and a.peers.connected() == {B} and b.peers.connected() == {A}
        await asyncio.sleep(0.1)
        assert a.frames == [(B, 7)]
        assert len(fabric._links) == 2, "concurrent sends shared one dial"
        await close(a, b)

    run_virtual(main())


def test_the_round_trip_is_measured() -> None:
    async def main() -> None:
        a, b = await parties(MemoryFabric(latency_s=0.02), A, B)
        assert a.peers.rtt_s(B) is None
        await a.peers.connect(b.address)
        await asyncio.sleep(1)
        assert a.peers.rtt_s(B) == pytest.approx(0.04, abs=1e-6)
        assert b.peers.rtt_s(A) == pytest.approx(0.04, abs=1e-6)
        await close(a, b)

    run_virtual(main())


def test_idle_links_stay_and_a_silent_peer_is_lost_within_two_seconds() -> None:
    async def main() -> None:
        fabric = MemoryFabric(latency_s=0.02)
        a, b = await parties(fabric, A, B)
        await a.peers.connect(b.address)
        await asyncio.sleep(300)
        assert a.lost == b.lost == []
        fabric.cut(A, B)
        cut_s = asyncio.get_running_loop().time()
        await asyncio.sleep(3)
        for party in (a, b):
            ((_, reason, at_s),) = party.lost
            assert "silent" in reason and 1.0 <= at_s - cut_s <= 2.0
            assert party.peers.connected() == frozenset()
        await close(a, b)

    run_virtual(main())


def test_a_short_cut_loses_nothing() -> None:
    async def main() -> None:
        fabric = MemoryFabric()
        a, b = await parties(fabric, A, B)
        await a.peers.connect(b.address)
        await asyncio.sleep(1)
        fabric.cut(A, B)
        for i in range(5):
            assert a.peers.post(B, rows(i))
        await asyncio.sleep(0.8)
        fabric.heal(A, B)
        await asyncio.sleep(5)
        assert b.frames == [(A, i) for i in range(5)] and a.lost == b.lost == []
        await close(a, b)

    run_virtual(main())


def test_a_goodbye_and_a_crash_are_noticed_at_once() -> None:
    async def main() -> None:
        fabric = MemoryFabric(latency_s=0.01)
        a, b, c = await parties(fabric, A, B, C)
        await a.peers.connect(b.address)
        await a.peers.connect(c.address)
        began_s = asyncio.get_running_loop().time()
        await b.peers.close()
        fabric.crash(C)
        await asyncio.sleep(0.1)
        assert {peer for peer, _, _ in a.lost} == {B, C}
        assert all(at_s - began_s < 0.1 for _, _, at_s in a.lost)
        assert next(reason for peer, reason, _ in a.lost if peer == B).endswith("leaving")
        assert b.lost == [], "closing ourselves is no loss"
        with pytest.raises(LinkClosed):
            await a.peers.send(c.address, rows(0))
        await close(a)

    run_virtual(main())


def test_a_probe_tells_the_living_from_the_dead() -> None:
    async def main() -> None:
        fabric = MemoryFabric(latency_s=0.01)
        a, b = await parties(fabric, A, B)
        assert not await a.peers.probe(B, 0.2), "not connected"
        await a.peers.connect(b.address)
        assert await a.peers.probe(B, 0.2)
        await asyncio.sleep(0.3)
        fabric.cut(A, B)
        assert not await a.peers.probe(B, 0.2)
        assert [(peer, "probe" in reason) for peer, reason, _ in a.lost] == [(B, True)]
        await close(a, b)

    run_virtual(main())


def test_links_dialled_by_both_at_once_count_as_one_peer() -> None:
    async def main() -> None:
        fabric = MemoryFabric(latency_s=0.01)
        a, b = await parties(fabric, A, B)
        await asyncio.gather(a.peers.connect(b.address), b.peers.connect(a.address))
        await asyncio.sleep(0.1)
        links = [link for link in fabric._links if link.here == A]
        assert len(links) == 2
        for i in range(50):
            await a.peers.send(b.address, rows(i))
        await asyncio.sleep(0.1)
        assert b.frames == [(A, i) for i in range(50)]
        links[0].abort("test")
        await asyncio.sleep(0.1)
        assert a.lost == [] and b.lost == []
        await a.peers.send(b.address, rows(50))
        await asyncio.sleep(0.1)
        assert b.frames[-1] == (A, 50)
        links[1].abort("test")
        await asyncio.sleep(0.1)
        assert len(a.lost) == 1 and len(b.lost) == 1
        await close(a, b)

    run_virtual(main())


def test_a_restarted_peer_is_reported_lost_before_it_is_used_again() -> None:
    async def main() -> None:
        fabric = MemoryFabric()
        a, b = await parties(fabric, A, B)
        await b.peers.connect(a.address)
        await asyncio.sleep(0.1)
        fabric.cut(A, B)  # the old process is frozen: nobody is told
        old = next(link for link in fabric._links if link.here == A)
        await b.endpoint.close()
        fabric.heal(A, B)
        reborn = Party(fabric, B)
        await reborn.peers.start()
        await reborn.peers.connect(a.address)
        await asyncio.sleep(0.1)
        assert [(peer, reason) for peer, reason, _ in a.lost] == [(B, "the peer's process was restarted")]
        assert not old.post(rows(0))
        assert a.peers.post(B, rows(1))
        await asyncio.sleep(0.1)
        assert reborn.frames == [(A, 1)] and b.frames == []
        await close(a, b, reborn)

    run_virtual(main())


def test_garbage_poison_and_rudeness_close_their_own_link_only() -> None:
    async def main() -> None:
        fabric = MemoryFabric()
        a, b, c = await parties(fabric, A, B, C)
        await c.peers.connect(a.address)
        await b.peers.connect(a.address)
        await b.peers.send(a.address, rows(0, b"poison"))
        await asyncio.sleep(0.1)
        assert [peer for peer, _, _ in a.lost] == [B]
        raw = fabric.endpoint(node_id(0xD))
        garbage = await raw.connect(a.address)
        garbage.inject(b"\xff" * 100)
        rude = await raw.connect(a.address)
        await rude.send(rows(1))
        silent = await raw.connect(a.address)
        twice = await raw.connect(a.address)
        for _ in range(2):
            await twice.send(Frame(Hello(version_min=1, version_max=1)))
        await asyncio.sleep(0.1)
        for link, words in ((garbage, "closed"), (rude, "expected hello first, got Rows"), (twice, "got a second")):
            with pytest.raises(LinkClosed, match=words):
                while True:
                    await link.receive()
        await asyncio.sleep(peers_module.HANDSHAKE_TIMEOUT_S)
        with pytest.raises(LinkClosed):
            while True:
                await silent.receive()
        await c.peers.send(a.address, rows(9))
        await asyncio.sleep(0.1)
        assert a.frames == [(C, 9)] and {peer for peer, _, _ in a.lost} <= {B, node_id(0xD)}
        await close(a, b, c)

    run_virtual(main())


def test_versions_are_negotiated_by_name() -> None:
    async def main() -> None:
        fabric = MemoryFabric()
        (a,) = await parties(fabric, A)
        future = fabric.endpoint(B)

        async def answer() -> None:
            async for link in future.accept():
                await link.send(Frame(Hello(version_min=90, version_max=99)))

        answering = asyncio.create_task(answer())
        with pytest.raises(ProtocolVersionMismatch, match="90 to 99; update"):
            await a.peers.connect(future.address)
        assert a.peers.connected() == frozenset() and a.lost == []
        answering.cancel()
        await close(a)

    run_virtual(main())


def test_inbound_links_are_bounded_per_peer() -> None:
    async def main() -> None:
        fabric = MemoryFabric()
        (a,) = await parties(fabric, A)
        raw = fabric.endpoint(B)
        links: list[MemoryLink] = [await raw.connect(a.address) for _ in range(MAX_LINKS_PER_PEER + 1)]
        for link in links[:-1]:
            await link.send(Frame(Hello(version_min=1, version_max=1)))
            await asyncio.sleep(0.01)
        with pytest.raises(LinkClosed, match="too many"):
            await links[-1].receive()
        await links[0].send(Frame(Ping(nonce=5)))
        await asyncio.sleep(0.1)
        kinds = [type((await links[0].receive()).header).__name__ for _ in range(3)]
        assert kinds == ["Hello", "Ping", "Pong"]
        await close(a)

    run_virtual(main())


def test_a_cancelled_send_does_not_disturb_others_that_share_its_dial() -> None:
    async def main() -> None:
        a, b = await parties(MemoryFabric(latency_s=0.1), A, B)
        first = asyncio.create_task(a.peers.send(b.address, rows(1)))
        second = asyncio.create_task(a.peers.send(b.address, rows(2)))
        await asyncio.sleep(0.05)
        first.cancel()
        await second
        await asyncio.sleep(0.5)
        assert b.frames == [(A, 2)] and first.cancelled()
        await close(a, b)

    run_virtual(main())


def test_dialling_where_nothing_passes_gives_up_in_bounded_time() -> None:
    async def main() -> None:
        fabric = MemoryFabric()
        a, b = await parties(fabric, A, B)
        fabric.cut(A, B)
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(LinkClosed, match="did not answer"):
            await a.peers.connect(b.address)
        assert asyncio.get_running_loop().time() - began_s <= 5.1
        await close(a, b)

    run_virtual(main())
