"""How often a publisher may put a list in force without the council: a burst, then a few an hour.

Every publication is an entry in a journal that only grows, and has every device of the network look at once. Whoever
stole a publisher's key signs as many as they like, so that their number must be bounded where they arrive.

Rules
- An allowance holds `BURST` publications and gets one back every `EVERY_S`. A publisher who is new has a full one.
- A clock that went back gives nothing and takes nothing.

Pure: the time is an argument. Who publishes, and where allowances are kept, is `trust/council/publishing_book.py`'s.
"""

from typing import Final

import msgspec

BURST: Final = 32
"""For a publisher who signs all of their models on one afternoon."""
EVERY_S: Final = 900.0
"""Four an hour: under a hundred a day, of up to 16 KiB each in the journal, for as long as a stolen key counts."""


class Allowance(msgspec.Struct, frozen=True):
    """What a publisher has left, as it was at that time."""

    left: float
    updated_unix_s: float


class Wait(msgspec.Struct, frozen=True):
    """Nothing is left; again after so many seconds."""

    retry_after_s: float


def after_publishing(known: Allowance | None, now_unix_s: float) -> Allowance | Wait:
    """What is left after one publication more, or how long to wait for it."""
    if known is None:
        return Allowance(BURST - 1.0, now_unix_s)
    elapsed_s = max(0.0, now_unix_s - known.updated_unix_s)
    left = min(float(BURST), known.left + elapsed_s / EVERY_S)
    if left < 1.0:
        return Wait((1.0 - left) * EVERY_S)
    return Allowance(left - 1.0, now_unix_s)
