"""A bus that comes back elsewhere, or takes a passport no longer: what a connection of ours does by itself."""

import asyncio
import logging
import time
from pathlib import Path

import msgspec
import pytest

from fallow.domain.fleet import Subjects
from fallow.fabric.broker import Broker
from fallow.fabric.nats_bus import NatsBus
from fallow.gateway.server import ServerLimits
from fallow.processes.registrar import Account
from fallow.system_clock import SystemClock
from fallow.trust import jwt
from fallow.trust.passports import Held
from tests.contract.networks import CELL, TestNetwork, person, trusted_rig
from tests.unit.fabric.support import eventually
from tests.unit.trust.registrar_world import World, served
from tests.unit.trust.test_revocation_watch import joined

ALICE = person("alice")
SUBJECT = Subjects(CELL).hello


def test_it_is_found_where_it_is_said_to_be_and_what_was_listened_to_is_heard_there(tmp_path: Path) -> None:
    async def main() -> None:
        network = TestNetwork()
        first, second = (Broker(tmp_path / name, trust=network.bus_trust()) for name in ("first", "second"))
        heard: list[bytes] = []

        async def hear(_: str, message: bytes) -> None:
            heard.append(message)

        await first.start()
        places = [*first.urls]
        bus = await NatsBus.connect(lambda: places, ALICE.node, network.anything("alice"))
        await bus.subscribe(SUBJECT, hear)
        await first.close()
        await second.start()
        places[:] = second.urls
        await eventually(lambda: bus.connected)
        places.clear()  # nobody says where: it goes on where it was
        await bus.publish(SUBJECT, b"here")
        await eventually(lambda: heard == [b"here"])
        await bus.close()
        await second.close()

    asyncio.run(main())


class Refused(Held, frozen=True):
    """Counts the server's refusals, as who could renew would hear of them."""

    heard: list[bool] = msgspec.field(default_factory=list)

    def refused(self) -> None:
        self.heard.append(True)


def test_a_refused_passport_is_told_to_its_holder_at_every_attempt_and_to_the_log_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            held = Refused(r.network.passport(ALICE.node), ALICE, r.network.authority.certificate_pem)
            bus = await NatsBus.connect(r.broker.urls, ALICE.node, held)
            await r.revoke(ALICE.node)
            await eventually(lambda: len(held.heard) == 2)
            await bus.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert caplog.text.lower().count("authorization violation") == 1


def test_a_passport_that_the_bus_refuses_is_another_within_seconds(tmp_path: Path) -> None:
    """As after a night asleep, or a clock that jumped: the registrar, a real one, has nothing against the device."""

    async def main() -> None:
        world = World(tmp_path / "operator", SystemClock())
        state, broker = world.state, Broker(tmp_path / "bus", trust=world.word.bus_trust())
        await broker.start()
        async with served(world, connections=ServerLimits(shutdown_s=0.05)):
            device = await joined(world, tmp_path / "device")
            await device.start()
            bus, first = await NatsBus.connect(broker.urls, device.who.node, device), device.passport
            account = Account(broker.urls[0], state, world.word)
            now_s = time.time()
            refused = {device.who.node: now_s}
            await account.push(
                state.network.account,
                jwt.account_jwt(state.operator, state.account.node, name="x", issued_unix_s=now_s, revoked=refused),
            )
            await eventually(lambda: not bus.connected)
            await eventually(lambda: bus.connected)
            assert device.passport != first
            for each in (account, bus, device):
                await each.close()
        await broker.close()

    asyncio.run(main())
