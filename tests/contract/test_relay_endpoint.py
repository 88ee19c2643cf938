"""Which way a device dials: socket, direct, or the sealed relay; by policy, and by what answers first.

The races run on virtual time, with in-memory links of a set latency in the place of direct ones; what is opened by
policy runs on the real fabrics.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fallow.domain.errors import BusUnavailable, ConfigError, LinkClosed
from fallow.domain.frames import PeerAddress, Rows
from fallow.fabric import endpoint as endpoint_module
from fallow.fabric.contract import DIAL_TIMEOUT_S, LinkEndpoint
from fallow.fabric.endpoint import CompositeEndpoint, open_endpoint
from fallow.fabric.iroh_link import IrohEndpoint, IrohLink
from fallow.fabric.local_handshake import Identity
from fallow.fabric.local_link import LocalLink
from fallow.fabric.memory import MemoryFabric, MemoryLink
from fallow.fabric.sealed_endpoint import RelayEndpoint
from fallow.fabric.sealed_link import SealedLink
from fallow.policy.relay import DIRECT_FAILURE_KEPT_S, HEAD_START_S, SHORT_HEAD_START_S, RelayUse
from tests.unit.fabric.support import eventually, rows, run_virtual

SEEDS = (b"\x01" * 32, b"\x02" * 32)
A, B = (Identity.from_seed(seed).node for seed in SEEDS)
BOB = PeerAddress(B, ("192.0.2.1:4433", "relay:test"))
NO_RELAY = PeerAddress(B, ("192.0.2.1:4433",))


class Pair:
    """Two devices with a direct way (in-memory links) and a relay."""

    def __init__(self, fabric: MemoryFabric, ends: list[CompositeEndpoint], relays: list[RelayEndpoint]) -> None:
        self.fabric = fabric
        self.alice, self.bob = ends
        self.relays = relays

    async def dial(self, address: PeerAddress = BOB) -> tuple[object, float]:
        """The link, and how long it took."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        link = await self.alice.connect(address)
        return link, loop.time() - began_s


@asynccontextmanager
async def pair(use: RelayUse = RelayUse.WHEN_NEEDED) -> AsyncIterator[Pair]:
    fabric = MemoryFabric()
    relays = [
        await RelayEndpoint.open(fabric.bus(node), "test", seed) for node, seed in zip((A, B), SEEDS, strict=True)
    ]
    ends = [
        CompositeEndpoint(node, direct=fabric.endpoint(node), relay=relay, relay_use=use)
        for node, relay in zip((A, B), relays, strict=True)
    ]
    try:
        yield Pair(fabric, ends, relays)
    finally:
        for end in ends:
            await end.close()


def test_a_direct_way_that_answers_in_time_is_taken() -> None:
    async def main() -> None:
        async with pair() as p:
            p.fabric.set_latency(A, B, 0.1)
            link, took_s = await p.dial()
            assert isinstance(link, MemoryLink) and took_s == pytest.approx(0.2)
            assert not p.relays[1]._handshakes and not p.relays[1]._links, "the relay was not asked"

    run_virtual(main())


def test_a_direct_way_that_is_silent_costs_half_a_second_once_and_less_after_that() -> None:
    async def main() -> None:
        async with pair() as p:
            p.fabric.cut(A, B)
            for wait_s in (HEAD_START_S, SHORT_HEAD_START_S, SHORT_HEAD_START_S):
                link, took_s = await p.dial()
                assert isinstance(link, SealedLink) and took_s == pytest.approx(wait_s, abs=0.01)
                link.abort("next")
            await asyncio.sleep(DIRECT_FAILURE_KEPT_S)
            p.fabric.heal(A, B)
            link, took_s = await p.dial()
            assert isinstance(link, MemoryLink) and took_s < 0.01
            p.fabric.cut(A, B)
            _, took_s = await p.dial()
            assert took_s == pytest.approx(HEAD_START_S, abs=0.01), "what worked again has its head start again"

    run_virtual(main())


def test_a_direct_way_that_fails_at_once_costs_nothing() -> None:
    async def main() -> None:
        async with pair() as p:
            await p.bob._direct.close()  # type: ignore[union-attr]
            link, took_s = await p.dial()
            assert isinstance(link, SealedLink) and took_s < 0.01

    run_virtual(main())


def test_a_direct_way_that_is_only_late_is_learnt_from_and_let_go() -> None:
    async def main() -> None:
        async with pair() as p:
            p.fabric.set_latency(A, B, 1.0)  # a direct dial takes two seconds, and succeeds
            link, took_s = await p.dial()
            assert isinstance(link, SealedLink) and took_s == pytest.approx(HEAD_START_S, abs=0.01)
            accepted = await anext(p.bob.accept())
            assert isinstance(accepted, SealedLink)
            assert B in p.alice._direct_failed_s
            await asyncio.sleep(5)
            assert B not in p.alice._direct_failed_s, "it works"
            assert not p.fabric._links and not p.alice._attempts
            with pytest.raises(LinkClosed):
                await (await anext(p.bob.accept())).receive()
            await link.send(rows(7))
            assert isinstance((await accepted.receive()).header, Rows)

    run_virtual(main())


def test_closing_ends_dials_that_run_on() -> None:
    async def main() -> None:
        async with pair() as p:
            p.fabric.cut(A, B)
            await p.dial()
            assert p.alice._attempts
            await p.alice.close()
            assert not p.alice._attempts
            p.fabric.heal(A, B)
            await asyncio.sleep(DIAL_TIMEOUT_S)
            assert not p.fabric._links

    run_virtual(main())


def test_a_direct_way_that_comes_up_late_wins_where_nobody_listens_on_the_relay() -> None:
    async def main() -> None:
        async with pair() as p:
            await p.relays[1].close()
            p.fabric.set_latency(A, B, 1.0)
            link, took_s = await p.dial()
            assert isinstance(link, MemoryLink) and took_s == pytest.approx(2.0)

    run_virtual(main())


def test_when_no_way_leads_there_it_is_said_in_time() -> None:
    async def main() -> None:
        async with pair() as p:
            await p.relays[1].close()
            p.fabric.cut(A, B)
            began_s = asyncio.get_running_loop().time()
            with pytest.raises(LinkClosed):
                await p.alice.connect(BOB)
            assert asyncio.get_running_loop().time() - began_s <= DIAL_TIMEOUT_S
            with pytest.raises(LinkClosed, match="no way"):
                await p.alice.connect(PeerAddress(B, ()))

    run_virtual(main())


def test_a_dial_that_is_cancelled_ends_both_attempts() -> None:
    async def main() -> None:
        async with pair() as p:
            p.fabric.cut(A, B)
            p.fabric.hub.stop()  # neither way answers
            p.fabric.hub.running = True
            dialling = asyncio.create_task(p.alice.connect(BOB))
            await asyncio.sleep(HEAD_START_S / 2)
            dialling.cancel()
            await asyncio.wait({dialling})
            p.fabric.heal(A, B)
            await asyncio.sleep(DIAL_TIMEOUT_S)
            assert not p.fabric._links and not p.relays[0]._links and not p.relays[1]._links

    run_virtual(main())


@pytest.mark.parametrize("use", RelayUse)
def test_the_policy_decides(use: RelayUse) -> None:
    async def main() -> None:
        async with pair(use) as p:
            if use is RelayUse.ONLY:
                link, took_s = await p.dial()
                assert isinstance(link, SealedLink) and took_s < 0.01
                with pytest.raises(LinkClosed, match="no way"):
                    await p.alice.connect(NO_RELAY)
                return
            assert isinstance((await p.dial())[0], MemoryLink)
            p.fabric.cut(A, B)
            if use is RelayUse.NEVER:
                with pytest.raises(LinkClosed, match="did not answer"):
                    await p.alice.connect(BOB)
            else:
                assert isinstance((await p.dial())[0], SealedLink)

    run_virtual(main())


def test_how_many_failures_are_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FAILURES_KEPT_MAX", 3)

    async def main() -> None:
        async with pair() as p:
            for number in range(10):
                with pytest.raises(LinkClosed):
                    await p.alice.connect(PeerAddress(Identity.from_seed(bytes([number + 9] * 32)).node, BOB.endpoints))
            assert len(p.alice._direct_failed_s) == 3

    run_virtual(main())


# --- the real fabrics -----------------------------------------------------------------------------


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 30))


async def opened(fabric: MemoryFabric, use: RelayUse, folder: Path | None) -> list[LinkEndpoint]:
    return [
        await open_endpoint(seed, socket_dir=folder, relay=(fabric.bus(node), "test"), relay_use=use)
        for node, seed in zip((A, B), SEEDS, strict=True)
    ]


def test_relay_only_opens_no_port_and_no_socket() -> None:
    async def main() -> None:
        with tempfile.TemporaryDirectory(prefix="fl") as folder:
            a, b = await opened(MemoryFabric(), RelayUse.ONLY, Path(folder) / "s")
            assert b.address.endpoints == ("relay:test",) and not (Path(folder) / "s").exists()
            near, far = await asyncio.gather(a.connect(b.address), anext(b.accept()))
            assert isinstance(near, SealedLink) and isinstance(far, SealedLink)
            assert (near.peer, far.peer) == (B, A)
            for end in (a, b):
                await end.close()

    run(main())


def test_an_address_offers_every_way_and_each_is_taken_in_its_turn() -> None:
    async def main() -> None:
        with tempfile.TemporaryDirectory(prefix="fl") as folder:
            a, b = await opened(MemoryFabric(), RelayUse.WHEN_NEEDED, Path(folder) / "s")
            offered = b.address.endpoints
            assert offered[0].startswith("unix:") and offered[-1] == "relay:test" and len(offered) >= 3
            for kind, ways in (
                (LocalLink, offered),
                (IrohLink, offered[1:]),
                (SealedLink, offered[-1:]),
            ):
                async with asyncio.timeout(3):
                    near, far = await asyncio.gather(a.connect(PeerAddress(B, ways)), anext(b.accept()))
                assert isinstance(near, kind) and isinstance(far, kind)
                await near.close()
            for end in (a, b):
                await end.close()

    run(main())


def test_an_address_that_nobody_is_at_does_not_cost_a_dials_whole_timeout() -> None:
    async def main() -> None:
        a, b = await opened(MemoryFabric(), RelayUse.WHEN_NEEDED, None)
        async with asyncio.timeout(DIAL_TIMEOUT_S / 2):
            near, far = await asyncio.gather(
                a.connect(PeerAddress(B, ("127.0.0.1:9", "relay:test"))), anext(b.accept())
            )
        assert isinstance(near, SealedLink) and isinstance(far, SealedLink)
        for end in (a, b):
            await end.close()

    run(main())


def test_without_a_relay_its_part_of_an_address_is_passed_over() -> None:
    async def main() -> None:
        a = await open_endpoint(SEEDS[0])
        assert isinstance(a, IrohEndpoint)
        b = (await opened(MemoryFabric(), RelayUse.WHEN_NEEDED, None))[1]
        near, far = await asyncio.gather(a.connect(b.address), anext(b.accept()))
        assert isinstance(near, IrohLink) and far.peer == A
        never = await open_endpoint(SEEDS[0], relay=(MemoryFabric().bus(A), "test"), relay_use=RelayUse.NEVER)
        assert not any(way.startswith("relay:") for way in never.address.endpoints)
        for end in (a, b, never):
            await end.close()

    run(main())


def test_a_relay_that_cannot_be_had_is_said_at_once() -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match="relay only"):
            await open_endpoint(SEEDS[0], relay_use=RelayUse.ONLY)
        bus = MemoryFabric().bus(A)
        await bus.close()
        with pytest.raises(BusUnavailable):
            await open_endpoint(SEEDS[0], relay=(bus, "test"))

    run(main())


def test_closing_an_endpoint_tells_every_peer() -> None:
    async def main() -> None:
        a, b = await opened(MemoryFabric(), RelayUse.ONLY, None)
        near, far = await asyncio.gather(a.connect(b.address), anext(b.accept()))
        await a.close()
        with pytest.raises(LinkClosed):
            await asyncio.wait_for(far.receive(), 1)
        assert isinstance(b, CompositeEndpoint) and b._relay is not None
        await eventually(lambda: not b._relay._links)  # type: ignore[union-attr]
        with pytest.raises(LinkClosed):
            await near.send(rows(1))
        await b.close()

    run(main())


def test_links_end_when_the_bus_is_closed_under_them() -> None:
    async def main() -> None:
        fabric = MemoryFabric()
        buses = [fabric.bus(node) for node in (A, B)]
        a, b = [await RelayEndpoint.open(bus, "test", seed) for bus, seed in zip(buses, SEEDS, strict=True)]
        near, _ = await asyncio.gather(a.connect(b.address), anext(b.accept()))
        await buses[0].close()
        near.post(rows(1))
        with pytest.raises(LinkClosed, match="relay broke"):
            await asyncio.wait_for(near.receive(), 1)
        assert not a._links
        await a.close()
        await b.close()

    run(main())


def test_messages_lost_while_the_bus_was_away_end_the_link_by_name() -> None:
    async def main() -> None:
        fabric = MemoryFabric()
        a, b = [await RelayEndpoint.open(fabric.bus(n), "test", s) for n, s in zip((A, B), SEEDS, strict=True)]
        near, far = await asyncio.gather(a.connect(b.address), anext(b.accept()))
        fabric.hub.stop()
        near.post(rows(1))
        await eventually(lambda: near._queued_bytes == 0)
        fabric.hub.start()
        near.post(rows(2))
        with pytest.raises(LinkClosed, match="lost or held back"):
            await asyncio.wait_for(far.receive(), 1)
        for end in (a, b):
            await end.close()

    run(main())
