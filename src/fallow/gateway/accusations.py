"""Whose numbers were refused: kept until the next request for a chain takes it to the coordinator.

Rules
- A report names everybody else who could have brought the refusal about: the device that refused, and those of the
  chain before the accused. Who judges it (`policy/quarantine.py`) can then tell one liar from two witnesses.
- A device sees rows of those before it in the chain: what it says of them counts, and of itself, and of nobody else.
- At most `WAITING_MAX` reports wait, and `WAITING_OF_ONE_MAX` of one that refused; of more, the newest are not kept.
  One that could not be delivered waits on.
"""

from collections.abc import Sequence
from typing import Final

from fallow.domain.fleet import Accusation
from fallow.domain.ids import NodeId

WAITING_MAX: Final = 8
WAITING_OF_ONE_MAX: Final = 2


class Accusations:
    """Of one gateway, over all its sessions."""

    def __init__(self) -> None:
        self._waiting: dict[Accusation, None] = {}

    def note(self, chain: Sequence[NodeId], accused: NodeId, refused_by: NodeId | None) -> None:
        """`chain`: the session's devices in order. `refused_by`: a device of it; `None`: this gateway itself. A device
        that is not of the chain, or only after the one that refused, is not accused."""
        before = chain if refused_by is None else _up_to(chain, refused_by)
        if accused not in before:
            return
        said = sum(each.refused_by == refused_by for each in self._waiting)
        if said >= WAITING_OF_ONE_MAX or len(self._waiting) >= WAITING_MAX:
            return
        others = {*_up_to(before, accused), *([refused_by] if refused_by is not None else [])} - {accused}
        told = Accusation(node=accused, others=tuple(sorted(others)), refused_by=refused_by)
        self._waiting[told] = None

    def waiting(self) -> tuple[Accusation, ...]:
        """What the next request is to tell."""
        return tuple(self._waiting)

    def told(self, accusations: Sequence[Accusation]) -> None:
        """These have been delivered."""
        for accusation in accusations:
            self._waiting.pop(accusation, None)


def _up_to(chain: Sequence[NodeId], node: NodeId) -> Sequence[NodeId]:
    """The chain until it comes to a device for the last time, with it; nobody, when it never does."""
    return chain[: len(chain) - chain[::-1].index(node)] if node in chain else ()
