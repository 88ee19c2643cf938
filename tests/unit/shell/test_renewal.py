"""What ends by itself is renewed while a service runs, whoever runs its bus and whatever fails in between."""

import asyncio
import errno
import os
from pathlib import Path

import msgspec
import pytest

from fallow.config import BusConfig, Config, GatewayConfig, RegistrarConfig
from fallow.domain.errors import BusUnavailable
from fallow.processes import registrar, up
from fallow.processes.own_network import OwnNetwork
from fallow.processes.renewal import RENEWED_EVERY_S, RETRY_S, keep_renewed
from fallow.simulator.virtual_time import LoopClock, run_virtual


def silent(_: str) -> None:
    pass


def test_a_failure_is_told_and_tried_again_within_the_hour() -> None:
    told: list[str] = []
    renewed_s: list[float] = []

    async def renew() -> None:
        renewed_s.append(asyncio.get_running_loop().time())
        if len(renewed_s) in {1, 2}:
            raise [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ValueError("a lock")][len(renewed_s) - 1]

    async def main() -> None:
        task = asyncio.create_task(keep_renewed("The certificate", renew, LoopClock(), told.append))
        await asyncio.sleep(2 * RENEWED_EVERY_S + 3 * RETRY_S)
        assert not task.done()
        task.cancel()

    run_virtual(main())
    week = RENEWED_EVERY_S
    assert renewed_s == pytest.approx([week, week + RETRY_S, week + 2 * RETRY_S, 2 * week + 2 * RETRY_S])
    assert len(told) == 2
    assert "The certificate could not be renewed" in told[0] and "No space left on device" in told[0]


class HalfStarted(up.Service):
    """Stops where the registrar would be started, as a process of its own."""

    async def _start_registrar(self, *_: object) -> None:
        raise BusUnavailable("far enough")


def test_on_a_bus_of_ones_own_the_council_is_renewed_every_week(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewals: list[Path] = []
    monkeypatch.setattr(up, "renew_council", lambda config: renewals.append(config.state_dir))

    async def at_once(work: object, *arguments: object) -> None:
        work(*arguments)  # type: ignore[operator]

    monkeypatch.setattr(up.asyncio, "to_thread", at_once)
    config = Config(state_dir=tmp_path, bus=BusConfig(url="tls://127.0.0.1:1"), gateway=GatewayConfig(port=1))
    network = OwnNetwork(config, silent)
    monkeypatch.setattr(up.wiring, "clock", LoopClock)

    async def main() -> None:
        service = HalfStarted(config, None, silent, network)
        with pytest.raises(BusUnavailable, match="far enough"):
            await service.start()
        await asyncio.sleep(3.5 * RENEWED_EVERY_S)
        await service.close()
        await asyncio.sleep(RENEWED_EVERY_S)

    run_virtual(main())
    assert renewals == [tmp_path] * 3


def test_the_registrars_port_is_written_once_and_whole(tmp_path: Path) -> None:
    config = Config(state_dir=tmp_path, bus=BusConfig(), registrar=RegistrarConfig())
    network = OwnNetwork(config, silent)
    network.announce("tls://127.0.0.1:4222")
    port = network.state.paths.port
    before = port.stat()
    assert port.read_text().isdigit() and before.st_mode & 0o077 == 0
    network.announce("tls://127.0.0.1:4222")
    after = port.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    chosen = msgspec.structs.replace(config, registrar=RegistrarConfig(port=int(port.read_text()) + 1))
    registrar.settle(chosen, "tls://127.0.0.1:4222")
    assert port.stat().st_ino == before.st_ino
