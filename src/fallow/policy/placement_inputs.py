"""What a placement is worked out from: the rules, the models' needs, the devices' room, the grid of cuts. Values."""

from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise

import msgspec

from fallow.domain.fleet import OUTLOOK_HORIZONS_S, Outlook, Tier
from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import Span, StageSpec, cut_points

GRIDS_CACHED_MAX = 1024
DOWNLINK_UNKNOWN_BYTES_PER_S = 6_250_000.0
"""50 Mbit/s: less than most home lines have, so that a download is rather counted too dear."""
STAY_UNKNOWN_S = 7200.0
HOUR_SHARE_UNKNOWN = 0.85
"""Both are those of a device that leaves at random after a median of two hours or so."""
FLEETING_HORIZON = OUTLOOK_HORIZONS_S.index(1800.0)


class PlacementRules(msgspec.Struct, frozen=True, kw_only=True):
    """What a placement must respect and aim at."""

    max_pieces: int = 6
    """Pieces that a model is cut into; more only when it cannot be covered otherwise."""
    max_share: float = 1.0
    """No device does more than this share of a model's work (`ModelNeed.work`)."""
    replicas: int = 2
    """Devices that should hold each piece."""
    regions: frozenset[str] = frozenset()
    """Models stay on devices that say they are in one of these; empty: anywhere. `ModelNeed.regions` takes it over."""
    context_tokens: int = 2048
    """A device must have KV room for a session of so many tokens on what it holds of each model."""
    few_nodes: int = 12
    """Fleets of at most so many devices are placed piece by piece, larger ones span by span (`placement.py`)."""
    gain_min: float = 0.05
    """By how much of itself a model's throughput must rise before anything that is placed moves for it."""
    download_share_max: float = 0.25
    """Of its expected stay, how much a device may spend on fetching what it is to hold."""


class ModelNeed(msgspec.Struct, frozen=True, kw_only=True):
    """What a model takes."""

    model: Digest
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int
    """Including the embedding again when it is the head's matrix."""
    kv_bytes_per_token_layer: int
    regions: frozenset[str] = frozenset()
    """Only devices that say they are in one of these may hold it; empty: anywhere, said or not."""
    tier_min: Tier = Tier.ANONYMOUS

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
    tier: Tier = Tier.ANONYMOUS
    region: str = ""
    """Empty: not said."""
    disk_free_bytes: int | None = None
    """Room for more model files; `None`: not measured, and no limit."""
    cached: dict[Digest, tuple[Span, ...]] = {}
    """Layers whose files are on its disk, beside those of what it hosts."""
    outlook: Outlook | None = None
    """`None`: no information, and a neutral prior."""
    downlink_bytes_per_s: float = DOWNLINK_UNKNOWN_BYTES_PER_S

    @property
    def stay_s(self) -> float:
        """How long it is expected to stay."""
        return STAY_UNKNOWN_S if self.outlook is None else self.outlook.expected_s

    @property
    def hour_share(self) -> float:
        """The share of the next hour that it is expected to be here: the area under its survival curve."""
        if self.outlook is None:
            return HOUR_SHARE_UNKNOWN
        ahead_s = (0.0, *(at_s for at_s in OUTLOOK_HORIZONS_S if at_s <= 3600.0))
        alive = (1.0, *self.outlook.survival)
        steps = pairwise(zip(ahead_s, alive, strict=False))
        return sum((until_s - from_s) * (a + b) / 2 for (from_s, a), (until_s, b) in steps) / ahead_s[-1]

    @property
    def fleeting(self) -> bool:
        """Whether it is about to go: more likely away than here in half an hour. It holds no only copy if there is
        another place for it."""
        if self.outlook is None:
            return False
        return any(share < 0.5 for share in self.outlook.survival[FLEETING_HORIZON : FLEETING_HORIZON + 1])


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Where everything should be."""

    stages: dict[NodeId, tuple[StageSpec, ...]]
    """For every node that was asked about, in the catalogue's order."""
    unplaceable: dict[Digest, str]
    """Models that have no full set of pieces, and why; for people."""


def may_hold(node: NodeRoom, model: ModelNeed) -> bool:
    """Whether the operator's rules on residency and trust let a device hold a model. Where it says nothing of its
    region, the answer is no."""
    return (not model.regions or node.region in model.regions) and node.tier >= model.tier_min


def on_disk(node: NodeRoom, model: Digest, piece: Span) -> bool:
    """Whether a device has the files of a piece, or has been told to fetch them."""
    hosted = [span for stage in node.hosted if stage.model == model for span in stage.spans()]
    return any(span.covers(piece) for span in (*hosted, *node.cached.get(model, ())))


def once_placed(node: NodeRoom, stages: tuple[StageSpec, ...], needs: Mapping[Digest, ModelNeed]) -> NodeRoom:
    """The device when it has done as it was told: it hosts `stages`, whose files have taken their room on its disk."""
    free = node.disk_free_bytes
    if free is not None and stages != node.hosted:
        pieces = [(stage.model, piece) for stage in stages for piece in stage.pieces]
        free -= sum(needs[digest].bytes_of(piece) for digest, piece in pieces if not on_disk(node, digest, piece))
    return msgspec.structs.replace(node, hosted=stages, disk_free_bytes=free)


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
