"""When is a silent peer lost? Pure: the shell brings times and asks.

Rules
- A peer is lost once nothing came from it for `silence_s`. It is told to speak by our own pings, which go out whenever
  we sent nothing for `ping_interval_s`; as both sides do so, a live peer is never silent for longer than that, even
  when it has nothing to say.
- Silence counts only while we were listening. When our own loop was paused (the process was stopped, the machine
  slept, others took the processor), a peer gets one fresh period; while pauses go on without a sign of life, their
  length is left out, so that a dead peer is still noticed under permanent load.
"""

from enum import Enum

import msgspec


class Liveness(msgspec.Struct, frozen=True, kw_only=True):
    """The periods. `silence_s` must leave room for several pings; noticing takes at most `silence_s + 2 * tick_s`."""

    ping_interval_s: float = 0.5
    silence_s: float = 1.5
    tick_s: float = 0.125
    """How often the shell looks."""
    stall_s: float = 0.5
    """A look that comes later than this means that our own loop was paused. Less is ordinary load, and `silence_s` has
    room for it."""
    rtt_interval_s: float = 5.0
    """A ping is due at this interval even when there is traffic, to measure the round trip."""


class Pulse(msgspec.Struct, frozen=True):
    """What is known of one peer's life."""

    heard_s: float
    """When something last came, moved forward by the pauses since."""
    excused: bool = False
    """Whether a fresh period was given since something last came."""


class Verdict(Enum):
    """What the silence of a peer means."""

    ALIVE = "alive"
    LOST = "lost"


def heard(now_s: float) -> Pulse:
    """Something came from the peer."""
    return Pulse(now_s)


def pause_s(previous_tick_s: float, now_s: float, liveness: Liveness) -> float:
    """How long our own loop was paused between two looks: 0 for ordinary lateness."""
    late_s = now_s - previous_tick_s - liveness.tick_s
    return late_s if late_s > liveness.stall_s else 0.0


def excuse(pulse: Pulse, paused_s: float, now_s: float) -> Pulse:
    """The pulse after a pause of ours: a fresh period the first time, the pause left out from then on."""
    if paused_s <= 0:
        return pulse
    if not pulse.excused:
        return Pulse(now_s, excused=True)
    return Pulse(min(now_s, pulse.heard_s + paused_s), excused=True)


def judge(pulse: Pulse, now_s: float, liveness: Liveness) -> Verdict:
    """Whether the peer is still believed to be there."""
    return Verdict.LOST if now_s - pulse.heard_s >= liveness.silence_s else Verdict.ALIVE


def ping_due(sent_s: float, measured_s: float, now_s: float, liveness: Liveness) -> bool:
    """Whether to ping: we have been silent for too long ourselves, or the round trip is stale."""
    return now_s - sent_s >= liveness.ping_interval_s or now_s - measured_s >= liveness.rtt_interval_s
