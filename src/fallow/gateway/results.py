"""A last stage's answer to a distribution: the payload of a `Result`, believed only when it can be one.

Numbers that are no log-probabilities are what a damaged head or a damaged frame looks like: not finite, above zero,
more than everything together, not in order, of tokens that do not exist or that come twice.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fallow.domain.frames import Result
from fallow.gateway.contract import Candidates

Payload = bytes | bytearray | memoryview
ReadResult = Callable[[Result, Payload], Candidates | None]
"""`last_candidates` for one model."""
SUM_TOLERANCE = 1e-3
"""Float32 sums over a large vocabulary err by less than a hundredth of this."""


def last_candidates(header: Result, payload: Payload, vocab_size: int | None = None) -> Candidates | None:
    """The last row's distribution of a `Result`; `None` for a payload that does not fit it, or cannot be one."""
    if header.k is None:
        row_bytes, left_over = divmod(len(payload), header.logit_count)
        if left_over or row_bytes == 0 or row_bytes % 4:
            return None
        logprobs = np.frombuffer(payload, np.float32)[-row_bytes // 4 :]
        ids = np.arange(len(logprobs), dtype=np.int32)
        if vocab_size is not None and len(ids) != vocab_size:
            return None
    else:
        size = header.logit_count * header.k
        if len(payload) != 8 * size:
            return None
        ids = np.frombuffer(payload, np.int32, size)[-header.k :]
        logprobs = np.frombuffer(payload, np.float32, size, offset=4 * size)[-header.k :]
        if not _is_ranking(ids, logprobs, vocab_size):
            return None
    if not _is_distribution(logprobs, complete=header.k is None):
        return None
    return Candidates(ids, logprobs, complete=header.k is None)


def _is_ranking(ids: NDArray[Any], logprobs: NDArray[Any], vocab_size: int | None) -> bool:
    """Distinct tokens of the vocabulary, the likeliest first."""
    if int(ids.min()) < 0 or (vocab_size is not None and int(ids.max()) >= vocab_size):
        return False
    if len(ids) == 1:
        return True
    ordered = np.sort(ids)
    return bool((ordered[1:] != ordered[:-1]).all() and (logprobs[1:] <= logprobs[:-1]).all())


def _is_distribution(logprobs: NDArray[Any], *, complete: bool) -> bool:
    """Comparisons with NaN are false, so that what is not a number is refused."""
    if not (np.isfinite(logprobs).all() and float(logprobs.max()) <= SUM_TOLERANCE):
        return False
    total = float(np.exp(logprobs).sum())
    return total <= 1 + SUM_TOLERANCE and (not complete or total >= 1 - SUM_TOLERANCE)
