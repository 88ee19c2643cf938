"""Goal: the simulated network takes the time that its figures say, keeps streams in order, and breaks as it should.

Method: raw links and buses between a few sites on virtual time; the expected times are worked out by hand.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.frames import Chunk, FetchChunk, Frame, PeerAddress, Phase, Rows
from fallow.domain.ids import Digest, NodeId, SessionId
from fallow.fabric.memory import MemoryLink
from fallow.fabric.memory_bus import Message
from fallow.fabric.peers import Peers
from fallow.simulator.disk import TRANSFER_BYTES
from fallow.simulator.line import Uplink
from fallow.simulator.network import WATCH, SimulatedClock, SimulatedHub, SimulatedNetwork, Site
from fallow.simulator.scenario import Network
from fallow.simulator.streams import Streams
from fallow.simulator.virtual_time import run_virtual
from fallow.trust.open_doors import OpenAdmission

T = TypeVar("T")
A, B, C = (NodeId(letter * 64) for letter in "abc")
QUIET = Network(jitter_share=0.0, loss=0.0)
ROW_BYTES = 8192


def site(region: str = "here", rate: float = 1e6, blocked: float = 0.0) -> Site:
    return Site(
        region=region, uplink_bytes_per_s=rate, downlink_bytes_per_s=10 * rate, metro_rtt_s=0.02, nat_blocked=blocked
    )


def with_network(
    test: Callable[[SimulatedNetwork], Awaitable[T]], figures: Network = QUIET, seed: int = 1, **sites: Site
) -> T:
    async def program() -> T:
        network = SimulatedNetwork(
            figures, site(), Streams(seed), ROW_BYTES, SimulatedHub(lambda *_: None), lambda *_: None
        )
        for name, where in sites.items():
            network.settle(NodeId(name * 64), where)
        return await test(network)

    return run_virtual(program())


def rows(count: int, position: int = 0) -> Frame:
    header = Rows(
        session=SessionId("0" * 32), epoch=1, position=position, count=count, phase=Phase.PREFILL, logits_from=0,
        top_k=1,
    )  # fmt: skip
    return Frame(header, bytes(8 * count))


async def linked(
    network: SimulatedNetwork, a: NodeId = A, b: NodeId = B, near: MemoryLink | None = None
) -> tuple[MemoryLink, MemoryLink]:
    """Both ends of a new link; `near` is one that the dialling endpoint has already."""
    far = network.endpoint(b)
    link = await (network.endpoint(a).connect(far.address) if near is None else network.dial(a, b))
    other = await anext(far.accept())
    assert isinstance(other, MemoryLink)
    return link, other


async def took_s(one: MemoryLink, other: MemoryLink, frame: Frame | FetchChunk) -> float:
    """Until a frame that is sent now has come, and whatever was before it on the link."""
    frame = frame if isinstance(frame, Frame) else Frame(frame)
    began_s = asyncio.get_running_loop().time()
    await one.send(frame)
    while (await other.receive()).header != frame.header:
        pass
    return asyncio.get_running_loop().time() - began_s


def test_activations_take_the_senders_uplink_and_the_way() -> None:
    async def test(network: SimulatedNetwork) -> tuple[float, float]:
        one, other = await linked(network)
        began_s = asyncio.get_running_loop().time()
        await one.send(rows(64))
        await other.receive()
        return asyncio.get_running_loop().time() - began_s, network.latency_s(A, B)

    took_s, way_s = with_network(test, a=site(), b=site())
    assert took_s == pytest.approx(64 * ROW_BYTES / 1e6 + way_s, abs=0.002)


def test_frames_queue_behind_each_other_and_stay_in_order() -> None:
    async def test(network: SimulatedNetwork) -> tuple[list[int], float]:
        one, other = await linked(network)
        began_s = asyncio.get_running_loop().time()
        for index in range(5):
            await one.send(rows(10, index))
        came = [(await other.receive()).header.position for _ in range(5)]
        return came, asyncio.get_running_loop().time() - began_s

    came, took_s = with_network(test, Network(jitter_share=0.5, loss=0.2), a=site(), b=site())
    assert came == [0, 1, 2, 3, 4]
    assert took_s > 5 * 10 * ROW_BYTES / 1e6


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 32))
def test_jitter_and_loss_only_ever_delay(seed: int) -> None:
    async def test(network: SimulatedNetwork) -> tuple[float, float]:
        one, other = await linked(network)
        return await took_s(one, other, rows(12)), network.latency_s(A, B)

    passed_s, way_s = with_network(test, Network(jitter_share=0.5, loss=0.1), seed, a=site(), b=site())
    assert passed_s >= 12 * ROW_BYTES / 1e6 + way_s


def test_links_share_an_uplink_and_nothing_waits_for_another_links_rows() -> None:
    async def test(network: SimulatedNetwork) -> list[float]:
        bulky, _ = await linked(network)
        other, far = await linked(network, A, C, near=bulky)
        alone_s = await took_s(other, far, FetchChunk(digest=Digest("0" * 64), index=0))
        for index in range(8):
            await bulky.send(rows(64, index))
        few_s = await took_s(other, far, FetchChunk(digest=Digest("0" * 64), index=0))
        many_s = await took_s(other, far, rows(10))
        behind_s = await took_s(bulky, bulky.other, rows(1, 9))
        return [alone_s, few_s, many_s - network.latency_s(A, C), behind_s]

    alone_s, few_s, many_s, behind_s = with_network(test, a=site(), b=site(), c=site())
    assert few_s < alone_s + 0.001, "control does not wait for what other links send"
    assert many_s == pytest.approx(2 * 10 * ROW_BYTES / 1e6, rel=0.05), "half of the line"
    assert behind_s > 3.0, "but on one link all is in order"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 200_000), st.floats(0, 1)), min_size=1, max_size=30))
def test_an_uplink_loses_no_time_and_keeps_each_links_order(sent: list[tuple[int, int, float]]) -> None:
    async def test() -> tuple[list[tuple[float, int, int]], float]:
        loop = asyncio.get_running_loop()
        left: list[tuple[float, int, int]] = []
        uplink: Uplink[int, int] = Uplink(lambda _: 1e5, lambda flow, piece: left.append((loop.time(), flow, piece)))
        busy_until_s = 0.0
        for number, (flow, size, after_s) in enumerate(sent):
            await asyncio.sleep(after_s)
            busy_until_s = max(busy_until_s, loop.time()) + size / 1e5
            uplink.enter(flow, number, size)
        await asyncio.sleep(1000.0)
        assert uplink.flow_count == 0
        return left, busy_until_s

    left, busy_until_s = run_virtual(test())
    assert sorted(piece for _, _, piece in left) == list(range(len(sent)))
    assert left[-1][0] == pytest.approx(busy_until_s)
    for flow in range(4):
        pieces = [piece for _, of, piece in left if of == flow]
        assert pieces == sorted(pieces)


def test_what_an_ended_link_had_to_send_takes_no_time_of_others() -> None:
    async def test(network: SimulatedNetwork) -> float:
        bulky, _ = await linked(network)
        other, far = await linked(network, A, C, near=bulky)
        for index in range(8):
            await bulky.send(rows(64, index))
        bulky.abort("over")
        return await took_s(other, far, rows(10)) - network.latency_s(A, C)

    assert with_network(test, a=site(), b=site(), c=site()) == pytest.approx(10 * ROW_BYTES / 1e6, rel=0.05)


def test_a_model_file_takes_its_declared_size_and_halves_what_passes_beside_it() -> None:
    async def test(network: SimulatedNetwork) -> tuple[float, float]:
        one, other = await linked(network)
        began_s = asyncio.get_running_loop().time()
        await one.send(Frame(Chunk(digest=Digest("0" * 64), index=0, found=True), b"tiny"))
        beside, far = await linked(network, A, C, near=one)
        beside_s = await took_s(beside, far, rows(12))
        await other.receive()
        return asyncio.get_running_loop().time() - began_s, beside_s - network.latency_s(A, C)

    passed_s, beside_s = with_network(test, a=site(), b=site(), c=site())
    assert passed_s == pytest.approx(TRANSFER_BYTES / 1e6, rel=0.02)
    assert beside_s == pytest.approx(2 * 12 * ROW_BYTES / 1e6, rel=0.02)


def test_regions_and_relays_make_the_way_longer() -> None:
    async def test(network: SimulatedNetwork) -> list[float]:
        return [network.latency_s(A, B), network.latency_s(A, C), network.latency_s(B, C)]

    figures = Network(jitter_share=0, loss=0, regions_rtt_s={"here/far": 1.0}, relay_extra_s=5.0)
    near, far, relayed = with_network(test, figures, a=site(), b=site(blocked=1.0), c=site("far", blocked=1.0))
    assert near < 0.05
    assert 0.1 < far < 2.0
    assert relayed > 5.0


def test_a_share_of_pairs_needs_a_relay() -> None:
    async def test(network: SimulatedNetwork) -> int:
        names = [NodeId(f"{index:064x}") for index in range(40)]
        for name in names:
            network.settle(name, site(blocked=0.3))
        pairs = [(a, b) for a in names for b in names if a < b]
        return round(100 * sum(network.latency_s(*pair) > 1.0 for pair in pairs) / len(pairs))

    assert 24 <= with_network(test, Network(relay_extra_s=1.0)) <= 36


def test_a_cut_region_is_silent_and_what_was_held_comes_after_it() -> None:
    async def test(network: SimulatedNetwork) -> tuple[float, float | None, float | None]:
        one, other = await linked(network)
        network.cut_region("far")
        assert network.bus_delay_s(B, C) is None
        await one.send(rows(1))
        began_s = asyncio.get_running_loop().time()
        asyncio.get_running_loop().call_later(3.0, network.heal_region, "far")
        await other.receive()
        waited_s = asyncio.get_running_loop().time() - began_s
        return waited_s, network.bus_delay_s(B, C), network.bus_delay_s(A, C)

    waited_s, healed, inside = with_network(test, a=site(), b=site("far"), c=site())
    assert waited_s == pytest.approx(3.0, abs=0.1)
    assert healed is not None and inside is not None


def test_bus_messages_to_who_is_isolated_are_lost() -> None:
    async def test(network: SimulatedNetwork) -> list[bytes]:
        heard: list[bytes] = []

        async def on_message(_: str, message: bytes) -> None:
            heard.append(message)

        await network.bus(B).subscribe("news", on_message)
        for message, isolated in ((b"one", False), (b"two", True), (b"three", False)):
            (network.isolate if isolated else network.rejoin)(B)
            await network.bus(A).publish("news", message)
            await asyncio.sleep(1.0)
        return heard

    assert with_network(test, a=site(), b=site()) == [b"one", b"three"]


@pytest.mark.parametrize("silent", [True, False])
def test_silence_is_noticed_as_in_the_product_and_a_death_at_once(silent: bool) -> None:
    async def test(network: SimulatedNetwork) -> float:
        clock = SimulatedClock()
        clock.network = network
        lost_s: list[float] = []
        peers = []
        for name in (A, B):
            peer = Peers(
                network.endpoint(name), clock, role="node", admission=OpenAdmission(), on_frame=lambda *_: None,
                on_lost=lambda *_: lost_s.append(clock.monotonic_s()), liveness=WATCH,
            )  # fmt: skip
            await peer.start()
            peers.append(peer)
        await peers[0].connect(PeerAddress(B, ()))
        await asyncio.sleep(500.0)
        assert not lost_s, "an idle link stays"
        began_s = clock.monotonic_s()
        if silent:
            network.isolate(B)
        else:
            network.crash(B)
        await asyncio.sleep(10.0)
        return min(lost_s) - began_s

    noticed_s = with_network(test, a=site(), b=site())
    assert 1.4 <= noticed_s <= 1.8 if silent else noticed_s < 0.1


def test_requests_for_files_are_small() -> None:
    async def test(network: SimulatedNetwork) -> int:
        one, _ = await linked(network)
        await one.send(Frame(FetchChunk(digest=Digest("0" * 64), index=0)))
        return network.bytes_carried

    assert with_network(test, a=site(), b=site()) < 200


def test_messages_of_one_sender_do_not_overtake_each_other() -> None:
    async def test(network: SimulatedNetwork) -> list[Message]:
        heard: list[bytes] = []

        async def on_message(_: str, message: bytes) -> None:
            heard.append(message)

        await network.bus(B).subscribe("news", on_message)
        bus = network.bus(A)
        for index in range(50):
            await bus.publish("news", b"%d" % index)
        await asyncio.sleep(5.0)
        return heard  # type: ignore[return-value]

    assert with_network(test, Network(jitter_share=2.0), a=site(), b=site()) == [b"%d" % index for index in range(50)]
