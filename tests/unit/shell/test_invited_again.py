"""An invitation where a membership lies already: it is used where it helps, refused with words where it cannot, and
never passed over in silence. A real registrar over HTTPS; the folders are those of `fallow join`."""

import asyncio
import errno
import os
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from fallow.config import Config, TrustConfig
from fallow.domain.credentials import Role
from fallow.domain.errors import ConfigError, InvitationRefused
from fallow.gateway.server import ServerLimits
from fallow.processes import party
from fallow.processes.own_network import INVITATION, OwnNetwork
from fallow.processes.party import CONSOLE, Newcomer, join_as_console
from fallow.system_clock import SystemClock
from fallow.trust import membership
from fallow.trust.keys import load_or_create
from fallow.trust.membership import Membership, forget
from fallow.trust.passports import is_for
from fallow.trust.registrar.consent import Lent
from fallow.trust.registrar.invitations import as_text
from tests.unit.trust.registrar_world import World, served

SOON = ServerLimits(shutdown_s=0.05)
KEPT_FILES = 5
"""Of a device that has just joined."""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "operator", SystemClock())


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60.0))


class Owner:
    """Somebody at a device, who reads and agrees."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.agreed: list[str] = []
        self.told: list[str] = []

    async def join(self, invitation: str | None) -> Membership:
        """As `fallow join` does before it opens anything else."""

        def agree(words: str) -> bool:
            self.agreed.append(words)
            return True

        config = Config(state_dir=self.folder, trust=TrustConfig(invitation=invitation))
        lends = Lent(device="desk", memory="1 GiB", folder=str(config.device_dir))
        newcomer = Newcomer(role=Role.NODE, name="desk", lends=lends, agree=agree)
        member = await party._member(config, config.device_dir, newcomer, self.told.append)
        await member.close()
        return member


def invited(world: World, role: Role = Role.NODE) -> str:
    return as_text(world.invitation(role))


def test_the_invitation_that_it_came_with_changes_nothing_at_the_next_start(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(world, connections=SOON):
            owner, invitation = Owner(tmp_path / "owner"), invited(world)
            first = await owner.join(invitation)
            again = await owner.join(invitation)
            assert again.who == first.who
            await owner.join(None)
            await owner.join("")
        assert len(owner.agreed) == 1, "nobody is asked twice"
        assert world.kinds().count("enrolled") == 1
        await owner.join(invitation)  # and none of it needs the registrar

    run(scenario())


class FullDisk:
    """No more than so many files of a folder reach the disk."""

    def __init__(self, folder: Path, room: int, patch: pytest.MonkeyPatch) -> None:
        self._folder, self._room = folder, room
        self._files: set[int] = set()
        self._mkstemp, self._fsync = tempfile.mkstemp, os.fsync
        patch.setattr(tempfile, "mkstemp", self.mkstemp)
        patch.setattr(os, "fsync", self.fsync)

    def mkstemp(self, **options: Any) -> tuple[int, str]:
        handle, name = self._mkstemp(**options)
        if self._folder in Path(name).parents:
            self._files.add(handle)
        return handle, name

    def fsync(self, handle: int) -> None:
        if handle in self._files:
            self._files.discard(handle)
            if self._room == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._room -= 1
        self._fsync(handle)


def test_a_device_whose_disk_is_full_is_told_so_and_joins_by_the_same_invitation_when_there_is_room(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with served(world, connections=SOON):
            for room in range(KEPT_FILES):
                owner, invitation = Owner(tmp_path / f"owner-{room}"), invited(world)
                with monkeypatch.context() as patch:
                    FullDisk(owner.folder, room, patch)
                    with pytest.raises(ConfigError, match=r"No space left on device.*run the same command again"):
                        await owner.join(invitation)
                member = await owner.join(invitation)
                assert membership.load(member.folder, member.who, SystemClock()).passport == member.passport
                assert sorted(path.name for path in member.folder.iterdir()) == [
                    "identity", "journal-head", "network.json", "passport", "places.json"
                ]  # fmt: skip
        assert world.kinds().count("enrolled") == KEPT_FILES, "once each"

    run(scenario())


def test_a_device_that_was_retired_or_left_comes_back_by_a_new_invitation(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(world, connections=SOON):
            owner = Owner(tmp_path / "owner")
            member = await owner.join(invited(world))
            again = membership.load(member.folder, member.who, SystemClock())
            files = {path: path.read_bytes() for path in member.folder.iterdir() if path.is_file()}
            await again.leave()
            await again.close()
            for path, content in files.items():  # as a retired device's folder is: it was never told
                path.write_bytes(content)
            back = await owner.join(invited(world))
            assert back.who == member.who and back.passport != member.passport
        assert len(owner.agreed) == 2
        (now,) = world.registrar.members()
        assert now.left_unix_s is None

    run(scenario())


def test_a_revoked_device_becomes_a_new_one_as_it_is_told_to(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(world, connections=SOON):
            owner = Owner(tmp_path / "owner")
            member = await owner.join(invited(world))
            world.registrar.revoke(member.who.node, "lost in a taxi")
            with pytest.raises(InvitationRefused, match="Delete the device's identity file"):
                await owner.join(invited(world))
            (member.folder / "identity").unlink()
            new = await owner.join(invited(world))
            assert new.who != member.who
            assert is_for(new.passport, new.who.node, Role.NODE)

    run(scenario())


def test_a_damaged_membership_is_mended_by_an_invitation_as_its_message_says(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(world, connections=SOON):
            owner = Owner(tmp_path / "owner")
            member = await owner.join(invited(world))
            (member.folder / "passport").write_bytes(b"{")
            with pytest.raises(ConfigError, match="join again with a new invitation"):
                await owner.join(None)
            assert (await owner.join(invited(world))).passport

    run(scenario())


def test_an_invitation_of_another_network_says_what_to_do_and_changes_nothing(world: World, tmp_path: Path) -> None:
    other = World(tmp_path / "other", SystemClock())

    async def scenario() -> None:
        async with served(world, connections=SOON), served(other, connections=SOON):
            owner = Owner(tmp_path / "owner")
            member = await owner.join(invited(world))
            with pytest.raises(ConfigError, match=r"another network.*fallow leave.*delete the folder"):
                await owner.join(invited(other))
            assert len(owner.agreed) == 1 and other.registrar.members() == []
            assert (await owner.join(None)).digest == world.state.digest
            forget(member.folder)
            assert (await owner.join(invited(other))).digest == other.state.digest
            assert len(owner.agreed) == 2, "who lends to another network agrees to that"

    run(scenario())


def test_a_reader_becomes_an_operator_and_is_told_so_only_then(world: World, tmp_path: Path) -> None:
    folder, told = tmp_path / "desk", list[str]()

    def config(role: Role) -> Config:
        return Config(state_dir=folder, trust=TrustConfig(invitation=invited(world, role)))

    async def scenario() -> None:
        async with served(world, connections=SOON):
            assert await join_as_console(config(Role.READER), told.append)
            assert await join_as_console(config(Role.OPERATOR), told.append)
        who = load_or_create(folder / CONSOLE / "identity")
        assert is_for(membership.load(folder / CONSOLE, who, SystemClock()).passport, who.node, Role.OPERATOR)
        (now,) = world.registrar.members()
        assert now.role is Role.OPERATOR

    run(scenario())
    assert told[-1].endswith("as operator.")


def test_an_invitation_for_another_part_replaces_no_devices_membership(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(world, connections=SOON):
            owner = Owner(tmp_path / "owner")
            member = await owner.join(invited(world))
            with pytest.raises(ConfigError, match="for a gateway, and this is a node"):
                await owner.join(invited(world, Role.GATEWAY))
            assert (await owner.join(None)).passport == member.passport

    run(scenario())


def test_processes_of_ones_own_network_take_no_invitation_that_lies_in_the_settings(
    world: World, tmp_path: Path
) -> None:
    """And one that is left from a network that was founded anew here is told at once."""

    async def scenario() -> None:
        async with served(world, connections=SOON):
            owner = Owner(tmp_path / "owner")
            member = await owner.join(invited(world))
        network = OwnNetwork(Config(state_dir=tmp_path / "operator"), owner.told.append)
        assert network.leave_for(Role.NODE, member.folder, "desk") == {INVITATION: ""}
        anew = OwnNetwork(Config(state_dir=tmp_path / "anew"), owner.told.append)
        anew.announce("tls://127.0.0.1:4222")
        with pytest.raises(ConfigError, match="another network"):
            anew.leave_for(Role.NODE, member.folder, "desk")
        assert anew.leave_for(Role.NODE, tmp_path / "nobody", "desk")[INVITATION].startswith("fallow1-")

    run(scenario())
