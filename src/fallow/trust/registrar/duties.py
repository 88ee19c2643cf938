"""What a running registrar does unasked: tells the bus and everybody of revocations and halts, keeps the lease fresh.

Rules
- One loop looks every `LOOK_S`, or at once when it is woken. It looks at the database and at the repository, so that
  what other processes did (a command on this machine, a second registrar) is told as soon as what came by HTTPS.
- A duty that fails is tried again at the next look, is logged once, and keeps no other from being done. Without the bus
  the lease is renewed all the same: devices fetch it by HTTPS.
- Who is revoked is told so before the bus's server is brought the news, which cuts its connection.
- What cannot be brought to the bus's server is tried again as it is until something changes: while the bus is away,
  nothing is written.
- Revocations and halts are told when they change, when somebody says hello, and at an interval: the bus forgets.
- While a halt holds, the lease is not renewed. That is the repository's rule; here it is no failure.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from fallow.domain.clock import Clock
from fallow.domain.errors import FallowError, NotWorking, SignatureInvalid
from fallow.domain.fleet import Subjects
from fallow.fabric.contract import Bus, Subscription
from fallow.trust.council.halts import HALT_MAX_BYTES, decode_halts
from fallow.trust.council.records import record, seen
from fallow.trust.council.repository import HALTS_FILE, Repository
from fallow.trust.registrar.database import RegistryDb
from fallow.trust.registrar.service import Registrar
from fallow.trust.registrar.word import RegistrarWord

LOOK_S: Final = 0.5
LOOK_MIN_S: Final = 0.05
"""Between two looks, however often it is woken."""
TELL_AGAIN_S: Final = 30.0
PUSH_AGAIN_S: Final = 600.0
"""The bus keeps its accounts by itself; this is for a server whose folder was lost."""
LEASE_SHARE: Final = 0.1
"""Of a lease's length, after which it is renewed."""
RETIRE_EVERY_S: Final = 3600.0

Push = Callable[[str, str], Awaitable[None]]
"""Brings the bus's server an account's new JWT; the account by its public nkey. Raises a `FallowError`."""

log = logging.getLogger(__name__)


class RegistrarDuties:
    """The loop. `wake` it after a change."""

    def __init__(
        self, registrar: Registrar, word: RegistrarWord, repository: Repository, database: RegistryDb, clock: Clock
    ) -> None:
        self._registrar = registrar
        self._word = word
        self._repository = repository
        self._database = database
        self._clock = clock
        self._woken = asyncio.Event()
        self._bus: Bus | None = None
        self._push: Push | None = None
        self._subscriptions: list[Subscription] = []
        self._task: asyncio.Task[None] | None = None
        self._failures: dict[str, str] = {}
        self._halts: tuple[bytes, ...] = ()
        self._accounts: tuple[int, dict[str, str]] | None = None
        """What is to be pushed, until it was, and of which number; each making of it writes to the disk."""
        self._pushed: int | None = None
        self._told: int | None = None
        self._due_s: dict[str, float] = {}

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def attach(self, bus: Bus, push: Push) -> None:
        """From now on tell the bus as well. Raises `BusUnavailable`."""
        everywhere = Subjects("*")
        hello = await bus.subscribe(everywhere.hello, self._on_hello)
        self._subscriptions += [hello, await bus.subscribe(everywhere.halt, self._on_halt)]
        self._bus, self._push = bus, push
        self.wake()

    def wake(self) -> None:
        """Look at once."""
        self._woken.set()

    async def close(self) -> None:
        """Stop. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        for subscription in self._subscriptions:
            await subscription.cancel()
        self._subscriptions = []

    async def _run(self) -> None:
        duties = (
            ("halts", self._tell_halts),
            ("revocations", self._tell_revocations),
            ("push", self._push_accounts),
            ("lease", self._renew_lease),
            ("council", self._look_at_council),
            ("retire", self._retire),
        )
        while True:
            self._woken.clear()
            for name, duty in duties:
                await self._attempt(name, duty)
            await self._clock.sleep(LOOK_MIN_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._woken.wait()

    async def _attempt(self, name: str, duty: Callable[[], Awaitable[None]]) -> None:
        try:
            await duty()
        except FallowError as error:
            if self._failures.get(name) != error.message:
                log.warning("%s: %s", name, error.message)
            self._failures[name] = error.message
        except Exception:  # the database or the disk; others' duties go on
            if name not in self._failures:
                log.exception("the registrar's duty %r failed", name)
            self._failures[name] = ""
        else:
            if self._failures.pop(name, None) is not None:
                log.info("%s: works again", name)

    # --- each duty ------------------------------------------------------------------------------

    async def _renew_lease(self) -> None:
        if not self._is_due("lease"):
            return
        with contextlib.suppress(NotWorking):
            await asyncio.to_thread(self._repository.renew_timestamp, self._clock.unix_s())
        policy = await asyncio.to_thread(self._repository.policy)
        self._done("lease", policy.lease_s * LEASE_SHARE)

    async def _push_accounts(self) -> None:
        sequence = await asyncio.to_thread(self._word.sequence)
        if self._push is None or (sequence == self._pushed and not self._is_due("push")):
            return
        if self._accounts is None or self._accounts[0] != sequence:
            self._accounts = (sequence, await asyncio.to_thread(self._word.accounts))
        for account, account_jwt in self._accounts[1].items():
            await self._push(account, account_jwt)
        self._accounts, self._pushed = None, sequence
        self._done("push", PUSH_AGAIN_S)

    async def _tell_revocations(self) -> None:
        sequence = await asyncio.to_thread(self._word.sequence)
        if self._bus is None or (sequence == self._told and not self._is_due("revocations")):
            return
        envelope = await asyncio.to_thread(self._word.revocations)
        for cell in await asyncio.to_thread(self._word.cells):
            await self._bus.publish(Subjects(cell).revocations, envelope)
        self._told = sequence
        self._done("revocations", TELL_AGAIN_S)

    async def _look_at_council(self) -> None:
        records = await asyncio.to_thread(self._record_council)
        if records and self._bus is not None:
            for cell in await asyncio.to_thread(self._word.cells):
                await self._bus.publish(Subjects(cell).charter, b"")

    def _record_council(self) -> int:
        now = seen(self._repository.in_force(), self._repository.halts())
        return len(record(self._database, now, self._clock.unix_s()))

    async def _tell_halts(self) -> None:
        halts = await asyncio.to_thread(self._halts_in_force)
        if self._bus is None or (halts == self._halts and not self._is_due("halts")):
            return
        for cell in await asyncio.to_thread(self._word.cells):
            for envelope in halts:
                await self._bus.publish(Subjects(cell).halt, envelope)
        self._halts = halts
        self._done("halts", TELL_AGAIN_S)

    def _halts_in_force(self) -> tuple[bytes, ...]:
        holding = {signer for signer, _ in self._repository.halts()}
        kept = decode_halts(self._repository.file(HALTS_FILE) or b"\x90", self._repository.network)
        return tuple(envelope for envelope, signer, _ in kept if signer in holding)

    async def _retire(self) -> None:
        if self._is_due("retire"):
            await asyncio.to_thread(self._registrar.retire_forgotten)
            self._done("retire", RETIRE_EVERY_S)

    def _is_due(self, name: str) -> bool:
        return self._clock.monotonic_s() >= self._due_s.get(name, 0.0)

    def _done(self, name: str, again_s: float) -> None:
        self._due_s[name] = self._clock.monotonic_s() + again_s

    # --- what is heard --------------------------------------------------------------------------

    async def _on_hello(self, _: str, __: bytes) -> None:
        """Somebody leads anew, and may have missed what was told."""
        self._due_s.pop("revocations", None)
        self._due_s.pop("halts", None)
        self.wake()

    async def _on_halt(self, _: str, message: bytes) -> None:
        """A member's halt that came by the bus first; our own come back to us and are known."""
        if len(message) > HALT_MAX_BYTES or message in self._halts:
            return
        try:
            if await asyncio.to_thread(self._repository.add_halt, message) is not None:
                self.wake()
        except SignatureInvalid as error:
            log.warning("what came as a halt is none: %s", error.message)
