"""Whether what devices hold makes a chain: adjacent pieces from the first layer to the last, no device twice. Pure.

A session has one stage on a device, so a device that holds every other piece can serve but one run of them. In a fleet
of a few devices that can leave every layer held and no chain; in a large one it cannot, and is not looked for long.
"""

from collections.abc import Collection, Mapping, Sequence

from fallow.domain.ids import NodeId
from fallow.domain.model import Span

STEPS_MAX = 2_000
"""Search steps after which a chain is taken for granted: so many devices hold so many pieces."""


def makes_chain(grid: Sequence[Span], held: Mapping[NodeId, Collection[Span]]) -> bool:
    """Whether some devices, each used once for a run of adjacent pieces, cover `grid` in order.

    From a device only its longest run need be tried: whatever follows a shorter one can follow the longer.
    """
    steps = 0

    def covers(start: int, used: frozenset[NodeId]) -> bool:
        nonlocal steps
        if start == len(grid):
            return True
        ends: list[tuple[int, NodeId]] = []
        for node, pieces in held.items():
            end = start
            while node not in used and end < len(grid) and grid[end] in pieces:
                end += 1
            if end > start:
                ends.append((end, node))
        for end, node in sorted(ends, reverse=True):
            steps += 1
            if steps > STEPS_MAX or covers(end, used | {node}):
                return True
        return False

    return covers(0, frozenset())
