"""When a coordinator leads: takes, renews and gives up a lease. Pure; `coordinator/leadership.py` does the I/O.

Rules
- A lease is a value that is written by compare-and-set on its revision. Its holder renews it every `renew_s`. It acts
  only until `ttl_s - margin_s` after it *sent* the last write that succeeded, by its own clock, and only over the
  connection on which it sent it: once the connection broke, others may have been told that it is gone.
- Another takes the lease when it was given up; when its holder's connection broke; or when it has *seen* the same
  revision for `ttl_s`, by its own clock. That is later than its holder's end in any order of messages, because it was
  seen after it was sent; the margin is for clocks that run at different rates. Nobody's time of day counts, the bus's
  clock neither: a value that vanishes early is not free before that time.
- A coordinator that sees its own earlier write may follow it: it does not act on it any more.
- A term's epoch is the revision that began it, or more, where a higher one was heard of. Who is told of a higher epoch
  than its own has been replaced, or the bus has lost its store; it steps down either way, and its next epoch is higher.
- Who has never read the key takes it where nothing stands, so that a first start need not wait. Only a bus that drops
  a living holder's value (its store is lost, its clock jumps) while a new process starts can make two of that; and then
  epochs tell them apart.
- A process that was stopped between checking and acting is not caught here. Its orders carry its epoch, and devices
  refuse lower ones than they have heard of.

Holding by sightings on one's own clock is how Kubernetes elects leaders (client-go, `leaderelection`); epochs that the
receivers check are Kleppmann's fencing tokens ("How to do distributed locking", 2016).
"""

from typing import Final

import msgspec

EPOCH_MAX: Final = 1 << 62


class LeaseRules(msgspec.Struct, frozen=True, kw_only=True):
    """The times of a lease."""

    ttl_s: float = 3.0
    renew_s: float = 1.0
    margin_s: float = 0.5
    retry_s: float = 0.2
    """After an attempt that failed."""

    @property
    def acts_s(self) -> float:
        """How long a write that succeeded allows to act."""
        return self.ttl_s - self.margin_s


class Standing(msgspec.Struct, frozen=True):
    """What was read at the key."""

    revision: int
    holder: str | None
    """`None`: it was given up."""
    epoch: int = 0


class Sighting(msgspec.Struct, frozen=True):
    """What stands there as far as is known, and when it may be taken."""

    revision: int
    """0: nothing stands there."""
    holder: str | None
    free_at_s: float
    read_s: float


class Term(msgspec.Struct, frozen=True, kw_only=True):
    """A time of leading."""

    epoch: int
    revision: int
    """Of the last write."""
    renew_at_s: float
    acts_until_s: float
    connection: int


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One coordinator's view of the lease."""

    me: str
    """Unique to one run of one process."""
    floor: int = 0
    """The highest epoch that was heard of."""
    seen: Sighting | None = None
    unread: bool = True
    """Something may have happened since the last reading."""
    not_before_s: float = 0.0
    """No attempt before that time."""
    term: Term | None = None
    end: str = ""
    """Why the last term ended, for people."""


class Read(msgspec.Struct, frozen=True):
    """Read the key."""


class Write(msgspec.Struct, frozen=True):
    """Write the key, to take or to renew the lease."""

    after: int


class Wait(msgspec.Struct, frozen=True):
    """Nothing to do before a time, unless something is heard."""

    until_s: float


Step = Read | Write | Wait


def may_act(candidate: Candidate, now_s: float, connection: int | None) -> bool:
    """Whether this coordinator leads at this moment."""
    term = candidate.term
    return term is not None and now_s < term.acts_until_s and connection == term.connection


def next_step(candidate: Candidate, now_s: float, connection: int | None, rules: LeaseRules) -> Step:
    """What to do now."""
    term, seen = candidate.term, candidate.seen
    if connection is None:
        return Wait(now_s + rules.retry_s)
    if now_s < candidate.not_before_s:
        return Wait(candidate.not_before_s)
    if seen is None or candidate.unread:
        return Read()
    if term is not None:
        if connection != term.connection or now_s >= term.renew_at_s:
            return Write(term.revision)
        return Wait(term.renew_at_s)
    if now_s >= seen.free_at_s:
        return Write(seen.revision)
    if now_s >= seen.read_s + rules.renew_s:
        return Read()
    return Wait(min(seen.free_at_s, seen.read_s + rules.renew_s))


def lapsed(candidate: Candidate, now_s: float) -> Candidate:
    """The candidate after time has passed: a term that was not renewed in time has ended."""
    term = candidate.term
    if term is None or now_s < term.acts_until_s:
        return candidate
    return _ended(candidate, f"the lease was not renewed for {now_s - term.acts_until_s:.1f} s longer than it may")


def after_read(candidate: Candidate, standing: Standing | None, now_s: float, rules: LeaseRules) -> Candidate:
    """The candidate after it read the key; `now_s` is when the answer was there."""
    if standing is not None:
        heard = max(candidate.floor, standing.revision, standing.epoch)
        candidate = msgspec.structs.replace(candidate, floor=min(heard, EPOCH_MAX))
    term = candidate.term
    if term is not None:
        if standing is not None and standing.holder == candidate.me:
            # An attempt whose answer was lost had succeeded.
            term = msgspec.structs.replace(term, revision=standing.revision)
            seen = Sighting(standing.revision, candidate.me, now_s, now_s)
            return msgspec.structs.replace(candidate, term=term, seen=seen, unread=False)
        reason = "the lease vanished from the bus" if standing is None else "another coordinator took over"
        candidate = _ended(candidate, reason)
    seen = _sighting(candidate, standing, now_s, rules)
    return msgspec.structs.replace(candidate, seen=seen, unread=False)


def _sighting(candidate: Candidate, standing: Standing | None, now_s: float, rules: LeaseRules) -> Sighting:
    before = candidate.seen
    if standing is None:
        # It may have vanished early: who held it last acts until its own clock says so.
        holder = before.holder if before is not None else None
        free_at_s = before.free_at_s if before is not None and holder != candidate.me else now_s
        revision = 0
    else:
        holder, revision = standing.holder, standing.revision
        free_at_s = now_s + rules.ttl_s
        if before is not None and before.revision == revision:
            free_at_s = min(before.free_at_s, free_at_s)
        if holder in (None, candidate.me):
            free_at_s = now_s
    return Sighting(revision, holder, free_at_s, now_s)


def after_write(
    candidate: Candidate, revision: int | None, sent_s: float, now_s: float, connection: int, rules: LeaseRules
) -> Candidate:
    """The candidate after a write that was sent at `sent_s` over `connection`; no revision: another's came first."""
    if revision is None:
        return msgspec.structs.replace(candidate, unread=True)
    term = candidate.term
    floor = min(max(candidate.floor, revision), EPOCH_MAX)
    if term is None:
        epoch = min(max(revision, candidate.floor + 1), EPOCH_MAX)
        # An epoch above its revision must be written there, for those who come after.
        renew_at_s = sent_s + rules.renew_s if epoch == revision else now_s
    else:
        epoch, renew_at_s = term.epoch, sent_s + rules.renew_s
    term = Term(
        epoch=epoch,
        revision=revision,
        renew_at_s=renew_at_s,
        acts_until_s=sent_s + rules.acts_s,
        connection=connection,
    )
    seen = Sighting(revision, candidate.me, now_s, now_s)
    return msgspec.structs.replace(candidate, term=term, floor=max(floor, epoch), seen=seen, unread=False)


def after_failure(candidate: Candidate, now_s: float, rules: LeaseRules) -> Candidate:
    """The candidate after a read or write that got no answer: it may have been carried out."""
    return msgspec.structs.replace(candidate, unread=True, not_before_s=now_s + rules.retry_s)


def after_hint(candidate: Candidate) -> Candidate:
    """The candidate after somebody seems to have written. A leader learns of it by its next renewal."""
    return candidate if candidate.term is not None else msgspec.structs.replace(candidate, unread=True)


def after_disconnect(candidate: Candidate, holder: str, now_s: float) -> Candidate:
    """The candidate after the bus has told that a connection broke. What was seen of its holder before is free; what it
    may write over another connection is another revision, and a sign of life."""
    seen = candidate.seen
    if holder == candidate.me or seen is None or seen.holder != holder:
        return candidate
    freed = msgspec.structs.replace(seen, free_at_s=min(seen.free_at_s, now_s))
    return msgspec.structs.replace(candidate, seen=freed, not_before_s=0.0)


def after_refusal(candidate: Candidate, epoch: int) -> Candidate:
    """The candidate after it was told of an epoch: its term has ended if the epoch is higher than its own."""
    term = candidate.term
    candidate = msgspec.structs.replace(candidate, floor=min(max(candidate.floor, epoch), EPOCH_MAX))
    if term is None or epoch <= term.epoch:
        return candidate
    return _ended(candidate, f"epoch {epoch} was heard of, ours was {term.epoch}")


def _ended(candidate: Candidate, reason: str) -> Candidate:
    return msgspec.structs.replace(candidate, term=None, end=reason, unread=True)
