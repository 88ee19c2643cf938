"""Links are for those who show a passport of this network, for as long as it is good, and for nobody else."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from fallow.domain.credentials import PASSPORT_GRACE_S, PASSPORT_LIFE_S, Role
from fallow.domain.errors import LinkClosed, PassportRefused
from fallow.domain.frames import Credentials, Frame, Hello, PeerAddress, Ping
from fallow.domain.ids import NodeId
from fallow.fabric.memory import MemoryFabric
from fallow.fabric.peers import Peers
from fallow.simulator.virtual_time import run_virtual
from fallow.trust.admission import Doorkeeper
from fallow.trust.keys import Identity, identity_of
from fallow.trust.passports import PassportReader
from tests.unit.fabric.support import rows
from tests.unit.trust.grant_world import GATEWAY, NODE, STRANGER, SetClock, passport, reader, revoke


class Party:
    """A process with a key and a passport."""

    def __init__(self, fabric: MemoryFabric, who: Identity, text: str, clock: SetClock) -> None:
        self.node = who.node
        self.text = text
        self.clock = clock
        self.passports: PassportReader = reader(clock)
        self.endpoint = fabric.endpoint(who.node)
        self.frames: list[NodeId] = []
        self.lost: list[str] = []
        self.peers = Peers(
            self.endpoint,
            clock,
            role="node",
            admission=Doorkeeper(lambda: self.text, self.passports, clock.unix_s),
            on_frame=lambda peer, _: self.frames.append(peer),
            on_lost=lambda _, reason: self.lost.append(reason),
        )

    @property
    def address(self) -> PeerAddress:
        return self.endpoint.address


Script = Callable[[MemoryFabric, SetClock, Party], Awaitable[None]]


def run(script: Script) -> None:
    """With a device that is up and admits by passports."""

    async def main() -> None:
        fabric, clock = MemoryFabric(latency_s=0.001), SetClock()
        node = Party(fabric, NODE, passport(NODE, Role.NODE), clock)
        await node.peers.start()
        try:
            await script(fabric, clock, node)
        finally:
            await node.peers.close()

    run_virtual(main())


def test_parties_of_one_network_admit_each_other_and_know_their_roles() -> None:
    async def script(fabric: MemoryFabric, clock: SetClock, node: Party) -> None:
        gateway = Party(fabric, GATEWAY, passport(GATEWAY, Role.GATEWAY), clock)
        await gateway.peers.start()
        await gateway.peers.send(node.address, rows(1))
        await asyncio.sleep(0.1)
        assert node.frames == [GATEWAY.node]
        assert node.peers.role(GATEWAY.node) is Role.GATEWAY and gateway.peers.role(NODE.node) is Role.NODE
        assert node.peers.role(STRANGER.node) is None
        await gateway.peers.close()

    run(script)


FOREIGN = identity_of(b"another network's account.......")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage",
        passport(NODE, Role.GATEWAY),
        passport(STRANGER, Role.GATEWAY, account=FOREIGN),
        passport(STRANGER, Role.GATEWAY, at_s=1_800_000_000.0 - PASSPORT_LIFE_S - PASSPORT_GRACE_S - 1),
        passport(STRANGER, Role.GATEWAY, at_s=1_800_000_000.0 + PASSPORT_GRACE_S + 1),
        passport(STRANGER, Role.READER),
        passport(STRANGER, Role.OPERATOR),
    ],
    ids=["none", "garbage", "of another key", "another network", "expired", "of tomorrow", "a reader", "an operator"],
)
def test_a_stranger_gets_no_link_and_nothing_that_it_sends_is_believed(text: str) -> None:
    async def script(fabric: MemoryFabric, _: SetClock, node: Party) -> None:
        link = await fabric.endpoint(STRANGER.node).connect(node.address)
        for frame in (Frame(Hello(version_min=1, version_max=1, role="gateway", passport=text)), rows(1)):
            await link.send(frame)
        with pytest.raises(LinkClosed, match="not_admitted"):
            while True:
                assert not isinstance((await link.receive()).header, Ping), "a stranger is asked for nothing"
        assert node.frames == [] and node.peers.connected() == frozenset()

    run(script)


def test_nothing_is_believed_or_answered_before_the_hello() -> None:
    async def script(fabric: MemoryFabric, _: SetClock, node: Party) -> None:
        stranger = fabric.endpoint(STRANGER.node)
        for first in (Frame(Ping(nonce=1)), rows(1), Frame(Credentials(passport=passport(STRANGER, Role.GATEWAY)))):
            link = await stranger.connect(node.address)
            await link.send(first)
            with pytest.raises(LinkClosed, match="hello first"):
                while True:
                    assert isinstance((await link.receive()).header, Hello)
        assert node.frames == []

    run(script)


def test_who_dials_checks_whom_it_reached() -> None:
    async def script(fabric: MemoryFabric, clock: SetClock, node: Party) -> None:
        node.text = passport(STRANGER, Role.NODE)
        gateway = Party(fabric, GATEWAY, passport(GATEWAY, Role.GATEWAY), clock)
        await gateway.peers.start()
        with pytest.raises(LinkClosed, match="not_admitted"):
            await gateway.peers.send(node.address, rows(1))
        assert gateway.peers.connected() == frozenset()
        await gateway.peers.close()

    run(script)


def test_a_link_outlives_its_passports_only_when_newer_ones_are_shown() -> None:
    async def script(fabric: MemoryFabric, clock: SetClock, node: Party) -> None:
        gateway = Party(fabric, GATEWAY, passport(GATEWAY, Role.GATEWAY), clock)
        silent = Party(fabric, STRANGER, passport(STRANGER, Role.GATEWAY), clock)
        for party in (gateway, silent):
            await party.peers.start()
            await party.peers.connect(node.address)
        for _ in range(4):
            await asyncio.sleep(PASSPORT_LIFE_S / 2)
            clock.now_s += PASSPORT_LIFE_S / 2
            for party, who, role in ((gateway, GATEWAY, Role.GATEWAY), (node, NODE, Role.NODE)):
                party.text = passport(who, role, at_s=clock.now_s)
        await asyncio.sleep(2)
        assert node.peers.connected() == {GATEWAY.node}
        assert gateway.lost == [] and "ran out" in silent.lost[0]
        await gateway.peers.close()
        await silent.peers.close()

    run(script)


def test_a_bad_renewal_ends_a_link() -> None:
    async def script(fabric: MemoryFabric, clock: SetClock, node: Party) -> None:
        gateway = Party(fabric, GATEWAY, passport(GATEWAY, Role.GATEWAY), clock)
        await gateway.peers.start()
        await gateway.peers.connect(node.address)
        await asyncio.sleep(0.1)
        gateway.text = passport(STRANGER, Role.GATEWAY)
        await asyncio.sleep(1)
        assert node.peers.connected() == frozenset() and "not_admitted" in gateway.lost[0]
        await gateway.peers.close()

    run(script)


def test_the_revoked_lose_their_links_at_once_and_get_none_again() -> None:
    async def script(fabric: MemoryFabric, clock: SetClock, node: Party) -> None:
        gateway = Party(fabric, GATEWAY, passport(GATEWAY, Role.GATEWAY), clock)
        await gateway.peers.start()
        await gateway.peers.connect(node.address)
        await asyncio.sleep(0.1)
        revoke(node.passports, GATEWAY.node)
        await asyncio.sleep(0.3)
        assert node.peers.connected() == frozenset() and "revoked" in gateway.lost[0]
        await gateway.peers.connect(node.address)
        await asyncio.sleep(0.1)
        assert node.peers.connected() == frozenset()
        await gateway.peers.close()

    run(script)


def test_a_peer_can_be_dropped_by_name() -> None:
    async def script(fabric: MemoryFabric, clock: SetClock, node: Party) -> None:
        gateway = Party(fabric, GATEWAY, passport(GATEWAY, Role.GATEWAY), clock)
        await gateway.peers.start()
        await gateway.peers.connect(node.address)
        await asyncio.sleep(0.1)
        node.peers.drop(GATEWAY.node, "quarantined")
        assert gateway.peers.post(NODE.node, rows(1))
        await asyncio.sleep(0.1)
        assert node.frames == [], "what was under way is not believed either"
        assert "quarantined" in gateway.lost[0]
        await gateway.peers.close()

    run(script)


def test_the_doorkeeper_names_what_it_misses() -> None:
    clock = SetClock()
    door = Doorkeeper(lambda: "ours", reader(clock), clock.unix_s)
    assert door.passport == "ours"
    with pytest.raises(PassportRefused, match="showed none"):
        door.admit(NODE.node, "")
