"""What each publisher has left of what they may publish, kept beside the repository, so that it outlives a restart.

Rules
- Counted is what comes from afar and would be put in force: whoever holds the folder needs no leave, a document that
  does not hold is no publisher's doing, and one that says what is in force already changes nothing.
- The council's next word fills every allowance: it may have taken a publisher's key from a thief.
- How much is left is `policy/publishing.py`'s to say. Not safe by itself: the repository's lock is held.
"""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from fallow.domain.errors import CharterUnavailable, PublishedTooOften
from fallow.policy.publishing import Allowance, Wait, after_publishing
from fallow.private_file import write_durably

_Book = dict[str, Allowance]
"""By role."""


class PublishingBook:
    """The allowances in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def count(self, roles: Iterable[str], now_unix_s: float) -> None:
        """One publication of each of these roles. Raises `PublishedTooOften`, and then counts none."""
        book = self._read()
        for role in roles:
            after = after_publishing(book.get(role), now_unix_s)
            if isinstance(after, Wait):
                minutes = max(1, round(after.retry_after_s / 60 + 0.5))
                raise PublishedTooOften(
                    f"{role} was published too often: again in {minutes} minutes. If that was not you, its key is "
                    "stolen: the council removes or replaces it with `fallow council propose`."
                )
            book[role] = after
        write_durably(self._file, msgspec.json.encode(book))

    def forget(self) -> None:
        """Fill every allowance. Idempotent."""
        self._file.unlink(missing_ok=True)

    def _read(self) -> _Book:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=_Book)
        except FileNotFoundError:
            return {}
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CharterUnavailable(
                f"{self._file} was damaged ({error}), so that nobody knows who published how often: delete it"
            ) from None
