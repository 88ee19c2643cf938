"""What the stages of a chain answer when they are opened, and how long a device that refuses is avoided.

Rules
- Only a stage that was asked is believed, and only in the epoch in which it was asked.
- Who says nothing in time refuses as well.
- How long a device is avoided follows from what it said: one that lives may serve again soon, and may be the only one.

It sends nothing and waits for nothing: `chain.py` does.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from fallow.domain.charter import Standing
from fallow.domain.errors import GrantRefused, KvExhausted, StageRefused
from fallow.domain.frames import LEAVING, Refused, StageState
from fallow.domain.ids import NodeId, SessionId

OPEN_TIMEOUT_S: Final = 3.0
"""How long a stage may take to answer `OpenStage`; it first finishes what it computes."""
AVOID_S: Final = 8.0
"""How long a session avoids a device that it lost; longer than the coordinator takes to notice, so that it is not
dialled again meanwhile."""
AVOID_ENGINE_S: Final = 1.0
"""The same for a device that lives and refuses, or whose worker died: it may be the only one, and serve again soon."""
AVOID_FULL_S: Final = 0.2
"""The same for a device that had no room: it may have some once a kept conversation has made way."""

SILENT: Final = "link_closed"
_REFUSES_LONG: Final = frozenset({SILENT, LEAVING, GrantRefused.code, *Standing})
"""Codes of refusals that last: nobody answers, the device leaves, its clock is wrong, or it may not work."""


class Refusal(msgspec.Struct, frozen=True):
    """A stage that is not open, and why."""

    node: NodeId
    code: str
    message: str

    @property
    def avoid_s(self) -> float:
        if self.code == KvExhausted.code:
            return AVOID_FULL_S
        return AVOID_S if self.code in _REFUSES_LONG else AVOID_ENGINE_S

    def error(self) -> KvExhausted | StageRefused:
        """What opening the chain raises for it."""
        if self.code == KvExhausted.code:
            return KvExhausted(self.message)
        return StageRefused(f"{self.node[:8]} refused: {self.message}", reason=self.code)


class Answers:
    """Of one chain's stages, in one epoch."""

    def __init__(self, epoch: int, stages: Sequence[tuple[NodeId, SessionId]]) -> None:
        self._epoch = epoch
        self._answers: dict[tuple[NodeId, SessionId], StageState | Refused | None] = dict.fromkeys(stages)

    def take(self, peer: NodeId, answer: StageState | Refused) -> bool:
        """Whether it was asked for."""
        asked = answer.epoch == self._epoch and (peer, answer.session) in self._answers
        if asked:
            self._answers[peer, answer.session] = answer
        return asked

    @property
    def complete(self) -> bool:
        return None not in self._answers.values()

    def opened(self) -> list[tuple[NodeId, StageState]]:
        """The stages that are open, in the chain's order."""
        return [(node, a) for (node, _), a in self._answers.items() if isinstance(a, StageState)]

    def refused(self) -> Refusal | None:
        """The first stage that said no."""
        for (node, _), answer in self._answers.items():
            if isinstance(answer, Refused):
                return Refusal(node, answer.code, answer.message)
        return None

    def silent(self) -> Refusal | None:
        """The first stage that said nothing."""
        for (node, _), answer in self._answers.items():
            if answer is None:
                return Refusal(node, SILENT, f"{node[:8]} did not answer in {OPEN_TIMEOUT_S} s.")
        return None


class GrantsRefused:
    """Devices of one chain that did not take a grant. Another grant may do; who takes none twice is to blame."""

    def __init__(self) -> None:
        self._once: set[NodeId] = set()

    def blame(self, node: NodeId) -> NodeId | None:
        """Whom to avoid, as a device refused a grant just now."""
        if node in self._once:
            return node
        self._once.add(node)
        return None

    def forget(self) -> None:
        """The chain gets on: a later refusal is about a later grant."""
        self._once.clear()
