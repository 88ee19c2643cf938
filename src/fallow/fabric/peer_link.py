"""One link as `Peers` sees it: the handshake, admission, pings, and what is known of its life.

Rules
- Nothing here waits except `answers`. A link goes from greeting to open to ended, never back. A frame costs a few
  comparisons of types before the caller's `on_frame`.
- Before the peer's `Hello` was believed, nothing else of it is: not even a ping is answered.
- A peer is admitted for as long as its passport is good. It shows a newer one before; else the link is closed. How
  long that is counts by the monotonic clock, from when it was shown.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from fallow.domain.clock import Clock
from fallow.domain.credentials import PASSPORT_GRACE_S, Role
from fallow.domain.errors import (
    FabricError,
    FallowError,
    FrameError,
    LinkClosed,
    PassportRefused,
    ProtocolVersionMismatch,
)
from fallow.domain.frames import AnyHeader, Credentials, Frame, Hello, Ping, Pong
from fallow.domain.ids import NodeId
from fallow.fabric.contract import Admission, PushLink
from fallow.policy.liveness import Liveness, Verdict, excuse, heard, judge, ping_due

RTT_SMOOTHING: Final = 0.125
"""Weight of a new round trip in the average, as in TCP (RFC 6298)."""
MAX_OPEN_PINGS: Final = 16
"""Pings whose answers are still awaited; older ones are forgotten."""
INSTANCE_PREFIX: Final = "instance:"
"""Capability that names one run of a process. A peer that crashed and came back has another."""

_OURS: Final = frozenset({Hello, Credentials, Ping, Pong})
"""Kinds that never leave this module."""

log = logging.getLogger(__name__)


def negotiated_version(ours: Hello, theirs: Hello) -> int:
    """The newest version that both speak. Raises `ProtocolVersionMismatch`."""
    version = min(ours.version_max, theirs.version_max)
    if version < max(ours.version_min, theirs.version_min):
        raise ProtocolVersionMismatch(
            f"this side speaks protocol versions {ours.version_min} to {ours.version_max}, the peer "
            f"{theirs.version_min} to {theirs.version_max}; update the older of the two"
        )
    return version


class PeerLink:
    """A link, its handshake and its pulse."""

    def __init__(self, link: PushLink, clock: Clock, liveness: Liveness, admission: Admission) -> None:
        self.link = link
        self.peer: NodeId = link.peer
        self.rtt_s: float | None = None
        loop = asyncio.get_running_loop()
        self.greeted: asyncio.Future[None] = loop.create_future()
        """Done once the peer's `Hello` came and fits; fails with why it never will."""
        self.ended: asyncio.Future[str] = loop.create_future()
        self.version = 0
        """As negotiated; 0: nothing of the peer is believed."""
        self._refused = False
        self.capabilities: frozenset[str] = frozenset()
        self.instance: str | None = None
        """Which run of the peer's process this is, when it says so."""
        self.role: Role | None = None
        self.computes = False
        """Whether the peer is a device, by the same word."""
        """The peer's, once it was admitted."""
        self._admission = admission
        self._admitted_until_s = 0.0
        self._shown = ""
        """Our passport, as the peer has it."""
        self._clock = clock
        self._liveness = liveness
        now_s = clock.monotonic_s()
        self._pulse = heard(now_s)
        self._bytes_seen = 0
        self._frames_seen = 0
        self._sent_s = self._pinged_s = now_s
        self._nonce = 0
        self._pings: dict[int, float] = {}
        self._pongs: dict[int, asyncio.Future[bool]] = {}

    def open(
        self,
        hello: Hello,
        on_frame: Callable[[NodeId, Frame], None],
        on_greeted: Callable[["PeerLink"], None],
        on_ended: Callable[["PeerLink", str], None],
    ) -> None:
        """Say hello and take frames from now on."""
        self._hello = hello
        self._shown = hello.passport
        self._on_frame = on_frame
        self._on_greeted = on_greeted
        self._on_ended = on_ended
        # A failed handshake that nobody waits for (an inbound link) is not an unretrieved error.
        self.greeted.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.link.post(Frame(hello))
        self.link.set_receiver(self._receive, self._end)

    async def close(self, code: str, message: str) -> None:
        await self.link.close(code, message)

    def drop(self, reason: str) -> None:
        """Close at once, without flushing."""
        self.link.abort(reason)

    def drop_unless_greeted(self) -> None:
        if not self.greeted.done():
            self.drop("no hello in time")

    async def answers(self, timeout_s: float) -> bool:
        """Whether a ping is answered in time.

        A ping behind megabytes of ours on a slow uplink may be late: then anything that came meanwhile counts.
        """
        bytes_before = self.link.bytes_received
        nonce = self._ping()
        pong = self._pongs[nonce] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                answered: bool = await pong
                return answered
        except TimeoutError:
            return self.link.bytes_received > bytes_before
        finally:
            self._pongs.pop(nonce, None)

    def tick(self, now_s: float, paused_s: float) -> None:
        """Look after the link: note what came, drop a dead peer, ping when it is time."""
        if self.link.bytes_received != self._bytes_seen:
            self._bytes_seen = self.link.bytes_received
            self._pulse = heard(now_s)
        else:
            self._pulse = excuse(self._pulse, paused_s, now_s)
        if judge(self._pulse, now_s, self._liveness) is Verdict.LOST:
            self.drop(f"silent for {now_s - self._pulse.heard_s:.1f} s")
            return
        if self.version and not self._still_admitted(now_s):
            return
        if self.link.frames_sent != self._frames_seen:
            self._frames_seen = self.link.frames_sent
            self._sent_s = now_s
        if ping_due(self._sent_s, self._pinged_s, now_s, self._liveness):
            self._ping()

    # --- frames ---

    def _receive(self, frame: Frame) -> None:
        header = frame.header
        kind = type(header)
        if self.version and kind not in _OURS:
            self._on_frame(self.peer, frame)
        elif self._refused:
            return
        elif not self.version and kind is not Hello:
            self._refuse(FrameError(f"expected hello first, got {kind.__name__}"))
        else:
            self._on_ours(header)

    def _on_ours(self, header: AnyHeader) -> None:
        match header:
            case Ping():
                self.link.post(Frame(Pong(nonce=header.nonce)))
            case Pong():
                self._pong(header.nonce)
            case Credentials():
                self._renew(header)
            case Hello() if self.version:
                self._refuse(FrameError("expected one hello, got a second"))
            case Hello():
                self._greet(header)

    def _greet(self, theirs: Hello) -> None:
        try:
            version = negotiated_version(self._hello, theirs)
            self._admit(theirs.passport)
        except (ProtocolVersionMismatch, PassportRefused) as error:
            self._refuse(error)
            return
        self.version = version
        self.capabilities = frozenset(theirs.capabilities)
        self.instance = next((name for name in theirs.capabilities if name.startswith(INSTANCE_PREFIX)), None)
        if not self.greeted.done():
            self.greeted.set_result(None)
        self._on_greeted(self)
        self._ping()

    # --- admission ---

    def _admit(self, passport: str) -> None:
        """Raises `PassportRefused`."""
        read = self._admission.admit(self.peer, passport)
        self._admitted_until_s = self._clock.monotonic_s() + self._admission.life_left_s(read) + PASSPORT_GRACE_S
        self.role = read.role
        self.computes = self._admission.computes(read)

    def _renew(self, shown: Credentials) -> None:
        try:
            self._admit(shown.passport)
        except PassportRefused as error:
            self._refuse(error)

    def _still_admitted(self, now_s: float) -> bool:
        """Close the link unless the peer is still welcome; and show our own passport anew when it is another."""
        if self._admission.revoked(self.peer):
            self._refuse(PassportRefused(f"{self.peer[:8]} was revoked"))
        elif now_s >= self._admitted_until_s:
            self._refuse(PassportRefused(f"the passport of {self.peer[:8]} ran out, and it showed no newer one"))
        elif (ours := self._admission.passport) != self._shown and self.link.post(Frame(Credentials(passport=ours))):
            self._shown = ours
        return not self._refused

    def expel(self, why: str) -> None:
        """Close the link: the peer is not welcome any more."""
        self._refuse(PassportRefused(why))

    def _refuse(self, error: FallowError) -> None:
        """Close the link and say why; nothing that comes on it is believed from now on."""
        if self._refused:
            return
        self._refused = True
        self.version = 0
        log.warning("closing a link with %s: %s", self.peer[:8], error)
        if not self.greeted.done():
            # Who dials is told what it can expect of links: that this one is closed, and why.
            fabric = isinstance(error, FabricError)
            self.greeted.set_exception(error if fabric else LinkClosed(f"{error.code}: {error.message}"))
        closing = asyncio.get_running_loop().create_task(self.link.close(error.code, error.message))
        _closing.add(closing)
        closing.add_done_callback(_closing.discard)

    # --- pings ---

    def _ping(self) -> int:
        """Send a ping, unless the window is full: then there is enough to answer already."""
        self._nonce += 1
        self._pinged_s = self._clock.monotonic_s()
        self.link.post(Frame(Ping(nonce=self._nonce)))
        self._pings[self._nonce] = self._pinged_s
        if len(self._pings) > MAX_OPEN_PINGS:
            del self._pings[next(iter(self._pings))]
        return self._nonce

    def _pong(self, nonce: int) -> None:
        sent_s = self._pings.pop(nonce, None)
        if sent_s is not None:
            sample_s = self._clock.monotonic_s() - sent_s
            self.rtt_s = sample_s if self.rtt_s is None else self.rtt_s + RTT_SMOOTHING * (sample_s - self.rtt_s)
        waiter = self._pongs.get(nonce)
        if waiter is not None and not waiter.done():
            waiter.set_result(True)

    # --- the end ---

    def _end(self, error: FabricError) -> None:
        if not self.greeted.done():
            self.greeted.set_exception(error if isinstance(error, LinkClosed) else LinkClosed(error.message))
        for waiter in self._pongs.values():
            if not waiter.done():
                waiter.set_result(False)
        if not self.ended.done():
            self.ended.set_result(error.message)
        self._on_ended(self, error.message)


_closing: set[asyncio.Task[None]] = set()
"""Links that are being refused; kept so that their tasks are not collected half-way."""
