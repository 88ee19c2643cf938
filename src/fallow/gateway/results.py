"""A last stage's answer to a distribution: the payload of a `Result`, believed only when it fits and holds numbers."""

import numpy as np

from fallow.domain.frames import Result
from fallow.gateway.contract import Candidates


def last_candidates(header: Result, payload: bytes | bytearray | memoryview) -> Candidates | None:
    """The last row's distribution of a `Result`; `None` for a payload that does not fit it, or is not numbers."""
    if header.k is None:
        row_bytes, left_over = divmod(len(payload), header.logit_count)
        if left_over or row_bytes == 0 or row_bytes % 4:
            return None
        logprobs = np.frombuffer(payload, np.float32)[-row_bytes // 4 :]
        ids = np.arange(len(logprobs), dtype=np.int32)
    else:
        size = header.logit_count * header.k
        if len(payload) != 8 * size:
            return None
        ids = np.frombuffer(payload, np.int32, size)[-header.k :]
        logprobs = np.frombuffer(payload, np.float32, size, offset=4 * size)[-header.k :]
    if np.isnan(logprobs).any() or int(ids.min()) < 0:
        return None
    return Candidates(ids, logprobs, complete=header.k is None)
