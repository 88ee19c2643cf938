"""What the chains of one gateway ask of it, and who answers: `ownership.py` has the questions."""

from fallow.domain.ids import NodeId
from fallow.gateway.chain import Chain
from fallow.gateway.kept import KeptChains
from fallow.gateway.lost_devices import LostDevices
from fallow.gateway.moves import Moves
from fallow.gateway.ownership import Owner
from fallow.trust.contract import Lease
from fallow.trust.grants import require_working


class FleetOwner(Owner):
    """Answers the chains of one gateway."""

    def __init__(self, lost: LostDevices, moves: Moves, kept: KeptChains, lease: Lease) -> None:
        self._lost = lost
        self._moves = moves
        self._kept = kept
        self._lease = lease

    def unreached(self, node: NodeId) -> None:
        self._lost.note(node)

    def leaving(self, chain: Chain, node: NodeId) -> bool:
        return self._moves.begin(chain, node)

    def superseded(self, chain: Chain) -> bool:
        return self._moves.superseded(chain)

    def overtaken(self, chain: Chain) -> bool:
        return self._moves.overtaken(chain)

    def make_room(self, tokens: int) -> bool:
        # Which devices lack room is not known, so both make some.
        return self._moves.make_room(tokens) | self._kept.make_room(tokens)

    def require_working(self) -> None:
        require_working(self._lease)
