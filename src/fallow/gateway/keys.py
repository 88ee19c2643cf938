"""API keys: who asks, and whether they may now.

Only SHA-256 digests of keys are kept; keys are drawn with 256 random bits, so a slow hash would protect nothing more.
Every digest is compared in constant time, all of them each time. No keys configured means open: the configuration
allows that on loopback only, and `api.py` then refuses requests that name another host. What a key may use is decided
by `policy/rate_limit.py`.
"""

import hashlib
import hmac
import secrets
from collections.abc import Iterable

import msgspec

from fallow.domain.clock import Clock
from fallow.domain.errors import ConfigError
from fallow.gateway.problems import invalid_key, rate_limited
from fallow.policy.rate_limit import KeyLimits, Limit, Refused, admit, fresh_usage, released

MAX_KEYS = 1000
MAX_KEY_CHARS = 512
OPEN_OWNER = "local"
"""Who asks when no keys are configured."""

_REASONS = {
    Limit.REQUESTS: "This key has used its requests for this minute",
    Limit.TOKENS: "This key has used its tokens for this minute",
    Limit.CONCURRENCY: "This key has as many requests running as it may",
}


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key as configured. `id` is a name for people; it scopes prefix reuse and never leaves the gateway."""

    id: str
    sha256: str
    limits: KeyLimits = KeyLimits()


class Lease:
    """An admitted request. `release` exactly once, with what it used."""

    def __init__(self, ring: "KeyRing", owner: str) -> None:
        self._ring = ring
        self.owner = owner

    def release(self, tokens: int) -> None:
        self._ring.release(self.owner, tokens)


class KeyRing:
    """The configured keys and what they have used. State is one small value a key, so it is bounded by `MAX_KEYS`."""

    def __init__(self, keys: Iterable[ApiKey], clock: Clock) -> None:
        """Raises `ConfigError` for keys that cannot be told apart or are not digests."""
        self._keys = tuple(keys)
        self._clock = clock
        if len(self._keys) > MAX_KEYS:
            raise ConfigError(f"There are {len(self._keys)} API keys; at most {MAX_KEYS} are supported.")
        if len({key.id for key in self._keys}) != len(self._keys):
            raise ConfigError("Two API keys have the same id; give each its own.")
        try:
            self._digests = tuple(bytes.fromhex(key.sha256) for key in self._keys)
        except ValueError as error:
            raise ConfigError("An API key's sha256 is not hexadecimal; make one with `fallow key create`.") from error
        if any(len(digest) != 32 for digest in self._digests):
            raise ConfigError("An API key's sha256 does not have 64 hex digits; make one with `fallow key create`.")
        self._limits = {key.id: key.limits for key in self._keys}
        now_s = clock.monotonic_s()
        self._usage = {key.id: fresh_usage(key.limits, now_s) for key in self._keys}

    @property
    def open(self) -> bool:
        """Whether anybody may ask, because no keys are configured."""
        return not self._keys

    def identify(self, authorization: str | None) -> str:
        """The owner behind an `Authorization` header. Raises a 401 `Problem`."""
        if self.open:
            return OPEN_OWNER
        scheme, _, secret = (authorization or "").partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not secret:
            raise invalid_key("No API key was given. Send it as 'Authorization: Bearer <key>'.")
        key = self._find(secret[: MAX_KEY_CHARS + 1])
        if key is None:
            raise invalid_key("The API key is not known here. Check it, or ask the operator for one.")
        return key.id

    def enter(self, owner: str) -> Lease:
        """Admit a request. Raises a 429 `Problem`."""
        limits = self._limits.get(owner)
        if limits is not None:
            decision = admit(self._usage[owner], limits, self._clock.monotonic_s())
            self._usage[owner] = decision.usage
            if isinstance(decision, Refused):
                message = f"{_REASONS[decision.limit]}. Try again in {decision.retry_after_s:.1f} s."
                kind = "tokens" if decision.limit is Limit.TOKENS else "requests"
                raise rate_limited(message, kind, decision.retry_after_s)
        return Lease(self, owner)

    def release(self, owner: str, tokens: int) -> None:
        limits = self._limits.get(owner)
        if limits is not None:
            self._usage[owner] = released(self._usage[owner], limits, tokens, self._clock.monotonic_s())

    def _find(self, secret: str) -> ApiKey | None:
        presented = _digest(secret)
        found = None
        for key, digest in zip(self._keys, self._digests, strict=True):
            if hmac.compare_digest(presented, digest):
                found = key
        return found


def new_key() -> tuple[str, str]:
    """A fresh secret and the SHA-256 to configure."""
    secret = f"fallow-{secrets.token_urlsafe(32)}"
    return secret, hash_key(secret)


def hash_key(secret: str) -> str:
    return _digest(secret).hex()


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
