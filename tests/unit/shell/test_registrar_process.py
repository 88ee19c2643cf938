"""The registrar's process outlives what fails around it: a bus that goes at once, a disk that is full at a renewal."""

import asyncio
import errno
import os
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fallow.config import Config
from fallow.domain.errors import BusUnavailable
from fallow.domain.network import REGISTRAR_NAME
from fallow.processes import registrar
from fallow.processes.lifetime import Stop
from fallow.processes.renewal import RENEWED_EVERY_S, RETRY_S
from fallow.simulator.virtual_time import LoopClock, run_virtual
from fallow.system_clock import SystemClock
from fallow.trust.certificates import client_context
from fallow.trust.registrar.api import RegistrarApi
from fallow.trust.registrar.duties import RegistrarDuties
from tests.unit.trust.registrar_world import World


class FlakyBus:
    """A bus by hand: of the connections that were made, the first two are lost at once."""

    made: list["FlakyBus"]

    def __init__(self) -> None:
        self.closed = False
        self.subjects: list[str] = []

    @classmethod
    async def connect(cls, *_: object) -> "FlakyBus":
        cls.made.append(cls())
        return cls.made[-1]

    async def subscribe(self, subject: str, *_: object) -> "FlakyBus":
        lost = len(self.made)
        if lost < 3 and len(self.subjects) == lost - 1:
            raise BusUnavailable("the connection was lost")
        self.subjects.append(subject)
        return self

    async def cancel(self) -> None:
        assert not self.closed

    async def close(self) -> None:
        self.closed = True


def test_a_bus_that_is_lost_before_the_duties_have_it_is_joined_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    FlakyBus.made = []
    monkeypatch.setattr(registrar, "NatsBus", FlakyBus)

    async def main() -> None:
        duties = RegistrarDuties(world.registrar, world.word, world.repository, world.database, LoopClock())
        stop = Stop()
        joining = asyncio.create_task(registrar._join("tls://127.0.0.1:1", world.state, world.word, duties, stop))
        await asyncio.sleep(10 * registrar.BUS_RETRY_S)
        first, second, third = FlakyBus.made
        assert first.closed and second.closed and not third.closed
        assert len(third.subjects) == 2
        await duties.close()
        stop.at_once.set()
        await joining
        assert third.closed

    run_virtual(main())


class StepClock(SystemClock):
    """Sleeps until a test lets it go on, and says for how long it was to sleep."""

    def __init__(self) -> None:
        self.asked_s: asyncio.Queue[float] = asyncio.Queue()
        self.gate = asyncio.Semaphore(0)

    async def sleep(self, duration_s: float) -> None:
        self.asked_s.put_nowait(duration_s)
        await self.gate.acquire()


def test_a_full_disk_at_a_renewal_ends_no_certificate_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def main() -> None:
        clock = StepClock()
        world = World(tmp_path, clock)
        config = Config(state_dir=tmp_path)
        registrar.settle(config, "tls://127.0.0.1:1")
        api = RegistrarApi(world.registrar, world.word, world.repository, clock)
        async with registrar._served(api, world.state, config, clock) as server:
            assert await clock.asked_s.get() == RENEWED_EVERY_S
            first = await served_certificate(server.url, world.state.network.authority_pem)
            with monkeypatch.context() as patch:
                patch.setattr(registrar, "write_server_certificate", full)
                clock.gate.release()
                assert await clock.asked_s.get() == RETRY_S
            assert await served_certificate(server.url, world.state.network.authority_pem) == first
            clock.gate.release()
            assert await clock.asked_s.get() == RENEWED_EVERY_S
            assert await served_certificate(server.url, world.state.network.authority_pem) != first
        assert not list(world.state.paths.folder.glob("tls-*"))

    asyncio.run(asyncio.wait_for(main(), 30.0))


async def served_certificate(url: str, authority_pem: str) -> bytes:
    where = urlsplit(url)
    _, writer = await asyncio.open_connection(
        where.hostname, where.port, ssl=client_context(authority_pem), server_hostname=REGISTRAR_NAME
    )
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    assert isinstance(shown, bytes)
    return shown
