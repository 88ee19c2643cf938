"""What a placement by pieces is worth, as a value that grows with it. Pure.

Rules
- First every model is covered, those first in the catalogue before others; then whole models count more than cut ones;
  then the copies of the thinnest piece, then those of the other pieces; then devices that do something. Copies beyond
  `replicas` count for nothing, and neither do pieces of a model that is not covered.
- What is placed gives way only to what is worth more. So while the fleet stays, planning never comes back to what it
  left, from however many rounds or however many plannings.

It does not know what a move costs: in a fleet of a few devices each of these gains is worth a download, and nothing
else is.
"""

from collections.abc import Sequence
from typing import NamedTuple

from fallow.domain.model import Span
from fallow.policy.placement_board import Board
from fallow.policy.placement_chains import makes_chain
from fallow.policy.placement_inputs import ModelNeed, grid_of


class Worth(NamedTuple):
    """Compared as a tuple: the first difference decides. By model, in the catalogue's order."""

    covered: tuple[bool, ...]
    whole: tuple[bool, ...]
    thinnest: tuple[int, ...]
    """Holders of the piece that has fewest."""
    copies: tuple[int, ...]
    """Layers held, once for every copy."""
    busy: int
    """Devices that hold something of a model that is covered."""


def worth(board: Board) -> Worth:
    """What the pieces on a board are worth."""
    covered = [model for model in board.models if is_covered(board, model)]
    copies = [_copies(board, model) if model in covered else [] for model in board.models]
    return Worth(
        covered=tuple(model in covered for model in board.models),
        whole=tuple(board.whole_holders(model) > 0 for model in board.models),
        thinnest=tuple(min((count for _, count in counts), default=0) for counts in copies),
        copies=tuple(sum(piece.layer_count * count for piece, count in counts) for counts in copies),
        busy=sum(any(board.pieces(node, model) for model in covered) for node in board.nodes),
    )


def is_covered(board: Board, model: ModelNeed) -> bool:
    """Whether sessions can be served with what is held of a model."""
    grid = grid_of(model, board.grid_size(model))
    if board.whole_holders(model):
        return True
    return all(board.cut_holders(model, piece) for piece in grid) and makes_chain(
        grid, {node.node: board.pieces(node, model) for node in board.nodes}
    )


def _copies(board: Board, model: ModelNeed) -> Sequence[tuple[Span, int]]:
    grid = grid_of(model, board.grid_size(model))
    return [(piece, min(board.holders(model, piece), board.rules.replicas)) for piece in grid]
