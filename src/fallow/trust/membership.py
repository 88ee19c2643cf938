"""A process's membership in a network: its passport, kept fresh, and what it must remember between starts.

Rules
- One folder, mode 0700: `network.json` (pinned for good), `places.json`, `passport`, `journal-head`. The key is not
  here: the caller has it.
- A passport is renewed at the first start, at half of its life, and with growing pauses while the registrar is away.
  It is used until the registrar's clock says that it has ended: that clock is counted on from the last answer by the
  monotonic one, so that a wrong or jumping clock of the device makes no difference after the first answer.
- Waits are against a deadline by that clock, which may count the time that the machine sleeps, and are slept in pieces:
  after a night, the passport is renewed within `PIECE_S` of waking.
- A refusal (revoked, retired) is kept in `refusal` and told through `changed`; the member keeps asking, seldom.
- It implements the bus's `BusCredentials`.
"""

import asyncio
import contextlib
import logging
import os
import random
from pathlib import Path
from typing import Final

import msgspec

from fallow.domain.clock import Clock
from fallow.domain.errors import ConfigError, FallowError, MembershipEnded, RegistrarUnavailable, TrustError
from fallow.domain.network import Network, Places
from fallow.policy.enrolment import REFUSED_RETRY_S, renewal_wait_s, retry_wait_s
from fallow.trust.keys import Identity
from fallow.trust.registrar.invitations import Invitation
from fallow.trust.registrar.requests import Admitted, Enrol, Leave, Renew
from fallow.trust.registrar.state import NETWORK_FILE, PLACES_FILE
from fallow.trust.registrar_client import Met, RegistrarClient, met

PASSPORT_FILE: Final = "passport"
HEAD_FILE: Final = "journal-head"
REVOCATIONS_FILE: Final = "revocations"
FRESH_S: Final = 60.0
PIECE_S: Final = 10.0
START_LIMIT_S: Final = 60.0
"""How long the first renewal may take before `start` goes on with the passport from last time, or gives up."""

log = logging.getLogger(__name__)


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """The passport as it is kept on disk."""

    passport: str
    issued_unix_s: float
    expires_unix_s: float
    system_passport: str | None = None


class Membership:
    """A member. `start` before anything is asked of it."""

    def __init__(
        self,
        folder: Path,
        who: Identity,
        known: Met,
        places: Places,
        clock: Clock,
        kept: Kept | None = None,
        draws: random.Random | None = None,
    ) -> None:
        self.who = who
        self.known = known
        self.places = places
        self.refusal: FallowError | None = None
        """Why the registrar renews no more; `None` while it does."""
        self.version = 0
        """Counts passports and refusals that came."""
        self._folder = folder
        self._clock = clock
        self._draws = draws or random.Random()  # noqa: S311 (spreads load; secures nothing)
        self._client = RegistrarClient(known, places.registrar_urls)
        self._kept = kept
        self._reference: tuple[float, float] | None = None
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._cell: str | None = None

    # --- what others ask ------------------------------------------------------------------------

    @property
    def network(self) -> Network:
        return self.known.network

    @property
    def digest(self) -> str:
        """SHA-256 of `network.json`."""
        return self.known.digest

    @property
    def passport(self) -> str:
        """The newest; empty before the first."""
        return self._kept.passport if self._kept is not None else ""

    @property
    def system_passport(self) -> str | None:
        """For coordinators: opens the bus's system account."""
        return self._kept.system_passport if self._kept is not None else None

    @property
    def authority_pem(self) -> str:
        return self.known.network.authority_pem

    @property
    def fresh(self) -> bool:
        """Whether the passport from last time is good for another while, by this machine's own clock."""
        return self._kept is not None and self._clock.unix_s() + FRESH_S < self._kept.expires_unix_s

    def sign(self, nonce: bytes) -> bytes:
        return self.who.sign_nonce(nonce)

    def unix_s(self) -> float:
        """The time by the registrar's clock, counted on from its last answer; the device's own before the first."""
        if self._reference is None:
            return self._clock.unix_s()
        unix_s, monotonic_s = self._reference
        return unix_s + self._clock.monotonic_s() - monotonic_s

    @property
    def ended(self) -> bool:
        """Whether the registrar said that this member was revoked, left or was retired. Another refusal may pass."""
        return isinstance(self.refusal, MembershipEnded)

    async def changed(self, seen: int) -> int:
        """Wait until `version` is another than the one that was seen, and give it."""
        while self.version == seen:
            await self._news.wait()
        return self.version

    # --- its life -------------------------------------------------------------------------------

    async def start(self) -> None:
        """Renew now, and keep on renewing until `close`.

        Raises `RequestRefused` when the registrar refuses, `RegistrarUnavailable` when it cannot be reached and the
        passport from last time has ended.
        """
        if self._reference is None:  # not enrolled this minute
            try:
                async with asyncio.timeout(START_LIMIT_S):
                    await self._renew()
            except (RegistrarUnavailable, TimeoutError) as error:
                if self._kept is None or self.unix_s() >= self._kept.expires_unix_s:
                    raise RegistrarUnavailable(f"{_words(error)} There is no passport that is still good.") from None
                log.warning("starting with the passport from last time: %s", _words(error))
        self._task = asyncio.get_running_loop().create_task(self._keep_fresh())

    async def close(self) -> None:
        """Renew no more. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._client.close()

    async def move(self, cell: str) -> None:
        """Get a passport for another cell, now and from now on; for devices, which choose the nearest.

        Raises `RequestRefused`, `RegistrarUnavailable`.
        """
        self.take(await self._client.admission(self.who, Renew(cell=cell)))
        self._cell = cell  # only now: a refused wish must not be refused again at each renewal

    async def revocations(self) -> bytes:
        """The newest list of revocations, as an envelope. Raises `RegistrarUnavailable`."""
        return await self._client.revocations()

    async def leave(self) -> None:
        """End the membership for good and forget it. Raises `RequestRefused`, `RegistrarUnavailable`."""
        await self._client.farewell(self.who, Leave())
        forget(self._folder)

    def take(self, admitted: Admitted) -> None:
        """A passport that came. It is on the disk before it is used."""
        kept = Kept(
            passport=admitted.passport,
            issued_unix_s=admitted.issued_unix_s,
            expires_unix_s=admitted.expires_unix_s,
            system_passport=admitted.system_passport,
        )
        write(self._folder / PASSPORT_FILE, msgspec.json.encode(kept))
        write(self._folder / HEAD_FILE, admitted.journal_head.encode())
        if admitted.places.registrar_urls and admitted.places != self.places:
            write(self._folder / PLACES_FILE, msgspec.json.encode(admitted.places))
            self.places = admitted.places
            self._client.urls = list(dict.fromkeys((*admitted.places.registrar_urls, *self._client.urls)))
        self._reference = (admitted.issued_unix_s, self._clock.monotonic_s())
        self._kept = kept
        self.refusal = None
        self._tell()

    async def _keep_fresh(self) -> None:
        failures = 0
        while True:
            await self._sleep(self._wait_s(failures))
            try:
                await self._renew()
                failures = 0
            except RegistrarUnavailable as error:
                failures += 1
                log.warning("the passport could not be renewed: %s", error.message)
            except TrustError as error:
                failures += 1
                log.error("the registrar refuses to renew: %s", error.message)
                self.refusal = error
                self._tell()

    async def _sleep(self, duration_s: float) -> None:
        deadline_s = self._clock.monotonic_s() + duration_s
        while (left_s := deadline_s - self._clock.monotonic_s()) > 0:
            await self._clock.sleep(min(PIECE_S, left_s))

    def _wait_s(self, failures: int) -> float:
        draw = self._draws.random()
        if self.refusal is not None:
            return REFUSED_RETRY_S * (0.5 + draw)
        if failures or self._kept is None or self._reference is None:
            return retry_wait_s(failures, draw)
        return renewal_wait_s(self._kept.expires_unix_s - self._kept.issued_unix_s, draw)

    async def _renew(self) -> None:
        self.take(await self._client.admission(self.who, Renew(cell=self._cell)))

    def _tell(self) -> None:
        self.version += 1
        self._news.set()
        self._news = asyncio.Event()


class SystemCredentials:
    """A coordinator's `BusCredentials` for the bus's system account: the same key, with the leave to hear who comes and
    goes."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    @property
    def passport(self) -> str:
        return self._membership.system_passport or ""

    @property
    def authority_pem(self) -> str:
        return self._membership.authority_pem

    def sign(self, nonce: bytes) -> bytes:
        return self._membership.sign(nonce)


class NetworkClock:
    """A `Clock` whose time of day is the registrar's: judges passports rightly on a device whose own is wrong."""

    def __init__(self, clock: Clock, membership: Membership) -> None:
        self._clock = clock
        self._membership = membership

    def monotonic_s(self) -> float:
        return self._clock.monotonic_s()

    def unix_s(self) -> float:
        return self._membership.unix_s()

    async def sleep(self, duration_s: float) -> None:
        await self._clock.sleep(duration_s)


def is_member(folder: Path) -> bool:
    """Whether a folder holds a membership, so that no invitation is needed."""
    return (folder / NETWORK_FILE).is_file() and (folder / PASSPORT_FILE).is_file()


def load(folder: Path, who: Identity, clock: Clock) -> Membership:
    """The membership in a folder. Raises `ConfigError` when there is none, or it is damaged."""
    if not is_member(folder):
        raise ConfigError("This process is no member of a network yet: it needs an invitation (`fallow invite`).")
    try:
        places = msgspec.json.decode((folder / PLACES_FILE).read_bytes(), type=Places)
        kept = msgspec.json.decode((folder / PASSPORT_FILE).read_bytes(), type=Kept)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The membership in {folder} is damaged ({error}): join again with a new invitation."
        ) from None
    return Membership(folder, who, met((folder / NETWORK_FILE).read_bytes()), places, clock, kept)


async def enrol(
    folder: Path, who: Identity, known: Met, invitation: Invitation, asked: Enrol, clock: Clock
) -> Membership:
    """Become a member. `known` is what `registrar_client.meet` gave for the invitation.

    Raises `InvitationRefused`, `RequestRefused`, `RegistrarUnavailable`; `ConfigError` for a folder that holds a
    membership of another network.
    """
    if is_member(folder) and load(folder, who, clock).digest != known.digest:
        raise ConfigError(
            f"{folder} holds a membership of another network. Leave that one (`fallow leave`), or use --state-dir."
        )
    places = Places(registrar_urls=invitation.registrar_urls, bus_urls=())
    async with RegistrarClient(known, places.registrar_urls) as client:
        admitted = await client.admission(who, asked)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write(folder / NETWORK_FILE, known.content)
    write(folder / PLACES_FILE, msgspec.json.encode(places))
    membership = Membership(folder, who, known, places, clock)
    membership.take(admitted)
    return membership


def enrolment_of(invitation: Invitation, name: str, consent: bytes | None) -> Enrol:
    """What is asked with an invitation."""
    return Enrol(
        invitation=invitation.id.hex(), secret=invitation.secret, role=invitation.role, name=name, consent=consent
    )


def forget(folder: Path) -> None:
    """Remove a membership's files; the key stays."""
    for name in (PASSPORT_FILE, HEAD_FILE, PLACES_FILE, NETWORK_FILE, REVOCATIONS_FILE):
        (folder / name).unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Replace a file that only its owner may read, never half-written."""
    partial = path.with_name(f"{path.name}.part")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    with contextlib.suppress(FileNotFoundError):
        partial.replace(path)


def _words(error: BaseException) -> str:
    return error.message if isinstance(error, FallowError) else "The registrar did not answer in time."
