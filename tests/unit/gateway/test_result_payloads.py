"""What the last device of a chain may answer, and what is not believed."""

import numpy as np
import pytest

from fallow.domain.frames import Result
from fallow.domain.ids import SessionId
from fallow.gateway.results import last_candidates


def result(logit_count: int, k: int | None) -> Result:
    return Result(session=SessionId("0" * 32), epoch=1, position=0, count=4, logit_count=logit_count, k=k)


def payload(ids: list[int], logprobs: list[float]) -> bytes:
    return np.asarray(ids, np.int32).tobytes() + np.asarray(logprobs, np.float32).tobytes()


def test_the_last_row_is_taken() -> None:
    candidates = last_candidates(result(2, 2), payload([1, 2, 3, 4], [-1, -2, -3, -4]), 5)
    assert candidates is not None
    assert (candidates.ids.tolist(), candidates.logprobs.tolist()) == ([3, 4], [-3.0, -4.0])
    whole = last_candidates(result(2, None), np.log([0.2, 0.3, 0.5, 0.5, 0.25, 0.25]).astype(np.float32).tobytes(), 3)
    assert whole is not None
    assert (whole.ids.tolist(), np.exp(whole.logprobs).round(3).tolist()) == ([0, 1, 2], [0.5, 0.25, 0.25])


@pytest.mark.parametrize(
    ("header", "content"),
    [
        (result(1, 2), payload([1], [-1.0])),
        (result(1, 1), payload([1], [-1.0]) + b"x"),
        (result(1, 1), b""),
        (result(1, 1), payload([-1], [-1.0])),
        (result(1, 1), payload([1], [float("nan")])),
        (result(1, None), b""),
        (result(2, None), b"\0" * 12),
        (result(1, None), b"\0" * 7),
        (result(1, None), np.asarray([0, float("nan")], np.float32).tobytes()),
        (result(1, 1), payload([1], [float("-inf")])),
        (result(1, 1), payload([1], [0.5])),
        (result(1, 1), payload([5], [-1.0])),
        (result(1, 2), payload([1, 2], [-2.0, -1.0])),
        (result(1, 2), payload([2, 2], [-1.0, -2.0])),
        (result(1, 3), payload([1, 2, 3], [-0.5, -0.6, -0.7])),
        (result(1, None), np.log(np.full(5, 0.1)).astype(np.float32).tobytes()),
        (result(1, None), np.log(np.full(4, 0.25)).astype(np.float32).tobytes()),
    ],
)
def test_what_does_not_fit_or_is_no_number_is_not_believed(header: Result, content: bytes) -> None:
    assert last_candidates(header, content, 5) is None
