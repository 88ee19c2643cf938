"""Hears who was revoked, and where the network is: over the bus, from the registrar at an interval, and who was revoked
from the disk at a start.

Rules
- A list that was believed is used at once and then written to `revocations` in the process's folder, so that a process
  that starts while the registrar cannot be reached still refuses whom it refused before.
- The registrar is asked at a start, before the bus is listened to, and then `CHECKS` times in a lease: whoever keeps
  the bus's messages from a process keeps a revocation from it for a quarter of a lease at most, or stops the lease's
  renewal as well.
- Where a newer list says that the network is, all of this process looks from then on (`Membership.moved`), unless the
  registrar itself answered later than that. The list is the registrar's by its signature, and who answers there must
  show the authority's certificate: a captured bus can keep a move from us, and leads us to nobody.
- An attempt that fails is tried again at the next turn, and logged once until one succeeds.
- That our own membership ended, by a list or by a refusal to renew, is passed on through `look`.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fallow.domain.clock import Clock
from fallow.domain.errors import FabricError, SignatureInvalid, TrustError
from fallow.domain.fleet import Subjects
from fallow.fabric.contract import Bus, Subscription
from fallow.private_file import write_durably
from fallow.trust.envelope import ENVELOPE_MAX_BYTES
from fallow.trust.membership import REVOCATIONS_FILE, Membership
from fallow.trust.passports import PassportReader

CHECKS: Final = 4
"""In the length of a lease."""

log = logging.getLogger(__name__)


class RevocationWatch:
    """Keeps one process's `PassportReader` informed. `start`, then it keeps itself until `close`."""

    def __init__(
        self,
        member: Membership,
        passports: PassportReader,
        folder: Path,
        clock: Clock,
        *,
        lease_s: Callable[[], float],
        look: Callable[[], None],
    ) -> None:
        """`lease_s`: a lease's present length. `look` is called after a list or a refusal that may concern us."""
        self._member = member
        self._passports = passports
        self._file = folder / REVOCATIONS_FILE
        self._clock = clock
        self._lease_s = lease_s
        self._look = look
        self._trouble = ""
        self._writing = asyncio.Lock()
        self._subscriptions: list[Subscription] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, bus: Bus, subjects: Subjects) -> None:
        """Know what was known when the process ended, and what the registrar says now. Raises `BusUnavailable`."""
        self._recall()
        # The registrar before the bus, which may be captured: of a list that it plays again, a newer one is known then.
        await self._ask()
        self._subscriptions.append(await bus.subscribe(subjects.revocations, self._on_list))
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._keep_asking()), loop.create_task(self._follow_membership())]

    async def close(self) -> None:
        """Idempotent."""
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await subscription.cancel()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_asking(self) -> None:
        while True:
            await self._clock.sleep(self._lease_s() / CHECKS)
            await self._ask()

    async def _follow_membership(self) -> None:
        seen = self._member.version
        while True:
            seen = await self._member.changed(seen)
            self._look()

    async def _ask(self) -> None:
        try:
            await self._learn(await self._member.revocations())
        except (TrustError, FabricError) as error:
            if error.message != self._trouble:
                log.warning("%s: the list of revocations could not be asked for: %s", error.code, error)
            self._trouble = error.message
        else:
            self._trouble = ""

    async def _on_list(self, _: str, envelope: bytes) -> None:
        try:
            await self._learn(envelope)
        except SignatureInvalid as error:
            log.warning("%s: what came as a list of revocations was not believed: %s", error.code, error)

    async def _learn(self, envelope: bytes) -> None:
        """Raises `SignatureInvalid`."""
        found = self._passports.learn(envelope)
        if found is None:
            return
        self._look()
        if found.places is not None:
            self._member.moved(found.places, found.sequence)
        async with self._writing:
            try:
                await asyncio.to_thread(write_durably, self._file, envelope)
            except OSError as error:
                log.error("%s: the list of revocations is not kept over a restart: %s", self._file, error)

    def _recall(self) -> None:
        try:
            with self._file.open("rb") as file:
                self._passports.learn(file.read(ENVELOPE_MAX_BYTES + 1))
        except FileNotFoundError:
            pass
        except (OSError, SignatureInvalid) as error:
            log.warning("%s cannot be used: %s", self._file, error)
