"""The journal: what was decided about whom, in an append-only chain of hashes.

Rules
- An entry's hash is SHA-256 over the JSON array `[seq, unix_ms, kind, who, body, previous]`, UTF-8, no spaces, where
  `body` is the entry's text as it is stored and `previous` the hash of the entry before it (64 zeros for the first).
- Found by `verify`: an entry that was changed, removed from the middle, put in, or moved. *Not* found by the chain
  alone: a journal that was cut at its end, or written anew from some entry on by whoever holds the database. Both are
  found against a head that was noted elsewhere. The registrar hands the current head to every member at each renewal,
  and they keep the oldest, one a week and the newest few (`journal-head`): to rewrite history unseen takes all of these
  as well.
- Bodies hold no secret and no prompt.

The chain and its checking; `journal_db.py` keeps it.
"""

import hashlib
import re
from collections.abc import Iterable
from enum import StrEnum
from typing import Final

import msgspec

from fallow.domain.errors import JournalBroken

FIRST_PREVIOUS: Final = "0" * 64


class Kind(StrEnum):
    """What an entry records."""

    NETWORK_FOUNDED = "network_founded"
    INVITATION_MADE = "invitation_made"
    INVITATION_WITHDRAWN = "invitation_withdrawn"
    INVITATION_USED = "invitation_used"
    INVITATION_REFUSED = "invitation_refused"
    CONSENT_GIVEN = "consent_given"
    ENROLLED = "enrolled"
    ROLE_GRANTED = "role_granted"
    CELL_CHANGED = "cell_changed"
    RENEWAL_REFUSED = "renewal_refused"
    REVOKED = "revoked"
    LEFT = "left"
    RETIRED = "retired"
    REQUEST_REFUSED = "request_refused"
    JOURNAL_READ = "journal_read"
    HALTED = "halted"
    POLICY_PUBLISHED = "policy_published"
    """A policy of a higher epoch, which also ends a halt."""
    MODEL_PUBLISHED = "model_published"
    COUNCIL_PUBLISHED = "council_published"
    """Any other change of the council's repository: a root, a delegation."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One record."""

    seq: int
    """From 1, without gaps."""
    unix_ms: int
    kind: str
    who: str
    """Whose doing it was: a NodeId, or `machine` for somebody with the registrar's files in hand."""
    body: str
    """JSON, as it was written."""
    previous: str
    hash: str


class Head(msgspec.Struct, frozen=True):
    """The newest entry that somebody saw."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"


EMPTY: Final = Head(0, FIRST_PREVIOUS)


def parse_head(text: str) -> Head:
    """A head from `seq:hash`. Raises `JournalBroken` when it is none."""
    seq, _, digest = text.strip().partition(":")
    if re.fullmatch(r"[0-9]{1,18}", seq) is None or re.fullmatch(r"[0-9a-f]{64}", digest) is None:
        raise JournalBroken(f"Expected a journal's head such as 42:9f86d0…, got {text[:80]!r}.")
    return Head(int(seq), digest)


def entry_hash(seq: int, unix_ms: int, kind: str, who: str, body: str, previous: str) -> str:
    """The hash of an entry, as the rules above say."""
    return hashlib.sha256(msgspec.json.encode([seq, unix_ms, kind, who, body, previous])).hexdigest()


def verify(entries: Iterable[Entry], noted: tuple[Head, ...] = ()) -> Head:
    """Check a whole journal from its first entry, and that it goes on from every head that was noted earlier.

    Returns its head. Raises `JournalBroken` with the first thing that is wrong.
    """
    expected = {head.seq: head.hash for head in noted if head.seq}
    for head in noted:
        if head.seq and expected[head.seq] != head.hash:
            raise JournalBroken(f"Two noted heads at entry {head.seq} contradict each other: the journal was forked.")
    last = EMPTY
    for entry in entries:
        if entry.seq != last.seq + 1:
            raise JournalBroken(f"Entry {last.seq + 1} is missing: after {last.seq} comes {entry.seq}.")
        if entry.previous != last.hash:
            raise JournalBroken(f"Entry {entry.seq} does not follow the entry before it: one of both was changed.")
        digest = entry_hash(entry.seq, entry.unix_ms, entry.kind, entry.who, entry.body, entry.previous)
        if entry.hash != digest:
            raise JournalBroken(f"Entry {entry.seq} ({entry.kind}) was changed: its content does not give its hash.")
        last = Head(entry.seq, entry.hash)
        if expected.pop(last.seq, last.hash) != last.hash:
            raise JournalBroken(f"Entry {last.seq} is not the one that was noted: the journal was written anew.")
    if expected:
        raise JournalBroken(
            f"The journal ends at entry {last.seq}, but entry {max(expected)} was noted earlier: it was cut."
        )
    return last
