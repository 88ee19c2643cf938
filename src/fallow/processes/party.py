"""A process as a party to a network: its key, its passport, its bus, its lease, and what it asks of trust.

Rules
- Everything is opened in the order in which one needs the other, and closed in the reverse.
- A process without a membership uses the invitation in its settings, once. One that lends a device needs its owner's
  consent for that.
- With a membership, an invitation of the same network is used where that one has ended, or is another key's or for
  another role; one of another network is refused with what to do. It is never passed over in silence.
- `trust.insecure_development` alone chooses between believing nobody without proof and believing everybody; there is
  nothing in between.
"""

import logging
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import msgspec

from fallow import __version__, wiring
from fallow.config import Config
from fallow.domain.charter import LEASE_S
from fallow.domain.credentials import Role
from fallow.domain.errors import ConfigError, PassportRefused
from fallow.domain.fleet import Subjects
from fallow.fabric.contract import Admission, Bus, PresenceWatcher
from fallow.processes.runfile import running
from fallow.processes.supervisor import Tell
from fallow.trust import membership, open_doors
from fallow.trust.admission import Doorkeeper
from fallow.trust.cell_words import SignedCellWords
from fallow.trust.contract import CoordinatorTrust, Lease, NodeTrust, Routes
from fallow.trust.grants import Author, Book, Issuer, SealedOrders, SignedRoutes
from fallow.trust.keys import Identity
from fallow.trust.lease_keeper import LeaseKeeper
from fallow.trust.membership import Membership
from fallow.trust.membership_views import NetworkClock
from fallow.trust.passports import PassportReader, is_for
from fallow.trust.registrar import consent, invitations
from fallow.trust.registrar.invitations import Invitation
from fallow.trust.registrar.requests import NAME_MAX_CHARS
from fallow.trust.registrar_client import meet
from fallow.trust.revocation_watch import RevocationWatch

CONSOLE: Final = "console"
"""Folder and name of the membership that people's commands use."""

log = logging.getLogger(__name__)

Agree = Callable[[str], bool]
"""Shows the owner what they agree to, and gives their answer. May wait for a person."""


class Newcomer(msgspec.Struct, frozen=True, kw_only=True):
    """What a process says of itself when it joins."""

    role: Role
    name: str
    """For people."""
    lends: consent.Lent | None = None
    """For those who lend a device: what, for the words that its owner agrees to."""
    agree: Agree | None = None


class Party:
    """What a process has of its network. `close` it when the process ends."""

    def __init__(
        self,
        who: Identity,
        bus: Bus,
        subjects: Subjects,
        cell: str,
        node: NodeTrust,
        coordinator: CoordinatorTrust,
        routes: Routes,
        presence: PresenceWatcher | None,
        network: str,
        member: Membership | None,
        opened: AsyncExitStack,
    ) -> None:
        self.who = who
        self.bus = bus
        self.subjects = subjects
        self.cell = cell
        self.node = node
        """What a device asks of trust; admission and lease are everybody's."""
        self.coordinator = coordinator
        """What a coordinator asks of trust."""
        self.routes = routes
        """What a gateway asks of trust."""
        self.presence = presence
        """For coordinators: who tells of broken connections."""
        self.network = network
        """What people call it."""
        self._member = member
        self._opened = opened

    @property
    def admission(self) -> Admission:
        return self.node.admission

    @property
    def lease(self) -> Lease:
        return self.node.lease

    @property
    def bus_urls(self) -> tuple[str, ...]:
        """Where the registrar says, by now, that the bus is; none in the development mode."""
        return () if self._member is None else self._member.places.bus_urls

    async def move(self, cell: str) -> None:
        """Belong to another cell from the next start on. Raises `RequestRefused`, `RegistrarUnavailable`."""
        if self._member is not None:
            await self._member.move(cell)

    async def close(self) -> None:
        """Idempotent."""
        await self._opened.aclose()


async def join_as_console(config: Config, tell: Tell) -> bool:
    """Use an invitation that is for a person, not for a device: the console of this machine is a member from now on.

    `False` when the settings hold none of that kind. Raises as `take_part` does.
    """
    if config.trust.insecure_development or not config.trust.invitation:
        return False
    invitation = invitations.from_text(config.trust.invitation)
    if invitation.role not in {Role.OPERATOR, Role.AUDITOR, Role.READER}:
        return False
    newcomer = Newcomer(role=invitation.role, name=f"console of {socket.gethostname()}"[:NAME_MAX_CHARS])
    member = await _member(config, config.state_dir / CONSOLE, newcomer, tell)
    await member.close()
    tell(f"This machine's `fallow status` and its like now speak to {member.network.name!r}, as {invitation.role}.")
    return True


async def open_console(config: Config) -> tuple[Bus, Subjects]:
    """The bus for a person's command, closed by the caller. Raises `ConfigError`, `TrustError`, `BusUnavailable`."""
    config = of_what_runs(config)
    if config.trust.insecure_development:
        return await wiring.open_bus(config, CONSOLE), wiring.subjects(config.cell)
    folder = config.state_dir / CONSOLE
    if not membership.is_member(folder):
        raise ConfigError(
            f"No network is known in {config.state_dir}. Start one with `fallow up`, or use `fallow join` with an "
            "invitation for an operator, an auditor or a reader."
        )
    member = membership.load(folder, wiring.identity(folder), wiring.clock())
    try:
        if not member.fresh:
            await member.start()
        try:
            bus = await wiring.join_bus(config, member)
        except PassportRefused:  # good by this machine's clock alone, or revoked: the registrar knows
            await member.start()
            bus = await wiring.join_bus(config, member)
        return bus, wiring.subjects(member.network.cell)
    finally:
        await member.close()


def of_what_runs(config: Config) -> Config:
    """The settings with the bus, cell and mode of the service that runs in the state folder, when none is named."""
    found = running(config.state_dir)
    if config.bus.url is not None or found is None:
        return config
    trust = msgspec.structs.replace(config.trust, insecure_development=found.insecure)
    bus = msgspec.structs.replace(config.bus, url=found.bus_url)
    return msgspec.structs.replace(config, cell=found.cell, bus=bus, trust=trust)


async def take_part(config: Config, folder: Path, newcomer: Newcomer, tell: Tell) -> Party:
    """Join, or come back. Raises `ConfigError`, `TrustError`, `BusUnavailable`."""
    async with AsyncExitStack() as opening:
        if config.trust.insecure_development:
            return await _believing_everybody(config, folder, opening)
        return await _trusted(config, folder, newcomer, tell, opening)


async def _believing_everybody(config: Config, folder: Path, opening: AsyncExitStack) -> Party:
    for host in wiring.bus_hosts(config, ()):
        if not wiring.is_loopback(host):
            raise ConfigError(f"The insecure development mode stays on loopback, and {host!r} is not.")
    who = wiring.identity(folder)
    bus = await wiring.open_bus(config, who.node)
    opening.push_async_callback(bus.close)
    return Party(
        who,
        bus,
        wiring.subjects(config.cell),
        config.cell,
        open_doors.open_node(),
        open_doors.open_coordinator(),
        open_doors.OpenRoutes(),
        wiring.presence_watcher(config),
        "development, insecure",
        None,
        opening.pop_all(),
    )


async def _trusted(config: Config, folder: Path, newcomer: Newcomer, tell: Tell, opening: AsyncExitStack) -> Party:
    member = await _member(config, folder, newcomer, tell)
    opening.push_async_callback(member.close)
    await member.start()
    # The registrar's time of day, and a monotonic clock that goes on while the machine sleeps: a device whose own clock
    # is wrong, or that slept for an hour, judges documents as everybody does.
    clock = NetworkClock(wiring.lease_clock(), member)
    passports = PassportReader(member.network, clock)
    mine = passports.read(member.passport, holder=member.who.node)
    if mine.role is not newcomer.role:
        raise ConfigError(f"{folder} holds the membership of a {mine.role}, and this is a {newcomer.role}.")
    subjects = wiring.subjects(mine.cell)
    bus = await wiring.join_bus(config, member)
    opening.push_async_callback(bus.close)
    lease = LeaseKeeper(
        wiring.charter_source(member, folder / "charter"),
        folder,
        clock,
        network=member.digest,
        release=__version__,
        revoked=lambda: passports.revoked(member.who.node) or member.ended,
    )
    opening.push_async_callback(lease.close)
    watch = RevocationWatch(member, passports, folder, clock, lease_s=lambda: _lease_s(lease), look=lease.look)
    opening.push_async_callback(watch.close)
    await watch.start(bus, subjects)
    await lease.start(bus, subjects)
    admission = Doorkeeper(lambda: member.passport, passports, lease.unix_s)
    author = Author(member.who, lambda: member.passport, mine.cell, lease.unix_s)
    orders = SealedOrders(author, passports)
    book = Book(member.who.node, mine.cell, passports, lease, lease.unix_s)
    return Party(
        member.who,
        bus,
        subjects,
        mine.cell,
        NodeTrust(admission, book, orders, lease),
        CoordinatorTrust(passports, Issuer(author, lease), orders, SignedCellWords(author, passports), lease),
        SignedRoutes(member.who.node, passports),
        wiring.presence_of(config, member),
        member.network.name,
        member,
        opening.pop_all(),
    )


def _lease_s(lease: LeaseKeeper) -> float:
    return LEASE_S if lease.charter is None else lease.charter.policy.lease_s


# --- membership -----------------------------------------------------------------------------------


async def _member(config: Config, folder: Path, newcomer: Newcomer, tell: Tell) -> Membership:
    who = wiring.identity(folder)
    if not config.trust.invitation:
        if membership.is_member(folder):
            return membership.load(folder, who, wiring.lease_clock())
        raise ConfigError(
            "This device is in no network yet: give it an invitation, as `fallow invite` prints it. "
            "(Nobody gets in without one.)"
        )
    invitation = invitations.from_text(config.trust.invitation)
    kept = await _kept(folder, who, invitation)
    if kept is not None:
        return kept
    if invitation.role is not newcomer.role:
        raise ConfigError(f"This invitation is for a {invitation.role}, and this is a {newcomer.role}.")
    known = await meet(invitation)
    signed = None
    if invitation.role in consent.NEEDED_FROM:
        if newcomer.lends is None:
            raise ConfigError(f"A {newcomer.role} is lent, and what is lent here was not said.")
        words = consent.words_for(known.network.name, known.digest, known.network.registrar, newcomer.lends)
        if newcomer.agree is None or not newcomer.agree(words):
            raise ConfigError("You did not agree, so this device was not lent, and nothing was sent.")
        signed = consent.sign_consent(who, known.digest, invitation.role, words)
    asked = membership.enrolment_of(invitation, newcomer.name, signed)
    member = await membership.enrol(folder, who, known, invitation, asked, wiring.lease_clock())
    tell(f"{newcomer.name} was admitted to the network {known.network.name!r}.")
    return member


async def _kept(folder: Path, who: Identity, invitation: Invitation) -> Membership | None:
    """The membership in the folder; `None` when there is none, or the invitation is to replace it.

    Raises `ConfigError` when it is another network's.
    """
    membership.require_network(folder, invitation.network.hex())
    if not membership.is_member(folder):
        return None
    try:
        member = membership.load(folder, who, wiring.lease_clock())
    except ConfigError as error:
        log.warning("the invitation is used: %s", error.message)
        return None
    if is_for(member.passport, who.node, invitation.role) and not await member.has_ended():
        return member
    await member.close()
    return None
