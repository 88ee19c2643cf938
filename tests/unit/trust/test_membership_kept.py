"""What a member keeps on its disk: on a full one it stays a member, and a lying registrar takes no evidence from it."""

import asyncio
import errno
import logging
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fallow.domain.errors import JournalBroken
from fallow.policy.noted_heads import NotedHead
from fallow.trust import membership
from fallow.trust.keys import new_identity
from fallow.trust.membership import HEAD_FILE, Membership, enrol, load
from fallow.trust.noted_heads import note, noted_in, read_noted
from fallow.trust.registrar.journal import Head
from fallow.trust.registrar_client import meet
from tests.unit.trust.registrar_world import HandClock, World, served


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "operator")


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60.0))


async def join(world: World, folder: Path) -> Membership:
    invitation, who = world.invitation(), new_identity()
    known = await meet(invitation)
    return await enrol(folder, who, known, invitation, world.enrolment(who, invitation), HandClock())


def a_head(seq: int, digit: str = "a") -> str:
    return str(Head(seq, digit * 64))


def test_on_a_full_disk_the_membership_goes_on_and_the_disk_is_used_again_when_it_can_be(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Renewals one after another: none of them ends the loop, and each passport is used."""
    monkeypatch.setattr(Membership, "_wait_s", lambda _: 0.0)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def scenario() -> None:
        async with served(world):
            member = await join(world, tmp_path / "device")
            on_disk = (tmp_path / "device" / "passport").read_bytes()
            with monkeypatch.context() as patch:
                patch.setattr(membership, "write_durably", full)
                world.clock.now_s += 60.0  # type: ignore[attr-defined]
                await member.start()
                seen = await member.changed(member.version)
                await member.changed(seen)
                assert member.passport and member.passport.encode() not in on_disk
                assert (tmp_path / "device" / "passport").read_bytes() == on_disk
            await member.changed(await member.changed(member.version))  # one may have been under way
            await member.close()
            again = load(tmp_path / "device", member.who, HandClock())
            assert again.passport == member.passport

    run(scenario())
    assert "No space left on device" in caplog.text


def test_a_registrar_whose_journal_was_cut_or_rewritten_takes_no_noted_head_away(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with served(world):
            member = await join(world, tmp_path)
            first = read_noted(tmp_path / HEAD_FILE)
            assert [str(Head(each.seq, each.hash)) for each in first] == [str(world.registrar.journal_head())]
            admitted = world.renewed(member.who)
            for told in (a_head(1), a_head(first[0].seq), "0:" + "0" * 64, "no head at all"):
                member.take(msgspec.structs.replace(admitted, journal_head=told))
                assert read_noted(tmp_path / HEAD_FILE) == first
                assert member.passport == admitted.passport, "a head is no reason to stop"
            member.take(msgspec.structs.replace(admitted, journal_head=a_head(9000, "b")))
            assert [each.seq for each in read_noted(tmp_path / HEAD_FILE)] == [first[0].seq, 9000]
            await member.close()

    run(scenario())
    assert caplog.text.count("it was cut or written anew") == 3
    assert "could not be noted" in caplog.text


def test_heads_are_read_as_they_were_noted_and_as_releases_before_noted_one(tmp_path: Path) -> None:
    file = tmp_path / HEAD_FILE
    file.write_text(a_head(7))
    note(file, a_head(9), 1000.4)
    assert read_noted(file) == (NotedHead(7, "a" * 64, 0.0), NotedHead(9, "a" * 64, 1000.0))
    assert noted_in(file.read_text().splitlines()[1]) == NotedHead(9, "a" * 64, 1000.0)


def test_a_file_that_holds_something_else_is_named_and_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / HEAD_FILE
    file.write_bytes(b"\xff" * 100)
    with caplog.at_level(logging.ERROR), pytest.raises(JournalBroken):
        note(file, a_head(9), 0.0)
    assert file.read_bytes() == b"\xff" * 100
