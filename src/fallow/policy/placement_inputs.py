"""What a placement is worked out from: the rules, the models' needs, the devices' room, the grid of cuts. Values."""

from functools import lru_cache
from itertools import pairwise

import msgspec

from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import Span, StageSpec, cut_points

GRIDS_CACHED_MAX = 1024


class PlacementRules(msgspec.Struct, frozen=True, kw_only=True):
    """What a placement must respect and aim at."""

    max_pieces: int = 6
    """Pieces that a model is cut into; more only when it cannot be covered otherwise."""
    max_share: float = 1.0
    """No device does more than this share of a model's work (`ModelNeed.work`)."""
    replicas: int = 2
    """Devices that should hold each piece."""
    context_tokens: int = 2048
    """A device must have KV room for a session of so many tokens on what it holds of each model."""


class ModelNeed(msgspec.Struct, frozen=True, kw_only=True):
    """What a model takes."""

    model: Digest
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int
    """Including the embedding again when it is the head's matrix."""
    kv_bytes_per_token_layer: int

    @property
    def layer_count(self) -> int:
        return len(self.layer_bytes)

    @property
    def parts_max(self) -> int:
        """Into how many pieces it can be cut."""
        return len(cut_points(self.layer_count)) + 1

    @property
    def whole(self) -> Span:
        return Span(0, self.layer_count)

    @property
    def whole_bytes(self) -> int:
        return self.bytes_of(self.whole)

    def work(self, piece: Span) -> float:
        """What a piece costs to compute, in layers. A decoded token is bound by reading weights, so the head, a single
        matrix, counts by its bytes: in a small model it is worth many layers. An embedding is one row."""
        mean_layer_bytes = max(sum(self.layer_bytes) / self.layer_count, 1)
        head = self.head_bytes / mean_layer_bytes if piece.last == self.layer_count else 0.0
        return piece.layer_count + head

    def bytes_of(self, piece: Span) -> int:
        weights = sum(self.layer_bytes[piece.first : piece.last])
        weights += self.embedding_bytes if piece.first == 0 else 0
        return weights + (self.head_bytes if piece.last == self.layer_count else 0)


class NodeRoom(msgspec.Struct, frozen=True, kw_only=True):
    """What a device offers, and what it hosts or has been told to host."""

    node: NodeId
    weights_bytes: int
    kv_bytes: int
    layer_s: float
    """Seconds that a layer takes for one row."""
    hosted: tuple[StageSpec, ...] = ()
    barred: frozenset[Digest] = frozenset()
    """Models that it failed to load lately."""


def grid_of(model: ModelNeed, size: int) -> tuple[Span, ...]:
    """The model cut into `size` pieces of nearly equal work, or into as many as its cut points allow."""
    return _grid(model.layer_count, model.work(model.whole), size)


@lru_cache(maxsize=GRIDS_CACHED_MAX)
def _grid(layer_count: int, work: float, size: int) -> tuple[Span, ...]:
    """Each inner cut is the cut point nearest to its share of the work that leaves one for every other cut."""
    points = cut_points(layer_count)
    size = min(size, len(points) + 1)
    cuts = [0]
    for index in range(1, size):
        after = [point for point in points if point > cuts[-1]]
        free = after[: len(after) - (size - 1 - index)]
        cuts.append(min(free, key=lambda point: abs(point - index * work / size)))
    return tuple(Span(first, last) for first, last in pairwise((*cuts, layer_count)))
