"""How long a device may work on the council's last word. Pure: the shell brings both clocks and writes the ledger.

Rules
- A lease comes from one version of the repository's timestamp, and from no version twice: a version gives up to
  `lease_s` in all, over every restart of the process. Only a newer version gives more.
- What is used is paid for before: a slice at a time is taken out of the ledger, which must be on disk before the slice
  is used. A process that is killed and started again, as often as anybody likes, gains nothing by it.
- Within a run, a lease ends by the monotonic clock, at the latest `lease_s` after its version was first seen.
- The wall clock can only shorten it. Time is taken to be at least that of the newest timestamp (`floor_unix_s`), so a
  clock that was set back makes no old word fresh. How far a timestamp can move the floor ahead of the wall clock is
  bounded, so a stolen timestamp key cannot stop a device for longer than `LEASE_MAX_S`.
- After a start there is no lease until the repository was asked.

A ledger is one network's: in another, a device begins anew.
Versions are ordered by root first: after the council replaced a stolen online key, timestamps may count anew.
"""

import math
import re
from collections.abc import Collection
from typing import Final

import msgspec

from fallow.domain.charter import LEASE_MAX_S, Charter, Halt, Standing

SLICES: Final = 4
"""A lease is paid for in so many slices: a restart costs at most one."""

Version = tuple[int, int]
"""Of the root, and of the timestamp."""


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """What must outlive the process."""

    network: str = ""
    """Whose versions and times these are: the SHA-256 of its descriptor. Empty: as written before this was kept."""
    floor_unix_s: float = 0.0
    """It is not earlier than this."""
    version: Version = (0, 0)
    """The newest that was seen."""
    left_s: float = 0.0
    """Of its lease, what was not paid out yet."""


class Tenure(msgspec.Struct, frozen=True, kw_only=True):
    """A run of a process: the ledger, and what was paid out of it by the monotonic clock."""

    ledger: Ledger = Ledger()
    until_s: float | None = None
    """It may work until then; `None`: not since it was started."""
    end_s: float | None = None
    """No payment reaches beyond; `None`: the repository was not asked yet."""


def ledger_of(kept: Ledger, network: str) -> Ledger:
    """The ledger to begin with in a network: the one that was kept, unless it is another network's. That one's versions
    are no measure here; its own, kept while this device was in no network or came back, hold as before."""
    if kept.network not in {"", network}:
        return Ledger(network=network)
    return msgspec.structs.replace(kept, network=network)


def reference_unix_s(ledger: Ledger, wall_unix_s: float) -> float:
    """What time to take it to be."""
    return max(wall_unix_s, ledger.floor_unix_s)


def confirmed(
    tenure: Tenure, version: Version, expires_unix_s: float, lease_s: float, wall_unix_s: float, now_s: float
) -> Tenure:
    """After the repository was asked and gave a timestamp. Nothing is paid yet."""
    ledger = tenure.ledger
    fresh_s = max(0.0, expires_unix_s - reference_unix_s(ledger, wall_unix_s))
    if version > ledger.version:
        span_s = min(fresh_s, lease_s)
        told_unix_s = min(expires_unix_s - lease_s, wall_unix_s + LEASE_MAX_S)
        floor_unix_s = max(ledger.floor_unix_s, told_unix_s)
        ledger = msgspec.structs.replace(ledger, floor_unix_s=floor_unix_s, version=version, left_s=span_s)
        return Tenure(ledger=ledger, until_s=now_s, end_s=now_s + span_s)
    if version == ledger.version and tenure.end_s is None:
        left_s = min(ledger.left_s, fresh_s, lease_s)
        ledger = msgspec.structs.replace(ledger, left_s=left_s)
        return Tenure(ledger=ledger, until_s=now_s, end_s=now_s + left_s)
    return tenure


def paid(tenure: Tenure, slice_s: float, now_s: float) -> Tenure:
    """With one more slice to work in. To be written to disk before it is used."""
    if tenure.until_s is None or tenure.end_s is None:
        return tenure
    since_s = max(tenure.until_s, now_s)
    amount_s = max(0.0, min(slice_s, tenure.ledger.left_s, tenure.end_s - since_s))
    ledger = msgspec.structs.replace(tenure.ledger, left_s=tenure.ledger.left_s - amount_s)
    return Tenure(ledger=ledger, until_s=since_s + amount_s, end_s=tenure.end_s)


def payment_due(tenure: Tenure, slice_s: float, now_s: float) -> bool:
    """Whether half a slice or less is left to work in, and there is something to pay from."""
    if tenure.until_s is None or tenure.end_s is None or tenure.ledger.left_s <= 0:
        return False
    return tenure.until_s - now_s <= slice_s / 2 and now_s < tenure.end_s


def next_look_s(tenure: Tenure, slice_s: float, now_s: float) -> float:
    """In how long a payment is due, or else the end."""
    if tenure.until_s is None or tenure.until_s <= now_s:
        return math.inf
    due_s = tenure.until_s - slice_s / 2
    return due_s - now_s if due_s > now_s and tenure.ledger.left_s > 0 else tenure.until_s - now_s


def live(tenure: Tenure, now_s: float) -> bool:
    """Whether work may go on at this moment."""
    return tenure.until_s is not None and now_s < tenure.until_s


# --- standing -------------------------------------------------------------------------------------


def barred(
    charter: Charter | None, halts: Collection[Halt], release: str, revoked: bool
) -> tuple[Standing, str] | None:
    """Why a device may not work whatever lease it has, in words for a person; `None` when nothing bars it."""
    if revoked:
        return Standing.REVOKED, "This key was revoked: the network does not know this device any more."
    if halts:
        why = min(halts, key=lambda halt: halt.issued_unix_s).why
        return Standing.HALTED, f"A member of the council has halted the network: {why}"
    if charter is not None and release_order(release) < release_order(charter.policy.version_min):
        least = charter.policy.version_min
        return Standing.TOO_OLD, f"This is Fallow {release}, and the council asks for {least} or newer: update it."
    return None


def release_order(release: str) -> tuple[int, ...]:
    """Releases in order: `0.10.1` after `0.9`. What cannot be read comes before everything."""
    numbers = [int(match.group()) if (match := re.match(r"\d{1,9}", part)) else 0 for part in release.split(".")[:4]]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
