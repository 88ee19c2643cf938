"""Who leads a cell: holds the lease on the bus, or learns that another does.

Rules
- `epoch()` is asked before every act, not remembered: it is `None` from the moment at which another may lead.
- What is decided is decided in `policy/leadership.py`; here are the reads, the writes and the waiting. One of them is
  under way at a time.
- A bus without JetStream offers no lease. One coordinator then leads alone (`SoleAuthority`); that there is only one is
  its operator's business.
"""

import asyncio
import contextlib
import logging
from typing import Final, Protocol

import msgspec

from fallow.domain.clock import Clock
from fallow.domain.errors import BusMessageError, FabricError
from fallow.fabric.contract import LeaseEntry, LeaseKey, Subscription
from fallow.policy import leadership as policy
from fallow.policy.leadership import Candidate, LeaseRules, Read, Standing, Wait, Write

CONFIRM_TIMEOUT_S: Final = 1.0
"""How long a question waits for a leader whose connection has just been broken."""
RELEASE_TIMEOUT_S: Final = 1.0
NAME_MAX_CHARS: Final = 128
EPOCH_JUMP_MAX: Final = 1 << 32
"""How far above its key's revision an epoch may be that a leader believes in: a renewal each second for 136 years. The
bus may have lost its store as often as it will; who claims more lies, and would use up the epochs."""

log = logging.getLogger(__name__)


class LeaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a leader writes at the key, as JSON."""

    holder: str
    """Its name on the bus, unique to one run of one process."""
    name: str
    """For people."""
    epoch: int = 0


class Authority(Protocol):
    """Whether we lead."""

    @property
    def by_lease(self) -> bool:
        """Whether another can take over."""
        ...

    @property
    def ttl_s(self) -> float:
        """How long a lease lasts; where there is none, how long it would."""
        ...

    @property
    def epoch_max(self) -> int:
        """The highest epoch that could be true."""
        ...

    @property
    def leading(self) -> int | None:
        """The epoch of the term that we believe in; acts ask `epoch` in addition."""
        ...

    def epoch(self) -> int | None:
        """The epoch to act under at this moment; `None`: do not act."""
        ...

    async def confirmed(self) -> int | None:
        """`epoch`, after waiting for a renewal that is due because the connection was broken."""
        ...

    def outranked(self, epoch: int) -> None:
        """Somebody who is believed has heard of that epoch: a leader with a lower one steps down. More than `epoch_max`
        is not believed."""
        ...

    def disconnected(self, holder: str) -> None:
        """The connection of that name on the bus broke."""
        ...

    async def changed(self, leading: int | None) -> None:
        """Return once the term is another one than `leading`."""
        ...

    async def start(self) -> None: ...

    async def close(self) -> None:
        """Give the lease up, if we have it. Idempotent."""
        ...


class SoleAuthority:
    """Leads always: where the bus offers no lease, and in tests of everything else."""

    def __init__(self) -> None:
        self._leading = 0
        self._risen = asyncio.Event()

    by_lease = False
    ttl_s = LeaseRules().ttl_s
    epoch_max = EPOCH_JUMP_MAX

    @property
    def leading(self) -> int | None:
        return self._leading

    def epoch(self) -> int | None:
        return self._leading

    async def confirmed(self) -> int | None:
        return self.epoch()

    def outranked(self, epoch: int) -> None:
        if self._leading < epoch <= self.epoch_max:
            self._leading = epoch + 1
            self._risen.set()

    def disconnected(self, holder: str) -> None:
        pass

    async def changed(self, leading: int | None) -> None:
        while self._leading == leading:
            self._risen.clear()
            await self._risen.wait()

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass


class Leadership:
    """The `Authority` over a lease key. `me` is our name on the bus, `name` is for people."""

    def __init__(self, key: LeaseKey, me: str, name: str, clock: Clock, rules: LeaseRules | None = None) -> None:
        self._key = key
        self._name = name[:NAME_MAX_CHARS]
        self._clock = clock
        self._rules = rules or LeaseRules()
        self._candidate = Candidate(me=me)
        self._leading: int | None = None
        self._hints = 0
        self._awake = asyncio.Event()
        self._turned = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._watch: Subscription | None = None

    # --- what others ask ------------------------------------------------------------------------

    by_lease = True

    @property
    def ttl_s(self) -> float:
        return self._rules.ttl_s

    @property
    def epoch_max(self) -> int:
        standing = self._candidate.term or self._candidate.seen
        return (standing.revision if standing is not None else 0) + EPOCH_JUMP_MAX

    @property
    def leading(self) -> int | None:
        return self._leading

    def epoch(self) -> int | None:
        may = policy.may_act(self._candidate, self._clock.monotonic_s(), self._key.connection)
        return self._leading if may else None

    async def confirmed(self) -> int | None:
        epoch = self.epoch()
        if epoch is not None or self._candidate.term is None:
            return epoch
        self._awake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONFIRM_TIMEOUT_S):
                while self.epoch() is None and self._candidate.term is not None:
                    await self._next_turn()
        return self.epoch()

    async def changed(self, leading: int | None) -> None:
        while self._leading == leading:
            await self._next_turn()

    def outranked(self, epoch: int) -> None:
        if epoch > self.epoch_max:
            log.warning("%s: epoch %d is more than the lease allows", BusMessageError.code, epoch)
            return
        self._now(policy.after_refusal(self._candidate, epoch))
        self._awake.set()

    def disconnected(self, holder: str) -> None:
        self._now(policy.after_disconnect(self._candidate, holder, self._clock.monotonic_s()))
        self._awake.set()

    # --- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        self._watch = await self._key.watch(self._on_write)
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if self._watch is not None:
            await self._watch.cancel()
        term = self._candidate.term
        held = self.epoch() is not None
        self._now(msgspec.structs.replace(self._candidate, term=None, end="this coordinator was told to stop"))
        if held and term is not None:
            with contextlib.suppress(FabricError, TimeoutError):
                async with asyncio.timeout(RELEASE_TIMEOUT_S):
                    await self._key.write(b"", term.revision)

    # --- the loop -------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            now_s = self._clock.monotonic_s()
            self._now(policy.lapsed(self._candidate, now_s))
            connection = self._key.connection
            try:
                match policy.next_step(self._candidate, now_s, connection, self._rules):
                    case Wait(until_s):
                        await self._pause(until_s - now_s)
                    case Read():
                        await self._read()
                    case Write(after) if connection is not None:
                        await self._write(after, connection)
            except FabricError as error:
                log.info("the lease: %s", error)
                self._now(policy.after_failure(self._candidate, self._clock.monotonic_s(), self._rules))
            except Exception:
                log.exception("the lease could not be seen to; trying again")
                self._now(policy.after_failure(self._candidate, self._clock.monotonic_s(), self._rules))

    async def _read(self) -> None:
        hints = self._hints
        standing = _standing(await self._key.read())
        candidate = policy.after_read(self._candidate, standing, self._clock.monotonic_s(), self._rules)
        # A hint that came meanwhile may be of a write that the answer does not show.
        self._now(candidate if hints == self._hints else policy.after_hint(candidate))

    async def _write(self, after: int, connection: int) -> None:
        candidate = self._candidate
        epoch = candidate.term.epoch if candidate.term is not None else 0
        record = LeaseRecord(holder=candidate.me, name=self._name, epoch=epoch)
        sent_s = self._clock.monotonic_s()
        revision = await self._key.write(msgspec.json.encode(record), after)
        now_s = self._clock.monotonic_s()
        self._now(policy.after_write(self._candidate, revision, sent_s, now_s, connection, self._rules))

    async def _pause(self, duration_s: float) -> None:
        # In steps: a connection that broke and healed meanwhile asks for a renewal at once.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(duration_s, self._rules.retry_s)):
                await self._awake.wait()
        self._awake.clear()

    def _on_write(self) -> None:
        self._hints += 1
        hinted = policy.after_hint(self._candidate)
        if hinted is not self._candidate:
            self._now(hinted)
            self._awake.set()

    # --- turns ----------------------------------------------------------------------------------

    def _now(self, candidate: Candidate) -> None:
        """Take a new state on, and tell who waits for one."""
        before, term = self._leading, candidate.term
        self._candidate = candidate
        if term is None:
            self._leading = None
        else:
            self._leading = term.epoch
        if self._leading is not None and self._leading != before:
            log.info("leads the cell, epoch %d", self._leading)
        elif self._leading is None and before is not None:
            log.warning("stands by now: %s", candidate.end)
        self._turned.set()
        self._turned = asyncio.Event()

    async def _next_turn(self) -> None:
        await self._turned.wait()


def _standing(entry: LeaseEntry | None) -> Standing | None:
    """What stands at the key; something that is no record is held by nobody that we know."""
    if entry is None:
        return None
    if not entry.value:
        return Standing(entry.revision, None)
    try:
        record = msgspec.json.decode(entry.value, type=LeaseRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Standing(entry.revision, "?")
    return Standing(entry.revision, record.holder, min(max(record.epoch, 0), policy.EPOCH_MAX))
