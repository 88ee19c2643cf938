"""Placement in a fleet of a few devices: pieces of a common grid, one at a time. Pure.

Rules
- A model that fits one device stays whole on one, the fastest that it fits; other devices that it fits, and that have
  nothing else to do, become whole replicas.
- A model that fits none is cut on a *grid*: the same cut points for every device, so that any device can replace any
  piece of any other. A device may host several pieces, adjacent or not. Every piece gets a holder, then `replicas`
  holders on different devices as far as memory goes, so that a death is survived without loading anything. Fast
  devices get more pieces, and devices that are about to go get them last.
- Every model is covered before any model gets second copies; within each, models go in the catalogue's order.
- What is placed stays. A piece moves only when coverage or a missing copy requires it, a copy goes only when another
  model needs its room, and the grid changes only when that promises the thinnest piece more holders.
- Promises are kept or nothing happens: models take room from each other, so what is worked out for one may not last
  until all have theirs. What is held gives way only to a whole placement that is worth more (`placement_worth.py`).
- A model of which not every piece finds a place, or whose pieces make no chain, gets nothing new; the reason is told.

How: pieces are handed out one at a time to the device that would be done soonest; where no device has room, the
shortest chain of moves that makes room is looked for (augmenting paths, as in Kuhn's bipartite matching). That finds a
place where memory is tight, and takes time that grows with the square of the fleet: `placement.py` says where it ends.

`placement_board.py` keeps the books while a placement is worked out.
"""

import math
from collections.abc import Sequence

from fallow.domain.model import Span
from fallow.policy.placement_board import Board
from fallow.policy.placement_chains import makes_chain
from fallow.policy.placement_inputs import ModelNeed, NodeRoom, Placement, PlacementRules, grid_of
from fallow.policy.placement_reasons import why_not
from fallow.policy.placement_worth import is_covered, worth

SLOWEST_STEP = 1.3
"""A finer grid must make the slowest device sooner done by this factor to be worth its extra pieces."""

SIDESTEPS_MAX = 6
"""How often the rules are applied to what is worth no more than what is held, to find what is."""


def place_pieces(models: Sequence[ModelNeed], nodes: Sequence[NodeRoom], rules: PlacementRules) -> Placement:
    """The placement to aim for, given what the nodes, in the order of their ids, have now: what they have, unless
    another one is worth more. Placing it again may better it a little; `placement.place` does so until nothing changes.
    """
    held = Board(models, nodes, rules)
    board = _better(held)
    lacking = [model for model in models if not is_covered(board, model)]
    return Placement(
        stages=board.stages(), unplaceable={model.model: why_not(model, nodes, rules) for model in lacking}
    )


def _better(held: Board) -> Board:
    """A board that is worth more; the same one when the rules lead to none, though they be applied to their results."""
    now, enough = held, worth(held)
    for _ in range(SIDESTEPS_MAX):
        then = _worked_out(now)
        if worth(then) > enough:
            return then
        if then.stages() == now.stages():
            break
        now = then
    return held


def _worked_out(held: Board) -> Board:
    """What the rules make of a board, which stays as it is."""
    board, placed = held.afresh(), list[ModelNeed]()
    for model in held.models:
        cut = _covered(board, model)
        if cut is None:
            board.abandon(model)
        else:
            board = cut
            placed.append(model)
    for model in placed:
        board = _replicated(board, model)
    for node in board.nodes:
        if board.is_idle(node):
            _employ(board, node, placed)
    return board


def _covered(board: Board, model: ModelNeed) -> Board | None:
    """First copies: whole on one device if it fits one, else cut; `None` when it cannot be covered."""
    if board.whole_holders(model):
        return board
    node = board.best_whole_node(model, copy=1)
    if node is not None:
        board.put_whole(node, model, copy=1)
        return board
    return _best_cut(board, model)


def _replicated(board: Board, model: ModelNeed) -> Board:
    """Further copies: whole ones where they fit, and a cut set beside them when whole ones are too few."""
    rules = board.rules
    while 0 < board.whole_holders(model) < rules.replicas:
        node = board.best_whole_node(model, copy=rules.replicas)
        if node is None:
            break
        board.put_whole(node, model, copy=rules.replicas)
    if board.whole_holders(model) >= rules.replicas:
        return board
    if not board.whole_holders(model):
        _fill(board, model, grid_of(model, board.grid_size(model)), copies=range(2, rules.replicas + 1))
        return board
    cut = _best_cut(board, model)
    return board if cut is None else cut


_Tried = dict[int, tuple[tuple[int, float, int, int], Board]]
"""By grid size, the board it came to and what speaks for it: holders of the thinnest piece, holders a piece, minus how
long the slowest device takes, minus the size."""


def _best_cut(board: Board, model: ModelNeed) -> Board | None:
    """The model's pieces handed out over the best grid, on a copy of the board; `None` when no grid covers it."""
    rules = board.rules
    tried: _Tried = {}
    now = board.grid_size(model) if board.is_cut(model) else None
    if now is not None and _try_grid(board, model, now, tried) and tried[now][0][0] >= rules.replicas:
        return _trial(board, model, now, copies=range(1, board.whole_holders(model) + 2))
    for size in range(2, min(rules.max_pieces, model.parts_max) + 1):
        _try_grid(board, model, size, tried)
    if not tried:
        for size in range(rules.max_pieces + 1, model.parts_max + 1):
            if _try_grid(board, model, size, tried):
                break
    if not tried:
        return None
    best = max(tried, key=lambda size: tried[size][0])
    if now is not None and now in tried and tried[now][0][0] >= tried[best][0][0]:
        best = now
    return _trial(board, model, best, copies=range(1, board.whole_holders(model) + 2))


def _try_grid(board: Board, model: ModelNeed, size: int, tried: _Tried) -> bool:
    possible = board.may_cover(model, size)
    trial = _trial(board, model, size, copies=range(1, board.rules.replicas + 1)) if possible else None
    if trial is None:
        return False
    grid = grid_of(model, size)
    if not trial.whole_holders(model) and not makes_chain(grid, {n.node: trial.pieces(n, model) for n in trial.nodes}):
        return False
    counts = [trial.holders(model, piece) for piece in grid]
    thinnest = min(*counts, board.rules.replicas)
    slowest = round(math.log(max(trial.slowest_s(model), 1e-9)) / math.log(SLOWEST_STEP))
    tried[size] = ((thinnest, round(sum(counts) / size, 2), -slowest, -size), trial)
    return True


def _trial(board: Board, model: ModelNeed, size: int, copies: range) -> Board | None:
    """A copy of the board with the model cut `size` times; `None` when a piece finds no device of its own."""
    trial = board.copy()
    trial.keep_only_grid(model, size)
    grid = grid_of(model, size)
    _fill(trial, model, grid, copies)
    return trial if all(trial.cut_holders(model, piece) for piece in grid) else None


def _fill(board: Board, model: ModelNeed, grid: tuple[Span, ...], copies: range) -> None:
    """Give every piece its next copies: where there is room first, by making room after that."""
    for copy in copies:
        while True:
            wanted = [piece for piece in grid if board.holders(model, piece) < copy]
            if not wanted:
                break
            if not (board.put_best(model, wanted, copy) or any(board.make_room(model, p, copy) for p in wanted)):
                break


def _employ(board: Board, node: NodeRoom, models: Sequence[ModelNeed]) -> None:
    """Something for a device that has nothing: a whole replica, or as many of the thinnest pieces as fit."""
    for model in models:
        if board.fits_whole(node, model):
            board.put_whole(node, model, copy=board.rules.replicas)
            return
        grid = grid_of(model, board.grid_size(model))
        while all(board.cut_holders(model, piece) for piece in grid):
            fitting = [piece for piece in grid if board.fits(node, model, piece)]
            if not fitting:
                break
            board.put(node, model, min(fitting, key=lambda piece: (board.holders(model, piece), piece)))
        if not board.is_idle(node):
            return
