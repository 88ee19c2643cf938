"""The running hash over everything that is delivered, in order: what makes two runs comparable.

Rules
- A step is one delivered message or one turn of the world's script. Its time, its ends and what it says about sessions
  go into the hash; what is drawn anew by each process (boot ids, link instances) does not.
- Steps are hashed in batches. `newest` keeps the last ones in words, for whoever hunts a difference or a violation.
"""

from collections import deque
from hashlib import blake2b
from typing import Final

BATCH: Final = 512
NEWEST_MAX: Final = 200


class Trace:
    """One run's steps."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=16)
        self._batch: list[str] = []
        self.steps = 0
        self.newest: deque[str] = deque(maxlen=NEWEST_MAX)

    def note(self, step: str) -> None:
        """Take a step, as a line of text."""
        self.steps += 1
        self._batch.append(step)
        if len(self._batch) >= BATCH:
            self._flush()

    def digest(self) -> str:
        """The hash of everything so far, in hex."""
        self._flush()
        return self._hash.hexdigest()

    def _flush(self) -> None:
        self._hash.update("\n".join(self._batch).encode())
        self.newest.extend(self._batch)
        self._batch.clear()
