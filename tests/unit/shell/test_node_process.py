"""`fallow join` before it lends anything: what it is called, and which cell it is in."""

import asyncio
from typing import Any, cast

import pytest

from fallow.config import Config, NodeConfig
from fallow.domain.errors import ConfigError, MembershipEnded, RegistrarUnavailable, RequestRefused
from fallow.processes import node
from fallow.processes.party import Newcomer, Party
from fallow.trust.registrar.requests import NAME_MAX_CHARS


def called(name: str | None) -> str:
    return node.name(Config(node=NodeConfig(name=name)))


def test_a_name_that_no_registrar_takes_is_refused_before_anybody_is_asked() -> None:
    assert called("ß" * NAME_MAX_CHARS) == "ß" * NAME_MAX_CHARS
    for name in ("x" * (NAME_MAX_CHARS + 1), "a\x1b[8mb", "a\u202eb"):
        with pytest.raises(ConfigError, match=f"up to {NAME_MAX_CHARS} printable characters"):
            called(name)


def test_a_machines_own_long_name_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.socket, "gethostname", lambda: "h" * 200)
    assert called(None) == "h" * NAME_MAX_CHARS


class Stuck:
    """A party as far as choosing a cell needs one, whose registrar lets it move nowhere."""

    cell, bus, coordinator = "home", None, cast(Any, type("", (), {"cells": None}))

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def move(self, cell: str) -> None:
        raise self._error


@pytest.mark.parametrize("error", [RequestRefused("Once in 60 minutes."), RegistrarUnavailable("Nobody answers.")])
def test_a_device_that_may_not_move_now_stays_where_it_is(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    told = moved_near(monkeypatch, error)
    assert told == [f"The nearest cell is near, and this device stays in home for now. {error}"]


def test_a_device_whose_membership_ended_goes_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MembershipEnded):
        moved_near(monkeypatch, MembershipEnded("Sold."))


def moved_near(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[str]:
    async def nearest(*_: object) -> str:
        return "near"

    monkeypatch.setattr(node, "nearest_cell", nearest)
    party, told = cast(Party, Stuck(error)), list[str]()
    kept = asyncio.run(node._moved_near(party, Config(), cast(Newcomer, None), told.append))
    assert kept is party
    return told
