"""What a chain asks of who owns it: things that concern more than its own conversation."""

from typing import TYPE_CHECKING, Final

from fallow.domain.clock import Clock
from fallow.domain.ids import NodeId

if TYPE_CHECKING:
    from fallow.gateway.chain import Chain


ROOM_HEARD_S: Final = 1.2
"""When the coordinator has heard of room that was made: devices report once a second."""


class Superseded(Exception):
    """A chain is in trouble, or late, and its owner has another one that the conversation goes on with."""


class Owner:
    """The answers of an owner who knows nothing but this chain."""

    def unreached(self, node: NodeId) -> None:
        """A device could not be reached."""

    def leaving(self, chain: "Chain", node: NodeId) -> bool:
        """A device of the chain is about to go. Whether the owner sees to that; the chain goes on meanwhile."""
        return False

    def superseded(self, chain: "Chain") -> bool:
        """The chain is in trouble. Whether the conversation goes on elsewhere; otherwise the chain is repaired, and
        has all that its owner can free for it."""
        return False

    def overtaken(self, chain: "Chain") -> bool:
        """The chain owes a token. Whether the conversation goes on elsewhere, where that has been computed."""
        return False

    def make_room(self, tokens: int) -> bool:
        """A device has no room for so many tokens. Whether any was made."""
        return False

    def require_working(self) -> None:
        """Raises `NotWorking` when this gateway may not work: waiting would not help."""


class Room:
    """Room on devices for one chain: its owner is not asked again before the coordinator has heard of what was made."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heard_s = 0.0

    def ask(self, owner: Owner, tokens: int) -> None:
        """Have some made."""
        now_s = self._clock.monotonic_s()
        if now_s >= self._heard_s and owner.make_room(tokens):
            self._heard_s = now_s + ROOM_HEARD_S
