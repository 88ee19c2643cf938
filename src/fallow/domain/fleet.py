"""The messages that travel on the control bus: heartbeats up, commands down, routes to gateways.

Commands are imperative (`PlaceStage`), facts are past tense or states (`Heartbeat`, `NodeGone`). No prompt, token or
activation ever travels here. Subjects are those of `subjects.py`.
"""

from enum import IntEnum, StrEnum
from typing import Annotated

import msgspec

from fallow.domain.cells import CellSize, NeighbourCell
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import VISITS_MAX, Digest, ModelName, NodeId, SessionId
from fallow.domain.model import ModelConfig, Quantisation, Span, StageSpec
from fallow.domain.subjects import Subjects as Subjects  # noqa: PLC0414 - messages and where they go are asked for together
from fallow.domain.subjects import sender_of as sender_of  # noqa: PLC0414

Epoch = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
"""Counts the coordinators that have led a cell; 0 where there is no lease to lead by."""


class StageStatus(StrEnum):
    """How far a hosted stage has come."""

    FETCHING = "fetching"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


class Speed(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Measured engine speed: seconds that one layer takes for a call of 1, 4 and 8 decode rows."""

    layer_s_1: float
    layer_s_4: float
    layer_s_8: float


class Tier(IntEnum):
    """How well a device has shown what it is; ordered. Enrolment decides it, never the device's own word."""

    ANONYMOUS = 0
    KEYED = 1
    ATTESTED = 2


OUTLOOK_HORIZONS_S = (600.0, 1800.0, 3600.0, 4 * 3600.0, 12 * 3600.0)
"""How far ahead an `Outlook` looks."""


class Outlook(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How long a device expects to stay, from its own history, its power supply and its owner's word. The history
    itself never leaves the device."""

    survival: tuple[float, ...]
    """The probability that it is still here after each of `OUTLOOK_HORIZONS_S`; falling."""
    expected_s: float
    """The mean time that it stays, counted up to the last horizon."""


class HostedStage(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A stage on a node, as its heartbeat reports it."""

    stage: StageSpec
    status: StageStatus
    weights_bytes: int = 0
    progress: float = 0.0
    """Share of the files that are here and verified, 0 to 1."""
    speed: Speed | None = None
    error: str | None = None
    damaged: bool = False
    """It failed because the device found that what it computes with had changed (its canary, its weights)."""


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A node's whole public state. Sent every interval and at once when something in it changes."""

    node: NodeId
    name: str
    sequence: int
    """Counts up within one run of the node, so that a late heartbeat is told from a new one."""
    boot: str = ""
    """Drawn at random when the node starts: tells a restart from a late heartbeat."""
    address: PeerAddress
    memory_bytes: int
    """What the owner allows for weights and KV cache together."""
    kv_budget_bytes: int
    """The part of it set aside for the KV cache."""
    kv_free_bytes: int
    hosted: tuple[HostedStage, ...] = ()
    session_count: int = 0
    tokens_per_s: float = 0.0
    """Rows computed a second, averaged over the last few."""
    link_rtt_s: dict[NodeId, float] = {}
    draining: bool = False
    version: str = ""
    region: str = ""
    """Where its owner says that it is, for data residency; empty: not said."""
    disk_free_bytes: int | None = None
    """Room for more model files; `None`: not measured."""
    cached: dict[Digest, tuple[Span, ...]] = {}
    """Layers of models whose files are on its disk, whether it hosts them or not."""
    outlook: Outlook | None = None
    standing: str = "working"
    """A `Standing`: whether it may work, and if not, why."""
    passport: str = ""
    """Who the registrar says that it is, which its tier follows from. Told with the first, when it changes or somebody
    asks who is there, and now and then; empty otherwise."""


class NodeGone(msgspec.Struct, frozen=True, kw_only=True):
    """The coordinator believes that a node is gone: its bus connection broke or it fell silent. Gateways probe."""

    node: NodeId
    reason: str


class NodeLeaving(msgspec.Struct, frozen=True, kw_only=True):
    """A node says goodbye to the coordinator."""

    node: NodeId


# --- commands to nodes --------------------------------------------------------------------------


class PlaceStage(msgspec.Struct, frozen=True, kw_only=True, tag="place_stage", tag_field="kind"):
    """Host this stage of this model, instead of whatever span of it is hosted now."""

    stage: StageSpec
    manifest_bytes: int
    sources: tuple[PeerAddress, ...]
    """Peers that have the model's files, best first."""
    epoch: Epoch = 0
    """Of the coordinator that orders it. Devices refuse lower epochs than they have heard of."""


class DropStage(msgspec.Struct, frozen=True, kw_only=True, tag="drop_stage", tag_field="kind"):
    """Stop hosting a model."""

    model: Digest
    epoch: Epoch = 0


NodeCommand = PlaceStage | DropStage


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """The reply to a command; carrying it out shows in heartbeats."""

    ok: bool
    message: str = ""
    epoch: Epoch | None = None
    """With a refusal of an order of a lower epoch: the highest that this device has heard of."""
    boot: str | None = None
    """With a refusal of an order that was not believed: this run's, of which the coordinator may not have heard yet."""


class LeaderChanged(msgspec.Struct, frozen=True, kw_only=True):
    """A coordinator leads from now on; orders of lower epochs come from one that does not know it yet."""

    epoch: Epoch
    name: str


class CoordinatorReport(msgspec.Struct, frozen=True, kw_only=True):
    """A coordinator's word about itself, at an interval."""

    id: str
    """Its name on the bus, unique to one run."""
    name: str
    """For people."""
    epoch: Epoch | None = None
    """Of its term; `None` while it stands by."""
    since_s: float = 0.0
    """How long it has led, or stood by."""
    lease: bool = True
    """Whether it leads by a lease, so that others can take over. A bus without JetStream has none."""


# --- routing ------------------------------------------------------------------------------------


class Hop(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One stage of a session's chain."""

    address: PeerAddress
    span: Span
    visit: Annotated[int, msgspec.Meta(ge=0, lt=VISITS_MAX)] = 0
    """Which of the session's stages on that device: a chain that was repaired may come to a device again."""
    grant: bytes = b""
    """At a gateway, the leave to open it, out of `RouteReply.grants`. It never travels with a hop."""


class Accusation(msgspec.Struct, frozen=True, kw_only=True):
    """A device's numbers were refused: rows by the next device, or results by the gateway."""

    node: NodeId
    others: tuple[NodeId, ...] = ()
    """Who else could have brought it about, the gateway apart: the device that refused them, and those of the chain
    whose rows the accused computed with."""
    refused_by: NodeId | None = None
    """Which of those refused them; `None`: the gateway."""


class RouteRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Ask for a chain. For a repair, `keep` holds the hops that are alive, and only the gaps are filled."""

    model: Digest
    session: SessionId
    reserve_tokens: int
    exclude: tuple[NodeId, ...] = ()
    keep: tuple[Hop, ...] = ()
    origin: NodeId | None = None
    rebuild_tokens: Annotated[int, msgspec.Meta(ge=0, le=1 << 24)] = 0
    """How many tokens newcomers must compute anew before the next one: a running answer waits for it."""
    accused: tuple[Accusation, ...] = ()
    """Whose numbers this gateway has seen refused since its last request, in any of its sessions."""
    spare: bool = False
    """For a chain that stands by for another one, which is among `exclude`: of idle devices, or not at all."""


class RouteReply(msgspec.Struct, frozen=True, kw_only=True):
    """A chain that covers every layer once, or the reason why there is none."""

    hops: tuple[Hop, ...] = ()
    error: str | None = None
    grants: tuple[bytes, ...] = ()
    """For each hop, in order, the leave to open it: an encoded `Signed` grant. Empty where none are asked for."""
    code: str | None = None
    """With an error, the code of a `FallowError`: `kv_exhausted` when more room is all that a chain lacks."""


# --- the catalogue ------------------------------------------------------------------------------


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A model that the operator serves, as gateways and nodes learn of it. The manifest itself is a blob."""

    name: ModelName
    model: Digest
    manifest_bytes: int
    config: ModelConfig
    quantisation: Quantisation
    weights_bytes: tuple[int, int, tuple[int, ...]]
    """Embedding, head, and each layer."""
    created_unix_s: int
    servable: bool = False
    """Whether a chain exists now."""


class Catalogue(msgspec.Struct, frozen=True, kw_only=True):
    """The models that are served, and where their files are."""

    models: tuple[ModelEntry, ...]
    stores: tuple[PeerAddress, ...]
    """Peers that hold every file: the operator's store first."""
    models_left_out: int = 0
    """Models that are served beside `models`, for which the message has no room."""
    quarantined: int = 0
    """Devices that are out of service on suspicion."""


class StoreAnnounced(msgspec.Struct, frozen=True, kw_only=True):
    """The operator's store tells the coordinator which models it serves, at an interval."""

    address: PeerAddress
    models: tuple[ModelEntry, ...]


class GatewayReport(msgspec.Struct, frozen=True, kw_only=True):
    """A gateway's figures for `fallow status`, at an interval."""

    gateway: NodeId
    url: str
    sessions: int
    tokens_per_s: float
    chains: tuple[tuple[NodeId, ...], ...] = ()


# --- between cells --------------------------------------------------------------------------------


class FindChain(msgspec.Struct, frozen=True, kw_only=True, tag="find_chain", tag_field="kind"):
    """A cell asks another for a chain of that one's devices. Answered by a `RouteReply`; never passed on."""

    cell: str
    """Which asks."""
    request: RouteRequest


class FindFiles(msgspec.Struct, frozen=True, kw_only=True, tag="find_files", tag_field="kind"):
    """A cell asks another who there has files of a model. Answered by `FilesFound`."""

    cell: str
    model: Digest


class MeasureRtt(msgspec.Struct, frozen=True, kw_only=True, tag="measure_rtt", tag_field="kind"):
    """Answered by an empty message, at once."""

    cell: str


CellQuestion = FindChain | FindFiles | MeasureRtt


class FilesFound(msgspec.Struct, frozen=True, kw_only=True):
    """Peers that have files of a model."""

    sources: tuple[PeerAddress, ...]


class QuarantinedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device that is out of service on suspicion."""

    node: NodeId
    left_s: float
    why: str
    """For people."""


class FleetStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the coordinator knows, for `fallow status` and operators' tools."""

    nodes: tuple[Heartbeat, ...]
    silent_s: dict[NodeId, float]
    models: tuple[ModelEntry, ...]
    gateways: tuple[GatewayReport, ...] = ()
    coordinator_uptime_s: float = 0.0
    unplaceable: dict[Digest, str] = {}
    """Why a model of the catalogue has no chain, for people."""
    dropped_messages: dict[str, int] = {}
    """Bus messages that were not believed, counted by the kind of message."""
    coordinators: tuple[CoordinatorReport, ...] = ()
    """The one that leads and answers this first, then those that stand by."""
    quarantined: tuple[QuarantinedDevice, ...] = ()
    neighbours: tuple[NeighbourCell, ...] = ()
    """Other cells, nearest first."""
    nodes_left_out: int = 0
    """Devices that are here beside `nodes`, for which the message has no room."""
    chains_left_out: int = 0
    """Of `gateways`, in the same way."""
    neighbours_left_out: int = 0
    models_left_out: int = 0
    gateways_left_out: int = 0
    size: CellSize | None = None
    """Whether the cell has too few devices or too many."""
    standing: str = "working"
    """The coordinator's own `Standing`, which is the network's unless it alone is cut off; and `why`, for people."""
    why: str = ""
