"""What goes into the next frame to a chain's first stage. Values only."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from fallow.domain.frames import Phase, Rows
from fallow.domain.ids import SessionId
from fallow.gateway.marks import Marks

CHUNK_ROWS: Final = 64
"""Rows a frame: large enough for the kernels, small enough that the stages of a chain work on a prompt side by side."""
REBUILD_ROWS: Final = 32
"""The same for a cache that is rebuilt: each newcomer waits for the first rows of the one before. A row among 32 costs
the engine 1.07 of what it costs among 64. Among 16 it costs 1.24: 200 rows repay that from four newcomers on, and
1,000 rows from thirteen."""
WINDOW_ROWS: Final = 16 * CHUNK_ROWS


def rows_to_feed(
    session: SessionId, epoch: int, tokens: Sequence[int], phases: Sequence[Phase], marks: Marks, top_k: int | None
) -> tuple[Rows, bytes]:
    """The next rows that go together, and their payload. At least one token is not fed yet."""
    count = count_to_feed(phases, marks.fed, marks.rebuilt_to)
    rows = Rows(
        session=session, epoch=epoch, position=marks.fed, count=count, phase=phases[marks.fed],
        logits_from=len(tokens) - 1, top_k=top_k,
    )  # fmt: skip
    return rows, np.asarray(tokens[marks.fed : marks.fed + count], np.int32).tobytes()


def count_to_feed(phases: Sequence[Phase], fed: int, rebuilt_to: int) -> int:
    """Rows from `fed` on that go together: of one phase, and of those that are fed again or of those that are not.

    `rebuilt_to`: tokens below it were there when the chain was opened.
    """
    end = min(fed + REBUILD_ROWS, rebuilt_to) if fed < rebuilt_to else fed + CHUNK_ROWS
    count = 1
    while fed + count < min(end, len(phases)) and phases[fed + count] is phases[fed]:
        count += 1
    return count
