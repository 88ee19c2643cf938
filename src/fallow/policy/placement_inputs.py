"""What a placement is worked out from: the rules, the models' needs, the devices' room, the grid of cuts. Values."""

from functools import lru_cache
from itertools import pairwise

import msgspec

from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import Span, StageSpec, cut_points

GRIDS_CACHED_MAX = 1024


class PlacementRules(msgspec.Struct, frozen=True, kw_only=True):
    max_pieces: int = 6
    """Pieces that a model is cut into; more only when it cannot be covered otherwise."""
    max_share: float = 1.0
    """No device holds more than this share of a model's layers."""
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
    """The model cut into `size` pieces of nearly equal layer counts, or into as many as its cut points allow."""
    return _grid(model.layer_count, size)


@lru_cache(maxsize=GRIDS_CACHED_MAX)
def _grid(layer_count: int, size: int) -> tuple[Span, ...]:
    edges = (0, *cut_points(layer_count), layer_count)
    parts = len(edges) - 1
    size = min(size, parts)
    cuts = [edges[round(index * parts / size)] for index in range(size + 1)]
    return tuple(Span(first, last) for first, last in pairwise(cuts))
