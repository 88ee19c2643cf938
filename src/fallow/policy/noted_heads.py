"""Which heads of the registrar's journal a member keeps, as evidence against a journal that is rewritten later.

Rules
- The oldest, one a week, and the newest few: whoever writes the journal anew from some entry on contradicts one of
  them, however often the registrar is asked afterwards. Their number is bounded.
- A head that is lower than one that was noted, or contradicts it, does not become one of them and drives none out: what
  is there proves already that the journal was cut or written anew.
- Weeks are counted by the member's own clock, in either direction: it is nobody else's to move, and may be set.

Pure: times are arguments.
"""

from typing import Final

import msgspec

RECENT_MAX: Final = 4
WEEKS_MAX: Final = 52
WEEK_S: Final = 7 * 24 * 3600.0
NOTED_MAX: Final = 1 + WEEKS_MAX + RECENT_MAX


class NotedHead(msgspec.Struct, frozen=True):
    """A head, as the registrar told it."""

    seq: int
    hash: str
    noted_unix_s: float
    """By the member's own clock; 0: not written down."""


def goes_on(kept: tuple[NotedHead, ...], seq: int, digest: str) -> bool:
    """Whether a journal with that head can be the one whose heads were noted, as far as they tell."""
    newest = max(kept, key=lambda head: head.seq, default=None)
    return newest is None or seq > newest.seq or (seq, digest) == (newest.seq, newest.hash)


def with_head(kept: tuple[NotedHead, ...], head: NotedHead) -> tuple[NotedHead, ...]:
    """What to keep after a head that `goes_on`, in the order in which they were noted."""
    if not kept or head.seq == kept[-1].seq:
        return kept or (head,)
    rest = (*kept[1:], head)
    weekly, last = [], kept[0]
    for each in rest[:-RECENT_MAX]:
        if abs(each.noted_unix_s - last.noted_unix_s) >= WEEK_S:
            weekly.append(each)
            last = each
    return (kept[0], *weekly[-WEEKS_MAX:], *rest[-RECENT_MAX:])
