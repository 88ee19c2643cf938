"""What the engine keeps of a session, and of each step and rewind on its way through it. Values that change; no rules.

The rules are in `core.py`, which alone changes them.
"""

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fallow.domain.errors import EngineError
from fallow.domain.ids import Digest, SessionId
from fallow.domain.model import Span
from fallow.engine.contract import Step, Stepped
from fallow.engine.drawing import drawn_token
from fallow.engine.head import log_probabilities, top_log_probabilities
from fallow.engine.hosted import HostedModel
from fallow.policy.batching import decode_groups

Array = NDArray[Any]


class Run:
    """A step on its way: rows done so far, and what has come out."""

    __slots__ = ("compute_s", "done", "drawn", "faulty", "hidden", "ids", "log_probabilities", "rows", "step", "ticket")

    def __init__(self, ticket: int, step: Step) -> None:
        self.ticket = ticket
        self.step = step
        self.rows: Array | None = None
        self.drawn: int | None = None
        """The token of its row, when it drew that."""
        self.done = 0
        self.compute_s = 0.0
        self.faulty = False
        self.hidden: list[bytes] = []
        self.ids: list[bytes] = []
        self.log_probabilities: list[bytes] = []

    def next_row(self) -> Array:
        assert self.rows is not None
        row: Array = self.rows[self.done]
        return row

    def add_logits(self, logits: NDArray[np.float32]) -> None:
        """Keep one row's log-probabilities. Raises `NumericFault`."""
        if self.step.top_k is None:
            self.log_probabilities.append(log_probabilities(logits).tobytes())
            return
        ids, values = top_log_probabilities(logits, min(self.step.top_k, len(logits)))
        self.ids.append(ids.tobytes())
        self.log_probabilities.append(values.tobytes())

    def result(self, vocab_size: int, has_head: bool) -> Stepped:
        if not has_head:
            return Stepped(payload=b"".join(self.hidden), logit_count=0, k=None, compute_s=self.compute_s)
        return Stepped(
            payload=b"".join(self.ids + self.log_probabilities),
            logit_count=len(self.log_probabilities),
            k=None if self.step.top_k is None else min(self.step.top_k, vocab_size),
            compute_s=self.compute_s,
            drawn=self.drawn,
        )


class Rewind:
    """A rewind that waits for the steps before it."""

    __slots__ = ("position", "ticket")

    def __init__(self, ticket: int, position: int) -> None:
        self.ticket = ticket
        self.position = position


class Session:
    """A session in the engine: its slot, its reservation, and the steps and rewinds that wait."""

    __slots__ = (
        "decode_call", "groups", "has_head", "hosted", "id", "last", "model", "queue", "reserved_tokens", "slot",
        "span", "takes_tokens",
    )  # fmt: skip

    def __init__(self, name: SessionId, model: Digest, hosted: HostedModel, span: Span, slot: int) -> None:
        self.id = name
        self.model = model
        self.hosted = hosted
        self.span = span
        self.slot = slot
        layer_count = hosted.config.layer_count
        self.takes_tokens = span.first == 0
        self.has_head = span.last == layer_count
        self.groups = decode_groups(span.layer_count / layer_count)
        self.reserved_tokens = 0
        self.decode_call = 0
        """The last decode call of the engine that it was part of."""
        self.queue: deque[Run | Rewind] = deque()
        self.last: Stepped | None = None
        """What its newest step led to."""

    def payload_of(self, run: Run) -> bytes | bytearray | memoryview:
        """A step's rows, drawn where they are to be, which the run then says. Raises `EngineError`."""
        drawn = run.step.drawn
        if drawn is None:
            return run.step.payload
        token = drawn_token(self.last, drawn) if self.takes_tokens and self.last is not None else None
        if token is None:
            raise EngineError(f"nothing follows the last step of session {self.id}")
        run.drawn = int.from_bytes(token, "little")
        return token

    @property
    def position(self) -> int:
        return int(self.hosted.lengths[self.slot])

    @position.setter
    def position(self, position: int) -> None:
        self.hosted.lengths[self.slot] = position
