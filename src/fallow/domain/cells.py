"""What cells tell each other of themselves. What they ask of each other is in `fleet.py`, with the other messages."""

import msgspec

from fallow.domain.ids import Digest
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


class NeighbourCell(msgspec.Struct, frozen=True, kw_only=True):
    """Another cell, as this one's coordinator knows it."""

    digest: CellDigest
    silent_s: float
    rtt_s: float | None = None
    sessions_sent: int = 0
    """Chains of that cell which were given to sessions of this one, so far."""


def digests(cell: str = "*") -> str:
    """The `CellDigest`s of one cell, or of all."""
    return f"fallow.cells.{cell}.digest"
