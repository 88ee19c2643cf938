"""What one API key may use now: requests a minute, tokens a minute, requests at once.

Rules
- Token buckets that hold one minute's allowance and refill evenly. A new key starts with a full bucket.
- A request is admitted when a whole request is in its bucket, the token bucket is above zero and a place is free.
  What it really used is charged afterwards, so the token bucket may fall below zero by one request's tokens for each
  place; until it is above zero again the key waits. Nothing has to guess how long an answer will be.
- A limit of `None` does not limit.

Pure: the time is an argument, and every function returns a new value. It keeps no list of keys.
"""

from enum import StrEnum

import msgspec

WINDOW_S = 60.0


class KeyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a key may use. Counts are at least 1."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None


class KeyUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What a key has left: the two buckets as they were at `updated_s`, and the requests that run."""

    requests_left: float
    tokens_left: float
    updated_s: float
    running: int = 0


class Limit(StrEnum):
    """Which limit refused."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    CONCURRENCY = "concurrency"


class Admitted(msgspec.Struct, frozen=True):
    """The request may run; call `released` when it has ended."""

    usage: KeyUsage


class Refused(msgspec.Struct, frozen=True):
    """The request may not run before `retry_after_s` seconds have passed."""

    usage: KeyUsage
    limit: Limit
    retry_after_s: float


def fresh_usage(limits: KeyLimits, now_s: float) -> KeyUsage:
    """The state of a key that was not used for a minute."""
    return KeyUsage(
        requests_left=float(limits.requests_per_minute or 0),
        tokens_left=float(limits.tokens_per_minute or 0),
        updated_s=now_s,
    )


def admit(usage: KeyUsage, limits: KeyLimits, now_s: float) -> Admitted | Refused:
    """Take one request and one place, or say which limit stands in the way and for how long."""
    usage = _refilled(usage, limits, now_s)
    if limits.concurrent_requests is not None and usage.running >= limits.concurrent_requests:
        return Refused(usage, Limit.CONCURRENCY, 1.0)
    if limits.requests_per_minute is not None and usage.requests_left < 1.0:
        return Refused(usage, Limit.REQUESTS, (1.0 - usage.requests_left) * WINDOW_S / limits.requests_per_minute)
    if limits.tokens_per_minute is not None and usage.tokens_left <= 0.0:
        return Refused(usage, Limit.TOKENS, (1.0 - usage.tokens_left) * WINDOW_S / limits.tokens_per_minute)
    return Admitted(msgspec.structs.replace(usage, requests_left=usage.requests_left - 1.0, running=usage.running + 1))


def released(usage: KeyUsage, limits: KeyLimits, tokens: int, now_s: float) -> KeyUsage:
    """An admitted request has ended and used `tokens`, prompt and completion together."""
    usage = _refilled(usage, limits, now_s)
    return msgspec.structs.replace(usage, tokens_left=usage.tokens_left - tokens, running=max(0, usage.running - 1))


def _refilled(usage: KeyUsage, limits: KeyLimits, now_s: float) -> KeyUsage:
    elapsed_s = max(0.0, now_s - usage.updated_s)
    return msgspec.structs.replace(
        usage,
        requests_left=_level(usage.requests_left, limits.requests_per_minute, elapsed_s),
        tokens_left=_level(usage.tokens_left, limits.tokens_per_minute, elapsed_s),
        updated_s=max(now_s, usage.updated_s),
    )


def _level(left: float, per_minute: int | None, elapsed_s: float) -> float:
    capacity = float(per_minute or 0)
    return min(capacity, left + capacity * elapsed_s / WINDOW_S)
