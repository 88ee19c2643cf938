"""What a stage sent on, kept so that a successor that dies can be rebuilt from it.

Rules: entries are consecutive; the log may lose its oldest end to a budget but never has a hole; a rewind cuts its
newest end. It holds activations of one session in memory only, and dies with it. It knows nothing of links or engines.
"""

from collections import deque
from collections.abc import Iterator

import msgspec

from fallow.domain.frames import Phase

Buffer = bytes | bytearray | memoryview

REPLAY_ROWS_PER_FRAME = 64
"""So that the stages that are rebuilt work side by side, not one after the other."""


class LoggedRows(msgspec.Struct, frozen=True):
    """Consecutive output rows of a stage; `payload` is `[count, row_bytes]`."""

    position: int
    count: int
    phase: Phase
    logits_from: int
    top_k: int | None
    payload: Buffer

    @property
    def end(self) -> int:
        return self.position + self.count

    def above(self, position: int) -> "LoggedRows":
        """Without the rows below `position`."""
        skipped = max(0, position - self.position)
        return self._slice(skipped, self.count)

    def below(self, position: int) -> "LoggedRows":
        """Without the rows at and above `position`."""
        return self._slice(0, min(self.count, position - self.position))

    def _slice(self, first: int, last: int) -> "LoggedRows":
        if first == 0 and last == self.count:
            return self
        row_bytes = len(self.payload) // self.count
        return LoggedRows(
            self.position + first,
            last - first,
            self.phase,
            self.logits_from,
            self.top_k,
            memoryview(self.payload)[first * row_bytes : last * row_bytes],
        )


class ActivationLog:
    """One session's log on one stage."""

    def __init__(self) -> None:
        self._entries: deque[LoggedRows] = deque()
        self._end = 0
        self.size_bytes = 0

    @property
    def start(self) -> int:
        """First position still held; equals `end` when empty."""
        return self._entries[0].position if self._entries else self._end

    @property
    def end(self) -> int:
        return self._end

    def append(self, rows: LoggedRows) -> None:
        """Add the next rows. They must start where the log ends."""
        if rows.position != self._end:
            raise ValueError(f"rows at {rows.position} do not continue a log that ends at {self._end}")
        self._entries.append(rows)
        self._end = rows.end
        self.size_bytes += len(rows.payload)

    def rewind(self, position: int) -> None:
        """Forget rows at and above `position`."""
        while self._entries and self._entries[-1].end > position:
            last = self._entries.pop()
            self.size_bytes -= len(last.payload)
            if last.position < position:
                kept = last.below(position)
                self._entries.append(kept)
                self.size_bytes += len(kept.payload)
        self._end = min(self._end, position)

    def drop_oldest(self) -> int:
        """Give up the oldest entry to the budget; returns the bytes freed, 0 when there is nothing to give."""
        if not self._entries:
            return 0
        freed = len(self._entries.popleft().payload)
        self.size_bytes -= freed
        return freed

    def replay(self, position: int) -> Iterator[LoggedRows]:
        """Rows from `position` on, joined into frames of one phase and at most `REPLAY_ROWS_PER_FRAME` rows.

        A decoded token is an entry of one row; sending them one by one would cost a frame and an engine call each.
        """
        joined: list[LoggedRows] = []
        joined_count = 0
        for entry in self._entries:
            if entry.end <= position:
                continue
            rows = entry.above(position)
            full = joined_count + rows.count > REPLAY_ROWS_PER_FRAME
            if joined and (full or joined[0].phase is not rows.phase):
                yield _join(joined)
                joined, joined_count = [], 0
            joined.append(rows)
            joined_count += rows.count
        if joined:
            yield _join(joined)


def _join(parts: list[LoggedRows]) -> LoggedRows:
    if len(parts) == 1:
        return parts[0]
    return LoggedRows(
        parts[0].position,
        sum(part.count for part in parts),
        parts[0].phase,
        max(part.logits_from for part in parts),
        parts[-1].top_k,
        b"".join(bytes(part.payload) for part in parts),
    )
