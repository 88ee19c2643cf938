"""The sealed relay on a bus that lets in members only, over TLS: nodes and gateways, and nobody in another's name."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fallow.domain.credentials import Role
from fallow.domain.errors import LinkClosed, PassportRefused
from fallow.domain.fleet import Subjects
from fallow.domain.frames import PeerAddress, Rows
from fallow.fabric.local_handshake import Identity as LinkIdentity
from fallow.fabric.nats_bus import NatsBus
from fallow.fabric.sealed_endpoint import RelayEndpoint
from tests.contract.networks import CELL, TrustedRig, person, trusted_rig
from tests.unit.fabric.support import rows

ALICE, BOB, EVE = (person(name) for name in ("alice", "bob", "eve"))


class Cell:
    """A trusted bus."""

    def __init__(self, rig: TrustedRig) -> None:
        self._rig = rig

    async def join(self, name: str, role: Role = Role.NODE) -> NatsBus:
        return await self._rig.join(self._rig.network.member(person(name), role))

    async def relay(self, name: str, role: Role) -> RelayEndpoint:
        return await RelayEndpoint.open(await self.join(name, role), CELL, person(name).seed)


@asynccontextmanager
async def cell(state: Path) -> AsyncIterator[Cell]:
    async with trusted_rig(state) as rig:
        yield Cell(rig)


@pytest.mark.parametrize(
    ("dials", "is_dialled"), [(Role.NODE, Role.NODE), (Role.GATEWAY, Role.NODE), (Role.NODE, Role.GATEWAY)]
)
def test_members_have_the_rights_that_a_relayed_link_takes(dials: Role, is_dialled: Role, tmp_path: Path) -> None:
    async def main() -> None:
        async with cell(tmp_path) as members:
            a, b = await members.relay("alice", dials), await members.relay("bob", is_dialled)
            near, far = await asyncio.gather(a.connect(b.address), anext(b.accept()))
            big = bytes(2_000_000)
            for from_, to in ((near, far), (far, near)):
                sending = asyncio.create_task(from_.send(rows(1, big)))
                frame = await to.receive()
                await sending
                assert isinstance(frame.header, Rows) and frame.payload == big
            await near.close("done", "for today")
            with pytest.raises(LinkClosed, match="for today"):
                await far.receive()
            for end in (a, b):
                await end.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_member_speaks_on_the_relay_under_its_own_name_only(tmp_path: Path) -> None:
    async def main() -> None:
        async with cell(tmp_path) as members:
            a, b = await members.relay("alice", Role.NODE), await members.relay("bob", Role.NODE)
            near, far = await asyncio.gather(a.connect(b.address), anext(b.accept()))
            eve = await members.join("eve")
            subjects = Subjects(CELL)
            record = near._seals.sealer.seal(b"")  # as if Eve had caught it
            near._seals.sealer._count -= 1
            await eve.publish(subjects.relay(BOB.node, ALICE.node), record)  # refused by the bus
            await eve.publish(subjects.relay(BOB.node, EVE.node), record)  # allowed, and touches nobody's link
            await eve.close()
            await near.send(rows(5))
            frame = await far.receive()
            assert isinstance(frame.header, Rows) and frame.header.position == 5
            for end in (a, b):
                await end.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_who_may_not_use_the_relay_is_told_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with cell(tmp_path) as members:
            await members.relay("bob", Role.NODE)
            with pytest.raises(PassportRefused):
                await members.relay("eve", Role.READER)
            with pytest.raises(PassportRefused):
                await RelayEndpoint.open(await members.join("eve"), CELL, ALICE.seed)  # to hear what Alice is sent
            posing = RelayEndpoint(await members.join("eve"), CELL, LinkIdentity.from_seed(ALICE.seed))
            with pytest.raises(LinkClosed, match="cannot reach"):
                await posing.connect(PeerAddress(BOB.node, (f"relay:{CELL}",)))

    asyncio.run(asyncio.wait_for(main(), 30))
