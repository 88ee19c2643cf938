"""Keeps a process's lease: asks the council's repository, hears of halts, and tells whether work may go on.

Rules
- The repository is asked in a thread of its own, `CHECKS` times in a lease with jitter, at once when the bus says that
  there is something new, and again soon after a failure. A slow repository holds up nothing: a halt that came over the
  bus alone stops this process, on the word of the council of the last charter.
- The ledger (`policy/lease.py`) and the halts lie in the device's folder; both are on disk (fsync) before what they
  allow is used, and a halt soon after it has acted. After a restart a halt holds at once.
- A halt that comes before there is a charter is kept aside until its signer can be known. One that is nobody's, or said
  before, makes nobody ask: whoever can speak on the bus must not keep a fleet busy with it.
- Whatever goes wrong here ends in having no lease.

What a lease is, is decided in `policy/lease.py`; who may halt, in `policy/council.py`.
"""

import asyncio
import contextlib
import functools
import logging
import random
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec

from fallow.domain.charter import LEASE_S, Charter, Halt, Standing
from fallow.domain.clock import Clock
from fallow.domain.errors import CharterInvalid, CharterUnavailable, SignatureInvalid
from fallow.domain.fleet import Subjects
from fallow.domain.ids import Digest, NodeId
from fallow.fabric.contract import Bus, Subscription
from fallow.policy import lease as policy
from fallow.policy.council import halt_holds
from fallow.policy.lease import Ledger, Tenure
from fallow.private_file import write_durably
from fallow.trust.contract import CharterSource
from fallow.trust.council.halts import HaltBook, read_halt

CHECKS: Final = 4
"""In the length of a lease."""
JITTER: Final = 0.25
"""By how much of it an interval is shortened at random: a fleet does not ask at the same moment."""
RETRY_S: Final = 0.5
"""After a failure; twice as long after each further one."""
GAP_S: Final = 0.2
"""Between two checks, whatever is told."""
SPREAD_S: Final = 0.25
"""A whole fleet is told of news at once, and asks within so long."""
FIRST_CHECK_S: Final = 5.0
"""How long a start waits for the first check."""
TICK_S: Final = 0.5
ASIDE_MAX: Final = 16
"""Halts that wait for a charter; of more, the oldest go."""

log = logging.getLogger(__name__)


class LeaseKeeper:
    """`Lease` by the council's word. `start`, then it keeps itself until `close`."""

    def __init__(
        self,
        source: CharterSource,
        folder: Path,
        clock: Clock,
        *,
        network: str,
        release: str,
        revoked: Callable[[], bool],
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`clock` should count the time that the machine sleeps. `network`: the SHA-256 of its descriptor; `release`:
        of this Fallow; `revoked`: whether our own key was.

        Raises `SignatureInvalid` when the halts on disk cannot be read.
        """
        self._source = source
        self._file = folder / "lease.json"
        self._clock = clock
        self._network = network
        self._release = release
        self._revoked = revoked
        self._draw = draw
        self._book = HaltBook(folder / "halts", network)
        self._tenure = Tenure(ledger=policy.ledger_of(_read(self._file), network))
        self._charter: Charter | None = None
        self._halts: dict[NodeId, Halt] = {}
        """Those that hold; until there is a charter, those that held when the process ended."""
        self._aside: deque[bytes] = deque(maxlen=ASIDE_MAX)
        self._barred: tuple[Standing, str] | None = None
        self._trouble = "it was not asked yet"
        self._told = Standing.NO_LEASE
        self._turned = asyncio.Event()
        self._news = asyncio.Event()
        self._checked = asyncio.Event()
        self._writing = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "charter")
        self._subscriptions: list[Subscription] = []
        self._tasks: list[asyncio.Task[None]] = []

    # --- life -----------------------------------------------------------------------------------

    async def start(self, bus: Bus, subjects: Subjects) -> None:
        """Listen, and ask; returns after the first answer, or `FIRST_CHECK_S`. Raises `BusUnavailable`."""
        for envelope in self._book.envelopes():
            halt, signer = read_halt(envelope, self._network)
            self._halts[signer] = halt
        self._look()
        self._subscriptions = [
            await bus.subscribe(subjects.halt, self._on_halt),
            await bus.subscribe(subjects.charter, self._on_news),
        ]
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._keep_checking()), loop.create_task(self._keep_paying())]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_CHECK_S):
                await self._checked.wait()

    async def close(self) -> None:
        """Idempotent."""
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await subscription.cancel()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    # --- Lease ----------------------------------------------------------------------------------

    @property
    def standing(self) -> Standing:
        """Now."""
        if self._barred is not None:
            return self._barred[0]
        return Standing.WORKING if policy.live(self._tenure, self._clock.monotonic_s()) else Standing.NO_LEASE

    @property
    def why(self) -> str:
        """For a person; empty while working."""
        if self._barred is not None:
            return self._barred[1]
        if self.standing is Standing.WORKING:
            return ""
        return f"There is no fresh word from the network's council, and without it nothing works here: {self._trouble}"

    @property
    def charter(self) -> Charter | None:
        return self._charter

    def allows(self, model: Digest) -> bool:
        return self._charter is not None and model in self._charter.models

    async def changed(self, standing: Standing) -> Standing:
        """Wait until the standing is another than this one."""
        while (now := self.standing) is standing:
            await self._turned.wait()
        return now

    def unix_s(self) -> float:
        """The time to judge signed documents by: a wall clock that was set back counts no further than what the
        council has signed."""
        return policy.reference_unix_s(self._tenure.ledger, self._clock.unix_s())

    def look(self) -> None:
        """Something that the standing depends on may have changed: a revocation has come."""
        self._look()

    # --- news -----------------------------------------------------------------------------------

    async def _on_news(self, _: str, __: bytes) -> None:
        self._news.set()

    async def _on_halt(self, _: str, envelope: bytes) -> None:
        try:
            halt, signer = read_halt(envelope, self._network)
        except SignatureInvalid as error:
            log.warning("%s: what came as a halt was not believed: %s", error.code, error)
            return
        if self._charter is None:
            self._news.set()
            self._aside.append(envelope)
        elif signer not in set(self._charter.council.values()):
            log.warning("a halt by %s, who is not in the council, does not hold", signer[:8])
        elif not self._holds(halt, signer):
            log.info("a halt of epoch %d by %s does not hold", halt.epoch, signer[:8])
        elif (known := self._halts.get(signer)) is None or known.epoch < halt.epoch:
            self._halts[signer] = halt
            self._look()
            self._news.set()
            await self._keep_halts([envelope], self._charter)

    def _holds(self, halt: Halt, signer: NodeId) -> bool:
        charter = self._charter
        return charter is not None and halt_holds(
            halt, signer, charter.council.values(), self._network, charter.policy.epoch
        )

    async def _keep_halts(self, envelopes: list[bytes], charter: Charter) -> None:
        """Write down the halts that hold, and forget those that hold no more."""

        def write() -> None:
            for envelope in envelopes:
                with contextlib.suppress(SignatureInvalid):
                    self._book.add(envelope, charter.council, charter.policy.epoch)
            self._book.prune(charter.council, charter.policy.epoch)

        async with self._writing:
            try:
                await asyncio.to_thread(write)
            except OSError as error:
                log.error("a halt could not be written down, and holds until a restart: %s", error)

    # --- the repository -------------------------------------------------------------------------

    async def _keep_checking(self) -> None:
        failures = 0
        while True:
            self._news.clear()
            failures = 0 if await self._check() else failures + 1
            self._checked.set()
            lease_s = LEASE_S if self._charter is None else self._charter.policy.lease_s
            pause_s = lease_s / CHECKS
            if failures:
                pause_s = min(pause_s, RETRY_S * 2.0 ** min(failures - 1, 16))
            pause_s *= 1 - JITTER * self._draw()
            await self._clock.sleep(min(GAP_S, pause_s))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(pause_s - GAP_S, 0.0)):
                    await self._news.wait()
                    await self._clock.sleep(SPREAD_S * self._draw())

    async def _check(self) -> bool:
        """Ask once. Whether there was an answer to believe."""
        loop = asyncio.get_running_loop()
        try:
            charter, halts = await loop.run_in_executor(self._thread, self._source.check, self.unix_s())
        except (CharterInvalid, CharterUnavailable) as error:
            if error.message != self._trouble:
                log.warning("%s: %s", error.code, error)
            self._trouble = error.message
            return False
        except Exception as error:
            log.exception("asking the council's repository failed")
            self._trouble = f"asking the council's repository failed inside ({type(error).__name__})"
            return False
        await self._adopt(charter, halts)
        return True

    async def _adopt(self, charter: Charter, halts: tuple[bytes, ...]) -> None:
        self._charter = charter
        await self._keep_halts([*self._aside, *halts], charter)
        self._aside.clear()
        fresh = {signer: halt for signer, halt in self._halts.items() if self._holds(halt, signer)}
        self._halts = fresh | dict(self._book.holding(charter.council.values(), charter.policy.epoch))
        self._look()
        version = (charter.root_version, charter.timestamp_version)
        now_s = self._clock.monotonic_s()
        expires_unix_s, lease_s = charter.timestamp_expires_unix_s, charter.policy.lease_s

        def confirmed(tenure: Tenure) -> Tenure:
            sure = policy.confirmed(tenure, version, expires_unix_s, lease_s, self._clock.unix_s(), now_s)
            return sure if sure is tenure else policy.paid(sure, lease_s / policy.SLICES, now_s)

        await self._use(confirmed)
        self._trouble = "its last word is too old"
        self._look()

    # --- the lease ------------------------------------------------------------------------------

    async def _keep_paying(self) -> None:
        """Pay for the next slice in time, and notice when there is none."""
        while True:
            now_s = self._clock.monotonic_s()
            slice_s = (LEASE_S if self._charter is None else self._charter.policy.lease_s) / policy.SLICES
            if policy.payment_due(self._tenure, slice_s, now_s):
                await self._use(functools.partial(policy.paid, slice_s=slice_s, now_s=now_s))
            self._look()
            await self._clock.sleep(min(TICK_S, policy.next_look_s(self._tenure, slice_s, now_s)))

    async def _use(self, change: Callable[[Tenure], Tenure]) -> None:
        """Write the ledger down, then use what it paid for. Without a disk to write on there is no lease."""
        async with self._writing:
            tenure = change(self._tenure)
            if tenure is self._tenure:
                return
            try:
                await asyncio.to_thread(write_durably, self._file, msgspec.json.encode(tenure.ledger))
            except OSError as error:
                self._trouble = f"the lease cannot be written down ({error.strerror})"
                log.error("%s: %s", self._file, error)
                return
            self._tenure = tenure

    def _look(self) -> None:
        """See whether the standing is another one, and tell who waits for that."""
        self._barred = policy.barred(self._charter, self._halts.values(), self._release, self._revoked())
        standing = self.standing
        if standing is not self._told:
            log.log(
                logging.INFO if standing is Standing.WORKING else logging.WARNING,
                "standing: %s. %s",
                standing,
                self.why,
            )
            self._told = standing
            self._turned.set()
            self._turned = asyncio.Event()


def _read(file: Path) -> Ledger:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Ledger)
    except FileNotFoundError:
        return Ledger()
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        log.warning("%s cannot be read, and is begun anew: %s", file, error)
        return Ledger()
