"""`fallow leave`: the device says goodbye before it is struck off, and its owner is told what happened.

A real registrar over HTTPS; the device is a process that holds the folder, and takes a moment to end politely.
"""

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fallow.config import Config
from fallow.domain.errors import ConfigError, RegistrarUnavailable
from fallow.gateway.server import ServerLimits
from fallow.processes import leaving
from fallow.processes.leaving import leave
from fallow.processes.lock import hold, holder
from fallow.system_clock import SystemClock
from fallow.trust.keys import Identity, load_or_create
from fallow.trust.membership import enrol, is_member
from fallow.trust.registrar_client import meet
from tests.unit.trust.registrar_world import World, served

DEVICE = """
import signal, sys, time
from pathlib import Path
from fallow.processes.lock import hold

def goodbye(*_):
    if sys.argv[2] == "polite":
        time.sleep(0.3)
        (folder / "goodbye").write_text(repr(time.time()))
        sys.exit(0)

folder = Path(sys.argv[1])
signal.signal(signal.SIGTERM, goodbye)
with hold(folder):
    print("held", flush=True)
    while True:
        time.sleep(60)
"""
SOON = ServerLimits(shutdown_s=0.05)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "operator", SystemClock())


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60.0))


@contextmanager
def device_running(folder: Path, manners: str = "polite") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", DEVICE, str(folder), manners]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


async def joined(world: World, config: Config) -> Identity:
    folder, invitation = config.device_dir, world.invitation()
    who = load_or_create(folder / "identity")
    known = await meet(invitation)
    member = await enrol(folder, who, known, invitation, world.enrolment(who, invitation), SystemClock())
    await member.close()
    return who


def test_the_device_says_goodbye_first_and_is_struck_off_then(world: World, tmp_path: Path) -> None:
    said: list[str] = []

    async def scenario() -> None:
        config = Config(state_dir=tmp_path / "owner")
        async with served(world, connections=SOON):
            who = await joined(world, config)
            with device_running(config.device_dir) as device:
                assert holder(config.device_dir) == device.pid
                await leave(config, said.append)
                assert device.wait(5.0) == 0
            (gone,) = world.registrar.members()
            goodbye_unix_s = float((config.device_dir / "goodbye").read_text())
            assert gone.left_unix_s is not None and gone.left_unix_s > goodbye_unix_s
            assert not is_member(config.device_dir)
            assert load_or_create(config.device_dir / "identity") == who, "the key stays its owner's"
            assert holder(config.device_dir) is None

    run(scenario())
    assert [sentence.split(":")[0] for sentence in said] == [
        "The device says goodbye",
        "This device has left 'Ørsted'",
        f"Delete {tmp_path / 'owner' / 'device'} to remove everything that Fallow kept for it.",
    ]


def test_without_the_registrar_nothing_is_changed_and_the_device_goes_on(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        config = Config(state_dir=tmp_path / "owner")
        async with served(world, connections=SOON):
            await joined(world, config)
        with device_running(config.device_dir) as device:
            with pytest.raises(RegistrarUnavailable, match="Nothing was changed: this device is still a member"):
                await leave(config, lambda _: None)
            assert device.poll() is None
            assert not (config.device_dir / "goodbye").exists()
        assert is_member(config.device_dir)

    run(scenario())


def test_a_registrar_that_goes_away_in_between_leaves_a_device_that_is_stopped_and_an_owner_who_knows(
    world: World, tmp_path: Path
) -> None:
    async def scenario() -> None:
        config = Config(state_dir=tmp_path / "owner")
        async with served(world, connections=SOON) as server:
            await joined(world, config)
            going: list[asyncio.Future[None]] = []
            with device_running(config.device_dir) as device:
                words = "The device was stopped and lends nothing now. Whether its membership has ended is not known"
                with pytest.raises(RegistrarUnavailable, match=words):
                    await leave(config, lambda _: going.append(asyncio.ensure_future(server.close())))
                assert device.wait(5.0) == 0
        assert is_member(config.device_dir)
        assert world.registrar.members()[0].left_unix_s is None

    run(scenario())


def test_a_membership_that_ended_before_is_forgotten_with_the_registrars_words(world: World, tmp_path: Path) -> None:
    said: list[str] = []

    async def scenario() -> None:
        config = Config(state_dir=tmp_path / "owner")
        async with served(world, connections=SOON):
            who = await joined(world, config)
            world.registrar.revoke(who.node, "sold on Saturday")
            await leave(config, said.append)
        assert not is_member(config.device_dir)

    run(scenario())
    assert "had ended before" in said[0] and "sold on Saturday" in said[0]


def test_a_device_that_does_not_end_stays_a_member(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaving, "GOODBYE_LIMIT_S", 0.3)

    async def scenario() -> None:
        config = Config(state_dir=tmp_path / "owner")
        async with served(world, connections=SOON):
            await joined(world, config)
            with (
                device_running(config.device_dir, "deaf") as device,
                pytest.raises(ConfigError, match=f"process {device.pid}.*still a member"),
            ):
                await leave(config, lambda _: None)
            assert is_member(config.device_dir)

    run(scenario())


def test_another_users_device_is_left_as_that_user(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's refusal alone, which a test that may be root cannot have otherwise."""

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    async def scenario() -> None:
        config = Config(state_dir=tmp_path / "owner")
        async with served(world, connections=SOON):
            await joined(world, config)
            with device_running(config.device_dir) as device, monkeypatch.context() as patch:
                patch.setattr(os, "kill", refused)
                with pytest.raises(ConfigError, match=f"process {device.pid}.*another user.*sudo -u USER fallow leave"):
                    await leave(config, lambda _: None)
                patch.setattr(leaving.wiring, "identity", refused)
                with pytest.raises(ConfigError, match=r"is another user's, and nothing was changed.*or as root"):
                    await leave(config, lambda _: None)
            assert is_member(config.device_dir)

    run(scenario())


def test_who_holds_a_folder_is_known_while_it_does(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with hold(tmp_path):
        pass
    assert holder(tmp_path) is None
    with device_running(tmp_path) as device:
        assert holder(tmp_path) == device.pid
    assert holder(tmp_path) is None, "however it ended"
