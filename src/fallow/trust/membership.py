"""A process's membership in a network: its passport, kept fresh, and what it must remember between starts.

Rules
- One folder, mode 0700: `network.json` (pinned for good), `places.json`, `passport`, `journal-head` (heads of the
  registrar's journal, from the oldest on: `noted_heads.py`). The key is not here: the caller has it.
- What cannot be written down is used all the same, and told: a full disk must end nobody's membership.
- A passport is renewed at the first start, at half of its life, and with growing pauses while the registrar is away.
  It is used until the registrar's clock says that it has ended: that clock is counted on from the last answer by the
  monotonic one, so that a wrong or jumping clock of the device makes no difference after the first answer.
- Waits are against a deadline by that clock, which may count the time that the machine sleeps, and are slept in pieces:
  after a night, the passport is renewed within `PIECE_S` of waking.
- A refusal (revoked, retired) is kept in `refusal` and told through `changed`; the member keeps asking, seldom.
- A passport that the bus refuses (it ended while the machine slept, a clock jumped, the key was revoked) is renewed at
  once, and with growing pauses when the bus refuses the next ones too: a captured bus makes nobody flood the registrar.
- Where the network is, this process learns from the registrar alone: from a renewal's answer, which comes over TLS of
  the network's authority, or from a list that the registrar signed (`moved`). Both carry the list's number, so that an
  older list undoes nothing. All that is dialled asks here each time (`places`, `registrar_urls`).
- It implements the bus's `BusCredentials`.
"""

import asyncio
import logging
import random
from pathlib import Path
from typing import Final

import msgspec

from fallow.domain.clock import Clock
from fallow.domain.errors import (
    ConfigError,
    FallowError,
    JournalBroken,
    MembershipEnded,
    RegistrarUnavailable,
    TrustError,
)
from fallow.domain.network import Network, Places
from fallow.policy.enrolment import REFUSED_RETRY_S, renewal_wait_s, retry_wait_s
from fallow.private_file import write_durably
from fallow.trust.keys import Identity
from fallow.trust.noted_heads import note
from fallow.trust.registrar.invitations import Invitation
from fallow.trust.registrar.requests import Admitted, Enrol, Leave, Renew
from fallow.trust.registrar.state import NETWORK_FILE, PLACES_FILE, digest_of
from fallow.trust.registrar_client import URLS_MAX, Met, RegistrarClient, met

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
    list_sequence: int = 0
    """Of the list of revocations that the registrar had then: what an older one says of places is no news."""


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
        self.folder = folder
        self.places = places
        self.refusal: FallowError | None = None
        """Why the registrar renews no more; `None` while it does."""
        self.version = 0
        """Counts passports and refusals that came."""
        self._clock = clock
        self._draws = draws or random.Random()  # noqa: S311 (spreads load; secures nothing)
        self.registrar_urls = places.registrar_urls
        """Where the registrar may be, best first: the present places, then those of earlier in this process's life."""
        self._client = RegistrarClient(known, places.registrar_urls)
        self._kept = kept
        self._list_sequence = 0 if kept is None else kept.list_sequence
        self._reference: tuple[float, float] | None = None
        self._news = asyncio.Event()
        self._failures = 0
        """Renewals that nobody answered, or that were refused, in a row."""
        self._urgent = asyncio.Event()
        """There is a reason to renew before the time."""
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

    async def has_ended(self) -> bool:
        """Whether the registrar says so, asked for a renewal; `False` where it does not answer."""
        try:
            async with asyncio.timeout(START_LIMIT_S):
                await self._renew()
        except MembershipEnded:
            return True
        except (TrustError, TimeoutError) as error:
            log.warning("whether the membership has ended is not known: %s", _words(error))
        return False

    async def reach(self) -> None:
        """See that the registrar answers. Raises `RegistrarUnavailable`."""
        await self._client.places()

    async def leave(self) -> None:
        """End the membership and forget it: what this device was given is void from now on.

        Raises `MembershipEnded` when it had ended before, and it is forgotten all the same; `RegistrarUnavailable`.
        """
        try:
            await self._client.farewell(self.who, Leave())
        except MembershipEnded:
            forget(self.folder)
            raise
        forget(self.folder)

    def refused(self) -> None:
        """The bus did not take the passport: get another, unless that is under way or was refused."""
        if self._failures == 0 and self.refusal is None:
            self._urgent.set()

    def moved(self, places: Places, list_sequence: int) -> None:
        """The network is reached there from now on, by a list of that number; this and all that asks here uses it."""
        if list_sequence > self._list_sequence:
            self._list_sequence = list_sequence
            self._be_at(places)

    def _be_at(self, places: Places) -> None:
        if not places.registrar_urls or places == self.places:
            return
        try:
            write_durably(self.folder / PLACES_FILE, msgspec.json.encode(places))
        except OSError as error:
            log.error("%s: where the network is now is not kept over a restart: %s", self.folder, error)
        self.places = places
        self.registrar_urls = tuple(dict.fromkeys((*places.registrar_urls, *self.registrar_urls)))[:URLS_MAX]
        self._client.urls = list(self.registrar_urls)
        log.info("the registrar is at %s, the bus at %s", " ".join(places.registrar_urls), " ".join(places.bus_urls))
        if self._failures:
            self._urgent.set()

    def take(self, admitted: Admitted) -> OSError | None:
        """A passport that came. Why it is not kept over a restart, where it cannot be written down."""
        trouble: OSError | None = None
        kept = Kept(
            passport=admitted.passport,
            issued_unix_s=admitted.issued_unix_s,
            expires_unix_s=admitted.expires_unix_s,
            system_passport=admitted.system_passport,
            list_sequence=max(self._list_sequence, admitted.list_sequence),
        )
        try:
            write_durably(self.folder / PASSPORT_FILE, msgspec.json.encode(kept))
            note(self.folder / HEAD_FILE, admitted.journal_head, self._clock.unix_s())
        except OSError as error:
            trouble = error
            log.error("%s: the new passport is not kept over a restart: %s", self.folder, error)
        except JournalBroken as error:
            log.error("%s: the journal's head could not be noted: %s", self.folder, error.message)
        self._list_sequence = kept.list_sequence
        self._be_at(admitted.places)
        self._reference = (admitted.issued_unix_s, self._clock.monotonic_s())
        self._kept = kept
        self.refusal = None
        self._tell()
        return trouble

    async def _keep_fresh(self) -> None:
        refusals = 0  # by the bus, in a row
        while True:
            if not await self._woken_within(self._wait_s()):
                refusals = 0
            elif self._failures == 0:  # else the network is elsewhere now, and asked there at once
                if refusals == 0:
                    log.warning("the control bus refuses our passport: it is renewed now")
                await self._clock.sleep(retry_wait_s(refusals, self._draws.random()))
                refusals += 1
            self._urgent.clear()
            try:
                await self._renew()
                self._failures = 0
                self._urgent.clear()  # what the bus refused meanwhile was the one before
            except RegistrarUnavailable as error:
                self._failures += 1
                log.warning("the passport could not be renewed: %s", error.message)
            except TrustError as error:
                self._failures += 1
                log.error("the registrar refuses to renew: %s", error.message)
                self.refusal = error
                self._tell()

    async def _woken_within(self, duration_s: float) -> bool:
        """Whether there was something urgent before the time was over."""
        deadline_s = self._clock.monotonic_s() + duration_s
        urgent = asyncio.ensure_future(self._urgent.wait())
        try:
            while not urgent.done() and (left_s := deadline_s - self._clock.monotonic_s()) > 0:
                nap = asyncio.ensure_future(self._clock.sleep(min(PIECE_S, left_s)))
                try:
                    await asyncio.wait({nap, urgent}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    nap.cancel()
            return urgent.done()
        finally:
            urgent.cancel()

    def _wait_s(self) -> float:
        draw = self._draws.random()
        if self.refusal is not None:
            return REFUSED_RETRY_S * (0.5 + draw)
        if self._failures or self._kept is None or self._reference is None:
            return retry_wait_s(self._failures, draw)
        return renewal_wait_s(self._kept.expires_unix_s - self._kept.issued_unix_s, draw)

    async def _renew(self) -> None:
        self.take(await self._client.admission(self.who, Renew(cell=self._cell)))

    def _tell(self) -> None:
        self.version += 1
        self._news.set()
        self._news = asyncio.Event()


def is_member(folder: Path) -> bool:
    """Whether a folder holds a membership, so that no invitation is needed."""
    return (folder / NETWORK_FILE).is_file() and (folder / PASSPORT_FILE).is_file()


def require_network(folder: Path, digest: str) -> None:
    """Raises `ConfigError` for a folder that holds a membership of another network than that one."""
    if is_member(folder) and digest_of((folder / NETWORK_FILE).read_bytes()) != digest:
        raise ConfigError(
            f"{folder} holds a membership of another network, and nothing was changed. Leave that one first "
            "(`fallow leave`; if its registrar is gone for good, delete the folder), or use another --state-dir."
        )


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

    Raises `InvitationRefused`, `RequestRefused`, `RegistrarUnavailable`; `ConfigError` as `require_network` does, and
    where the membership cannot be written down: who is nobody after a restart has not joined.
    """
    require_network(folder, known.digest)
    places = Places(registrar_urls=invitation.registrar_urls, bus_urls=())
    async with RegistrarClient(known, places.registrar_urls) as client:
        admitted = await client.admission(who, asked)
    membership = Membership(folder, who, known, places, clock)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(folder / NETWORK_FILE, known.content)
        write_durably(folder / PLACES_FILE, msgspec.json.encode(places))
        if (trouble := membership.take(admitted)) is not None:
            raise trouble
    except OSError as error:
        await membership.close()
        raise ConfigError(
            f"This device was admitted, but its membership cannot be kept in {folder} ({error.strerror or error}). "
            "Make room there, and run the same command again: the invitation is still good for this device."
        ) from None
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


def _words(error: BaseException) -> str:
    return error.message if isinstance(error, FallowError) else "The registrar did not answer in time."
