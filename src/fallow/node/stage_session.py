"""One session on a stage: its place, its flow, and the rows that wait for their turn.

Rules
- Rows of the present epoch wait in the order in which they came; rows of a newer one wait aside, where they hold up
  nobody. Once the gateway has named a predecessor, only its rows are taken; before that, rows of anybody wait, because
  the predecessor may have heard of the new flow first. The first stage of a chain that runs ahead takes the last one's,
  too (`running_ahead.py`).
- What waits is bounded: in rows and bytes for each session, in bytes for all sessions of a gateway, and in all.
- A session is *used* when it is opened and when it has computed. `expiry` says when one that rests is to go.

Values and bookkeeping; no task, no clock, no link.
"""

import asyncio
import secrets
from collections import Counter, deque
from enum import StrEnum
from typing import Final

from fallow.domain.frames import AHEAD_ROWS, Flow, OpenStage, Rows
from fallow.domain.ids import NodeId, SessionId
from fallow.node.activation_log import ActivationLog, Buffer
from fallow.node.allowance import Allowance
from fallow.node.following import Following
from fallow.node.running_ahead import Told

HELD_ROWS_MAX: Final = 16_384
"""Rows that a session may have waiting, across frames."""
HELD_BYTES_MAX: Final = 64 << 20
"""Their bytes; as much as a predecessor's log holds, which it may send in one go."""
UNFLOWED_ROWS_MAX: Final = 4_096
UNFLOWED_BYTES_MAX: Final = 16 << 20
"""The same for rows that came before their flow: a predecessor is ahead of us by little more than a round trip."""
GATEWAY_BYTES_MAX: Final = 96 << 20
"""For all sessions of one gateway."""
ALL_BYTES_MAX: Final = 192 << 20
"""For all sessions of a device."""
ROW_BYTES_MAX: Final = 64 << 10
"""More than a row of any model that is served: 32,768 values of float16, 16,384 of float32."""

UNUSED_MAX_S: Final = 20.0
"""How long a session that has computed nothing may rest. Longer than a gateway waits for progress before it opens its
chain again, which counts as use."""
IDLE_MAX_S: Final = 330.0
"""How long any session may rest. Longer than a gateway keeps a finished conversation for a follow-up turn."""
ORPHAN_GRACE_S: Final = 20.0
"""How long a session outlives its gateway's link: a gateway that reconnects goes on."""


class Expiry(StrEnum):
    """Why a session goes by itself."""

    UNGRANTED = "its grant ran out and was not renewed"
    ORPHANED = "its gateway did not come back"
    UNUSED = "it was opened and not used"
    IDLE = "it was idle for too long"


class Held(StrEnum):
    """What became of rows that arrived."""

    WAITS = "waits"
    IGNORED = "ignored"
    """Not from the predecessor, or beyond what is held for a flow that was not announced yet."""
    TOO_MANY = "too many"
    """From the predecessor, which must not send so far ahead."""


class RowBudget:
    """Bytes of rows that wait at a device: in all, and by the gateway whose sessions they are for."""

    def __init__(self) -> None:
        self._all_bytes = 0
        self._by_gateway: Counter[NodeId] = Counter()

    def has_room(self, gateway: NodeId, size_bytes: int) -> bool:
        by_gateway = self._by_gateway.get(gateway, 0)
        return self._all_bytes + size_bytes <= ALL_BYTES_MAX and by_gateway + size_bytes <= GATEWAY_BYTES_MAX

    def take(self, gateway: NodeId, size_bytes: int) -> None:
        self._all_bytes += size_bytes
        self._by_gateway[gateway] += size_bytes

    def give(self, gateway: NodeId, size_bytes: int) -> None:
        self._all_bytes -= size_bytes
        self._by_gateway[gateway] -= size_bytes
        if not self._by_gateway[gateway]:
            del self._by_gateway[gateway]


class Waiting:
    """Rows that have arrived and wait for their turn or their epoch."""

    __slots__ = ("header", "payload", "sender")

    def __init__(self, sender: NodeId, header: Rows, payload: Buffer) -> None:
        self.sender = sender
        self.header = header
        self.payload = payload


class _Queue:
    """Rows in the order in which they came, counted."""

    def __init__(self, gateway: NodeId, budget: RowBudget) -> None:
        self._gateway = gateway
        self._budget = budget
        self._items: deque[Waiting] = deque()
        self._rows = 0
        self._bytes = 0

    def put(self, item: Waiting, rows_max: int, bytes_max: int) -> bool:
        """Whether there was room."""
        size_bytes = len(item.payload)
        if self._rows + item.header.count > rows_max or self._bytes + size_bytes > bytes_max:
            return False
        if not self._budget.has_room(self._gateway, size_bytes):
            return False
        self._budget.take(self._gateway, size_bytes)
        self._items.append(item)
        self._rows += item.header.count
        self._bytes += size_bytes
        return True

    def pop(self) -> Waiting | None:
        if not self._items:
            return None
        item = self._items.popleft()
        size_bytes = len(item.payload)
        self._budget.give(self._gateway, size_bytes)
        self._rows -= item.header.count
        self._bytes -= size_bytes
        return item


class Session:
    """One session on this stage. Only its pump task awaits; frame handlers leave notes and wake it."""

    def __init__(
        self, gateway: NodeId, opening: OpenStage, allowance: Allowance, budget: RowBudget, now_s: float
    ) -> None:
        self.gateway = gateway
        self.allowance = allowance
        """What its grant still allows."""
        self.id: SessionId = opening.session
        self.engine_id = SessionId(secrets.token_hex(16))
        """The engine's name for it. Its own, so that a session that is closed and opened again at once (another span)
        does not meet itself while it is still being freed."""
        self.model = opening.model
        self.span = opening.span
        self.reserved_tokens = 0
        self.epoch = opening.epoch
        self.position = 0
        self.opening: OpenStage | None = opening
        self.flow_pending: Flow | None = None
        self.flow: Flow | None = None
        self.flowed_epoch = 0
        self.log = ActivationLog()
        self.told: Told[Waiting] = Told()
        self._ran_ahead = False
        self.reaching = False
        """Whether a link with the first stage is being made."""
        self._words: deque[Waiting] = deque(maxlen=AHEAD_ROWS + 1)
        """What the last stage told this first one."""
        self.following: Following | None = None
        """What its engine was asked for before its row came."""
        self.follows = True
        """Whether its engine may be asked so: it came to the agent's tokens as yet."""
        self.admitted = False
        self.ended = False
        self.rests = False
        """Whether the pump has nothing to do."""
        self.used_at_s = now_s
        self.wake = asyncio.Event()
        self.orphaned_at_s: float | None = None
        self.pump: asyncio.Task[None] | None = None
        self._budget = budget
        self._present = _Queue(gateway, budget)
        self._early = _Queue(gateway, budget)

    def fence(self, epoch: int) -> None:
        """Move to a newer epoch: rows of older ones are void, and nothing flows until a `Flow` says how."""
        self.epoch = epoch
        self.flow = None
        self.flow_pending = None
        self._words.clear()
        self._drop_present()
        early, self._early = self._early, _Queue(self.gateway, self._budget)
        while (item := early.pop()) is not None:
            if item.header.epoch >= epoch:
                self._place(item)

    def starts(self, flow: Flow) -> None:
        """Rows flow this way from now on."""
        self.flow_pending = None
        self.flow = flow
        self.flowed_epoch = flow.epoch
        self.told = Told(self.position)
        self._ran_ahead = flow.ahead_from is not None

    def hold(self, item: Waiting) -> Held:
        """Keep rows that arrived until their turn. Those of older epochs are ignored."""
        header, flow = item.header, self.flow_pending or self.flow
        flows = flow is not None and header.epoch == self.epoch
        if header.epoch < self.epoch or (flows and not self._feeds(item.sender, flow)):
            return Held.IGNORED
        if self.runs_ahead(item):
            self._words.append(item)
            return Held.WAITS
        if len(item.payload) <= header.count * ROW_BYTES_MAX and self._place(item):
            return Held.WAITS
        return Held.TOO_MANY if flows else Held.IGNORED

    def take(self) -> Waiting | None:
        """The next rows of the present epoch, if they may flow."""
        if self.flow is None:
            return None
        due = self.told.due()
        if due is not None:
            return due
        while (item := self._present.pop()) is not None:
            if self._feeds(item.sender, self.flow):
                return item
        return self._words.popleft() if self._words else None

    @property
    def confirmed(self) -> int | None:
        """As in `StageState`."""
        return min(self.told.confirmed, self.position) if self._ran_ahead else None

    @property
    def allows_more(self) -> bool:
        """Whether the grant may allow another row."""
        return self.position < self.allowance.tokens_max and self.allowance.rows_left > 0

    def differs(self, item: Waiting) -> int | None:
        """For rows of the gateway that came to a first stage: the position of a token that is another than the last
        stage told, and that was computed."""
        header, flow = item.header, self.flow
        if flow is None or flow.ahead_from is None or header.epoch != self.epoch or item.sender != self.gateway:
            return None
        return self.told.confirm(header, item.payload)

    def runs_ahead(self, item: Waiting) -> bool:
        """Whether these rows are the last stage's word, before the gateway's."""
        told = self.flow is not None and self.flow.previous is None and item.sender != self.gateway
        return told and item.header.epoch == self.epoch

    def expiry(self, now_s: float) -> Expiry | None:
        """Why this session is to be ended now, if it is."""
        if now_s >= self.allowance.expires_s:
            return Expiry.UNGRANTED
        if self.orphaned_at_s is not None and now_s - self.orphaned_at_s >= ORPHAN_GRACE_S:
            return Expiry.ORPHANED
        if not self.rests:
            return None
        idle_s = now_s - self.used_at_s
        if self.position == 0 and idle_s >= UNUSED_MAX_S:
            return Expiry.UNUSED
        return Expiry.IDLE if idle_s >= IDLE_MAX_S else None

    def end(self) -> None:
        """Nothing is taken or held any more."""
        self.ended = True
        self._drop_present()
        while self._early.pop() is not None:
            pass

    def _place(self, item: Waiting) -> bool:
        if item.header.epoch > self.epoch:
            return self._early.put(item, UNFLOWED_ROWS_MAX, UNFLOWED_BYTES_MAX)
        if self.flow_pending is None and self.flow is None:
            return self._present.put(item, UNFLOWED_ROWS_MAX, UNFLOWED_BYTES_MAX)
        return self._present.put(item, HELD_ROWS_MAX, HELD_BYTES_MAX)

    def _drop_present(self) -> None:
        while self._present.pop() is not None:
            pass

    def _feeds(self, sender: NodeId, flow: Flow | None) -> bool:
        """Whether rows of this sender are taken."""
        if flow is None or flow.previous is None:
            return sender == self.gateway or (flow is not None and sender == flow.ahead_from)
        return sender == flow.previous
