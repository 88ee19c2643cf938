"""How `fallow invite`, `revoke` and `audit` reach the registrar: by its own files, or signed, over HTTPS.

On the machine that holds the network's keys, whoever may read them is the operator, and the journal says `machine`. On
any other, the console's membership (`fallow join` with an invitation for an operator or auditor) signs what is asked.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from fallow import wiring
from fallow.cli.options import settings
from fallow.config import Config
from fallow.domain.errors import ConfigError
from fallow.domain.ids import NodeId
from fallow.processes.party import CONSOLE
from fallow.trust import membership
from fallow.trust.keys import Identity
from fallow.trust.noted_heads import read_noted
from fallow.trust.registrar.database import open_database
from fallow.trust.registrar.journal import Entry, Head
from fallow.trust.registrar.journal_db import read_all
from fallow.trust.registrar.service import Registrar
from fallow.trust.registrar.state import is_founded, open_state
from fallow.trust.registrar_client import RegistrarClient

HEAD_FILES_MAX: Final = 100
ENTRIES_FETCHED_MAX: Final = 1_000_000
T = TypeVar("T")


class Here(msgspec.Struct, frozen=True):
    """The registrar's own machine."""

    registrar: Registrar
    config: Config

    def entries(self) -> list[Entry]:
        with self.registrar.reading() as connection:
            return list(read_all(connection))


class Afar(msgspec.Struct, frozen=True):
    """Another machine, whose console is a member."""

    config: Config

    def ask(self, work: Callable[[RegistrarClient, Identity], Awaitable[T]]) -> T:
        """Do something as the console. Raises what the registrar refuses it with, or `RegistrarUnavailable`."""
        folder = self.config.state_dir / CONSOLE
        member = membership.load(folder, wiring.identity(folder), wiring.clock())

        async def asked() -> T:
            async with RegistrarClient(member.known, member.places.registrar_urls) as client:
                try:
                    return await work(client, member.who)
                finally:
                    await member.close()

        return asyncio.run(asked())

    def entries(self) -> list[Entry]:
        return self.ask(_fetch)


def place_of(state_dir: Path | None, config: Path | None) -> Here | Afar:
    """Where this command is given. Raises `ConfigError` on a machine that knows no network."""
    loaded = settings(config, {"state_dir": state_dir}).config
    if is_founded(loaded.state_dir):
        state = open_state(loaded.state_dir)
        return Here(Registrar(state, open_database(state.paths.database), wiring.clock()), loaded)
    if membership.is_member(loaded.state_dir / CONSOLE):
        return Afar(loaded)
    raise ConfigError(
        f"No network is known in {loaded.state_dir}. Run this where `fallow up` runs, or `fallow join` here with an "
        "invitation for an operator or an auditor first."
    )


def noted_heads(config: Config) -> tuple[Head, ...]:
    """The journal's heads that memberships on this machine have kept. Raises `JournalBroken`."""
    depths = ("", "*/", "*/*/", "*/*/*/")
    found = sorted(path for depth in depths for path in config.state_dir.glob(depth + membership.HEAD_FILE))
    return tuple(head for path in found[:HEAD_FILES_MAX] for head in heads_in(path))


def heads_in(file: Path) -> tuple[Head, ...]:
    """The heads that one membership has kept, the oldest first. Raises `JournalBroken`."""
    return tuple(Head(noted.seq, noted.hash) for noted in read_noted(file))


def short(node: NodeId | str) -> str:
    """A key, short enough for people."""
    return node[:12]


async def _fetch(client: RegistrarClient, who: Identity) -> list[Entry]:
    entries: list[Entry] = []
    while len(entries) < ENTRIES_FETCHED_MAX:
        page = await client.journal(who, entries[-1].seq if entries else 0)
        if not page.entries:
            return entries
        if entries and page.entries[0].seq <= entries[-1].seq:
            raise ConfigError("The registrar gave the same part of its journal twice.")
        entries += page.entries
    raise ConfigError(f"The journal has more than {ENTRIES_FETCHED_MAX} entries: read it on the registrar's machine.")
