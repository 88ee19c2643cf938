"""What cells tell each other of themselves. What they ask of each other is in `fleet.py`, with the other messages."""

import msgspec

from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import Span


class ModelDigest(msgspec.Struct, frozen=True, kw_only=True):
    """A model as a cell serves it, for other cells."""

    model: Digest
    servable: bool
    """Whether a chain exists now."""
    tokens_per_s_max: float = 0.0
    """What its devices could serve."""
    load: float = 0.0
    """The share of it that is in use; above 1 when more is asked than they can."""
    copies_min: int = 0
    """Devices that are ready with the layer that fewest hold."""
    kv_free_sessions: int = 0
    """Sessions for which there is KV room on every layer."""
    missing: tuple[Span, ...] = ()
    """Layers that no device is ready with."""


class CellDigest(msgspec.Struct, frozen=True, kw_only=True):
    """What a cell's leading coordinator tells the others, at an interval."""

    cell: str
    boot: str
    """When the coordinator began to lead, in seconds since 1970, in decimal digits."""
    sequence: int
    """Counts up within one `boot`."""
    devices: int
    devices_max: int
    region: str = ""
    """Where most of its devices say that they are."""
    models: tuple[ModelDigest, ...] = ()
    dissolves_into: str | None = None
    """The cell that its devices should join, because it has too few. It takes nobody new, and serves whoever stays."""


class CellSize(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a cell has the size that one should have, for people."""

    devices_min: int
    devices_max: int
    dissolves_into: str | None = None
    """The cell that its devices are told to join, because it has too few."""
    outgrown: bool = False
    """It has more than `devices_max`: an operator should start another cell."""
    should_go: tuple[NodeId, ...] = ()
    """When it has outgrown itself: the devices that belong together in another cell, by round trips they measured."""


class NeighbourCell(msgspec.Struct, frozen=True, kw_only=True):
    """Another cell, as this one's coordinator knows it."""

    digest: CellDigest
    silent_s: float
    rtt_s: float | None = None
    sessions_sent: int = 0
    """Chains of that cell which were given to sessions of this one, so far."""


def told_when(digest: CellDigest) -> tuple[float, int]:
    """Orders the digests of one cell: what was true in an earlier term, or earlier in this one, is true no more."""
    return float(digest.boot), digest.sequence


def digests(cell: str = "*") -> str:
    """The `CellDigest`s of one cell, or of all."""
    return f"fallow.cells.{cell}.digest"
