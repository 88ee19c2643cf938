"""The books of a placement being worked out: who holds what, who has room, and what may go to make room.

Pure computation on a private copy. `placement_pieces.py` holds the rules that decide; this knows sizes and counts.
A model is held whole (one piece over all layers) or in pieces of its grid; a device never holds both of one model.
"""

from collections import Counter, deque
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import Span, StageSpec
from fallow.policy.placement_inputs import ModelNeed, NodeRoom, PlacementRules, grid_of, may_hold, on_disk

SCATTER_PENALTY = 1.5
"""How much later a device may be done and still be preferred, when it extends a run instead of starting another."""

HOUR_SHARE_MIN = 0.05

DISPLACED_MAX = 512
"""Held pieces that are considered for displacement before a search for room is given up."""

__all__ = ["Board", "ModelNeed", "NodeRoom", "PlacementRules", "grid_of"]


class _Swap(NamedTuple):
    """A piece takes another's place on a node."""

    node: NodeRoom
    model: ModelNeed
    piece: Span
    out_model: ModelNeed
    out: Span


class Board:
    """Who holds which pieces. Starts from what the nodes host, as far as it is lawful."""

    def __init__(self, models: Sequence[ModelNeed], nodes: Sequence[NodeRoom], rules: PlacementRules) -> None:
        self.models = models
        self.nodes = nodes
        self.rules = rules
        self._order = {model.model: index for index, model in enumerate(models)}
        self._need = {model.model: model for model in models}
        self._abandoned: set[Digest] = set()
        self._held: dict[NodeId, dict[Digest, set[Span]]] = {node.node: {} for node in nodes}
        self._used: dict[NodeId, tuple[int, int]] = {node.node: (0, 0) for node in nodes}
        """Bytes of weights and of KV cache."""
        self._counts: Counter[tuple[Digest, Span]] = Counter()
        self._size: dict[tuple[Digest, Span], tuple[int, int]] = {}
        self._work: dict[tuple[Digest, Span], float] = {}
        self._missing: dict[tuple[NodeId, Digest, Span], int] = {}
        self._grid = {model.model: _grid_in_use(model, nodes) for model in models}
        self._layer_s = {node.node: node.layer_s / max(node.hour_share, HOUR_SHARE_MIN) for node in nodes}
        """A device that is here for half of the next hour counts as half as fast."""
        for node in nodes:
            for model in models:
                self._adopt(node, model)

    def _adopt(self, node: NodeRoom, model: ModelNeed) -> None:
        if not may_hold(node, model):
            return
        lawful = (model.whole, *grid_of(model, self.grid_size(model)))
        for stage in node.hosted:
            for piece in stage.pieces if stage.model == model.model else ():
                if piece in lawful and self._has_room(node, model, piece):
                    self.put(node, model, piece)

    def copy(self) -> "Board":
        twin = Board.__new__(Board)
        twin.__dict__.update(self.__dict__)
        twin._abandoned = set(self._abandoned)
        twin._grid = dict(self._grid)
        twin._used = dict(self._used)
        twin._counts = self._counts.copy()
        twin._held = {node: {model: set(pieces) for model, pieces in held.items()} for node, held in self._held.items()}
        return twin

    def afresh(self) -> "Board":
        """A copy in which no model was given up."""
        twin = self.copy()
        twin._abandoned = set()
        return twin

    # --- counts ---------------------------------------------------------------------------------

    def grid_size(self, model: ModelNeed) -> int:
        """Into how many pieces the model is cut now; 2 when nobody holds any."""
        return self._grid[model.model]

    def pieces(self, node: NodeRoom, model: ModelNeed) -> set[Span]:
        return self._held[node.node].get(model.model, set())

    def whole_holders(self, model: ModelNeed) -> int:
        return self._counts[model.model, model.whole]

    def cut_holders(self, model: ModelNeed, piece: Span) -> int:
        return self._counts[model.model, piece]

    def holders(self, model: ModelNeed, piece: Span) -> int:
        """Devices that hold the piece, alone or as part of the whole."""
        if piece != model.whole:
            return self.whole_holders(model) + self.cut_holders(model, piece)
        parts = [part for part in grid_of(model, self.grid_size(model)) if part != model.whole]
        return self.whole_holders(model) + min((self.cut_holders(model, part) for part in parts), default=0)

    def is_cut(self, model: ModelNeed) -> bool:
        """Whether anybody holds pieces of it rather than the whole."""
        return any(self.pieces(node, model) - {model.whole} for node in self.nodes)

    def slowest_s(self, model: ModelNeed) -> float:
        """Compute time of the device that takes longest over what it holds of a model."""
        return max(sum(map(model.work, self.pieces(node, model))) * node.layer_s for node in self.nodes)

    def is_idle(self, node: NodeRoom) -> bool:
        return not any(self._held[node.node].values())

    def may_cover(self, model: ModelNeed, size: int) -> bool:
        """Whether enough pieces of a grid could be held at all, were every device empty: a cheap upper bound."""
        grid = grid_of(model, size)
        work = min(map(model.work, grid))
        weights = max(min(model.bytes_of(piece) for piece in grid), 1)
        places = sum(
            min(int(self._work_max(model) / work), node.weights_bytes // weights, len(grid))
            for node in self.nodes
            if self._takes(node, model) or self.pieces(node, model)
        )
        return places >= len(grid)

    # --- room -----------------------------------------------------------------------------------

    def _has_room(
        self, node: NodeRoom, model: ModelNeed, piece: Span, leaving: Sequence[tuple[Digest, Span]] = ()
    ) -> bool:
        """Whether a piece fits beside what is held, once `leaving` has left."""
        weights, kv = self._size_of(model, piece)
        weights, kv = weights + self._used[node.node][0], kv + self._used[node.node][1]
        for digest, gone in leaving:
            less = self._size_of(self._need[digest], gone)
            weights, kv = weights - less[0], kv - less[1]
        if weights > node.weights_bytes or kv > node.kv_bytes:
            return False
        beside = [held for held in self.pieces(node, model) if (model.model, held) not in leaving]
        if any(held.first < piece.last and piece.first < held.last for held in beside):
            return False
        if sum(self._work_of(model, held) for held in beside) + self._work_of(model, piece) > self._work_max(model):
            return False
        return self._fits_disk(node, [*self._all_held(node, leaving), (model.model, piece)])

    def _all_held(self, node: NodeRoom, leaving: Sequence[tuple[Digest, Span]] = ()) -> list[tuple[Digest, Span]]:
        held = [(digest, piece) for digest, pieces in self._held[node.node].items() for piece in pieces]
        return [item for item in held if item not in leaving]

    def _fits_disk(self, node: NodeRoom, held: Sequence[tuple[Digest, Span]]) -> bool:
        """Whether the files that are not on its disk yet have room there."""
        if node.disk_free_bytes is None:
            return True
        return sum(self._missing_bytes(node, digest, piece) for digest, piece in held) <= node.disk_free_bytes

    def _missing_bytes(self, node: NodeRoom, digest: Digest, piece: Span) -> int:
        missing = self._missing.get((node.node, digest, piece))
        if missing is None:
            missing = 0 if on_disk(node, digest, piece) else self._need[digest].bytes_of(piece)
            self._missing[node.node, digest, piece] = missing
        return missing

    def _takes(self, node: NodeRoom, model: ModelNeed) -> bool:
        """Whether a device may get anything new of a model."""
        return model.model not in node.barred and may_hold(node, model)

    def _work_max(self, model: ModelNeed) -> float:
        return self.rules.max_share * self._work_of(model, model.whole) + 1e-9

    def _work_of(self, model: ModelNeed, piece: Span) -> float:
        work = self._work.get((model.model, piece))
        if work is None:
            work = self._work[model.model, piece] = model.work(piece)
        return work

    def _size_of(self, model: ModelNeed, piece: Span) -> tuple[int, int]:
        """Bytes of weights and of KV cache that a piece takes."""
        size = self._size.get((model.model, piece))
        if size is None:
            kv = piece.layer_count * model.kv_bytes_per_token_layer * self.rules.context_tokens
            size = self._size[model.model, piece] = (model.bytes_of(piece), kv)
        return size

    def fits(self, node: NodeRoom, model: ModelNeed, piece: Span) -> bool:
        return self._takes(node, model) and self._has_room(node, model, piece)

    def fits_whole(self, node: NodeRoom, model: ModelNeed) -> bool:
        return self._takes(node, model) and self._has_room(node, model, model.whole, self._own(node, model))

    def _own(self, node: NodeRoom, model: ModelNeed) -> list[tuple[Digest, Span]]:
        return [(model.model, piece) for piece in self.pieces(node, model)]

    def _may_go(self, digest: Digest, piece: Span, for_model: ModelNeed, copy: int) -> bool:
        """Whether a piece may be given up so that `for_model` gets its `copy`th copy of something."""
        if digest in self._abandoned:
            return True
        need = self._need[digest]
        count = self.holders(need, piece)
        if digest == for_model.model:
            return False
        if copy == 1:
            return count > 1 or self._order[digest] > self._order[for_model.model]
        return count > self.rules.replicas

    def _evictions(self, node: NodeRoom, model: ModelNeed, piece: Span, copy: int) -> list[tuple[Digest, Span]] | None:
        """What must go so that a piece fits: as few as possible, from the catalogue's end; `None` when it cannot."""
        if not self._takes(node, model):
            return None
        leaving = self._own(node, model) if piece == model.whole else []
        if self._has_room(node, model, piece, leaving):
            return leaving
        candidates = [
            (digest, held)
            for digest, pieces in self._held[node.node].items()
            for held in pieces
            if self._may_go(digest, held, model, copy)
        ]
        candidates.sort(key=lambda item: (item[0] not in self._abandoned, -self._order[item[0]], item[1]))
        for item in candidates:
            leaving = [*leaving, item]
            if self._has_room(node, model, piece, leaving):
                return leaving
        return None

    # --- moves ----------------------------------------------------------------------------------

    def put(self, node: NodeRoom, model: ModelNeed, piece: Span) -> None:
        pieces = self._held[node.node].setdefault(model.model, set())
        assert piece not in pieces
        pieces.add(piece)
        self._account(node, model, piece, 1)

    def _take(self, node: NodeRoom, digest: Digest, piece: Span) -> None:
        self._held[node.node][digest].remove(piece)
        self._account(node, self._need[digest], piece, -1)

    def _account(self, node: NodeRoom, model: ModelNeed, piece: Span, sign: int) -> None:
        weights, kv = self._size_of(model, piece)
        used = self._used[node.node]
        self._used[node.node] = (used[0] + sign * weights, used[1] + sign * kv)
        self._counts[model.model, piece] += sign

    def best_whole_node(self, model: ModelNeed, copy: int) -> NodeRoom | None:
        """The fastest device that the whole model fits, one where nothing of other models must go if there is any."""
        offers: list[tuple[int, bool, float, NodeId, NodeRoom]] = []
        for node in self.nodes:
            if model.whole in self.pieces(node, model):
                continue
            leaving = self._evictions(node, model, model.whole, copy)
            if leaving is not None:
                others = sum(digest != model.model for digest, _ in leaving)
                offers.append((others, node.fleeting, self._layer_s[node.node], node.node, node))
        return min(offers, key=lambda offer: offer[:4])[4] if offers else None

    def put_whole(self, node: NodeRoom, model: ModelNeed, copy: int) -> None:
        for digest, piece in self._evictions(node, model, model.whole, copy) or ():
            self._take(node, digest, piece)
        self.put(node, model, model.whole)

    def put_best(self, model: ModelNeed, wanted: Sequence[Span], copy: int) -> bool:
        """Place one of the wanted pieces on the device that would be done soonest. False when none has room."""
        best: tuple[tuple[int, bool, float, Span, NodeId], NodeRoom, Span, list[tuple[Digest, Span]]] | None = None
        for node in self.nodes:
            mine = self.pieces(node, model)
            busy = sum(self._work_of(self._need[d], p) for d, held in self._held[node.node].items() for p in held)
            for piece in wanted:
                leaving = self._evictions(node, model, piece, copy) if piece not in mine else None
                if leaving is None:
                    continue
                done_s = (busy + self._work_of(model, piece)) * self._layer_s[node.node]
                if mine and not any(held.last == piece.first or piece.last == held.first for held in mine):
                    done_s *= SCATTER_PENALTY
                key = (len(leaving), node.fleeting, done_s, piece, node.node)
                if best is None or key < best[0]:
                    best = (key, node, piece, leaving)
        if best is None:
            return False
        _, node, piece, leaving = best
        for digest, gone in leaving:
            self._take(node, digest, gone)
        self.put(node, model, piece)
        return True

    def make_room(self, model: ModelNeed, piece: Span, copy: int) -> bool:
        """Place a piece by moving others to where they fit, with as few moves as possible (breadth first, each held
        piece displaced once)."""
        paths: deque[tuple[ModelNeed, Span, tuple[_Swap, ...]]] = deque([(model, piece, ())])
        displaced: set[tuple[NodeId, Digest, Span]] = set()
        while paths and len(displaced) < DISPLACED_MAX:
            need, wanting, path = paths.popleft()
            for node in self.nodes:
                if not self._takes(node, need) or wanting in self.pieces(node, need):
                    continue
                for digest, out in self._displaceable(node):
                    if (node.node, digest, out) in displaced:
                        continue
                    if not self._has_room(node, need, wanting, [(digest, out)]):
                        continue
                    displaced.add((node.node, digest, out))
                    swaps = (*path, _Swap(node, need, wanting, self._need[digest], out))
                    if self._swapped(swaps, copy):
                        return True
                    paths.append((self._need[digest], out, swaps))
        return False

    def _displaceable(self, node: NodeRoom) -> list[tuple[Digest, Span]]:
        return sorted(
            (digest, held)
            for digest, pieces in self._held[node.node].items()
            for held in pieces
            if held != self._need[digest].whole
        )

    def _swapped(self, swaps: Sequence["_Swap"], copy: int) -> bool:
        """Carry out a chain of swaps when what the last one displaces has a place; else change nothing."""
        last = swaps[-1]
        for swap in swaps:
            self._take(swap.node, swap.out_model.model, swap.out)
            self.put(swap.node, swap.model, swap.piece)
        if all(self._is_lawful(swap.node) for swap in swaps) and self._rehomed(last, copy):
            return True
        for swap in reversed(swaps):
            self._take(swap.node, swap.model.model, swap.piece)
            self.put(swap.node, swap.out_model, swap.out)
        return False

    def _is_lawful(self, node: NodeRoom) -> bool:
        """Whether what a node holds fits it. Swaps that were looked at one by one may not do so together."""
        weights, kv = self._used[node.node]
        if weights > node.weights_bytes or kv > node.kv_bytes or not self._fits_disk(node, self._all_held(node)):
            return False
        for digest, pieces in self._held[node.node].items():
            need = self._need[digest]
            ordered = sorted(pieces)
            if any(a.last > b.first for a, b in pairwise(ordered)):
                return False
            if sum(self._work_of(need, piece) for piece in ordered) > self._work_max(need):
                return False
        return True

    def _rehomed(self, swap: "_Swap", copy: int) -> bool:
        """Place what a swap displaced; nothing to do when copies enough remain."""
        model, piece = swap.out_model, swap.out
        if self.holders(model, piece) >= copy:
            return True
        offers = [
            node
            for node in self.nodes
            if node.node != swap.node.node and piece not in self.pieces(node, model) and self.fits(node, model, piece)
        ]
        if offers:
            self.put(min(offers, key=lambda node: (self._layer_s[node.node], node.node)), model, piece)
        return bool(offers)

    def keep_only_grid(self, model: ModelNeed, size: int) -> None:
        """Cut the model `size` times from now on; pieces of another grid go."""
        self._grid[model.model] = size
        lawful = {model.whole, *grid_of(model, size)}
        for node in self.nodes:
            for piece in self.pieces(node, model) - lawful:
                self._take(node, model.model, piece)

    def abandon(self, model: ModelNeed) -> None:
        """The model cannot be served: what is left of it stays only where nobody needs the room."""
        self._abandoned.add(model.model)

    # --- results --------------------------------------------------------------------------------

    def stages(self) -> dict[NodeId, tuple[StageSpec, ...]]:
        return {
            node.node: tuple(
                StageSpec(model=model.model, pieces=tuple(sorted(self.pieces(node, model))))
                for model in self.models
                if self.pieces(node, model)
            )
            for node in self.nodes
        }


def _grid_in_use(model: ModelNeed, nodes: Sequence[NodeRoom]) -> int:
    """The grid that most of the held pieces belong to; the coarsest when several or none."""
    held = [piece for node in nodes for stage in node.hosted if stage.model == model.model for piece in stage.pieces]
    if not held:
        return min(2, model.parts_max)
    sizes = range(2, model.parts_max + 1)
    return max(sizes, key=lambda size: (sum(p in grid_of(model, size) for p in held), -size), default=1)
