"""Decodes bus messages and refuses those that cannot be true. Parse at the edge once; inside, messages are trusted.

Everything raises `BusMessageError`, with what was expected and what came. A node can still lie about its speed within
reason; such a lie costs it and its sessions, not the coordinator.

Thousands of heartbeats are checked a second: what a check costs is comparing, and words are found only for what fails.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import msgspec

from fallow.domain.cells import CellDigest, ModelDigest, digests
from fallow.domain.errors import BusMessageError
from fallow.domain.fleet import (
    OUTLOOK_HORIZONS_S,
    CellQuestion,
    FilesFound,
    FindChain,
    FindFiles,
    GatewayReport,
    Heartbeat,
    HostedStage,
    ModelEntry,
    NodeLeaving,
    Outlook,
    RouteReply,
    RouteRequest,
    Speed,
    StoreAnnounced,
    sender_of,
)
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import Span, StageSpec

MEMORY_MAX_BYTES = 1 << 50
LAYERS_MAX = 1024
CONTEXT_MAX_TOKENS = 1 << 24
LAYER_MAX_S = 100.0
RTT_MAX_S = 60.0
ROWS_PER_S_MAX = 1e9
SESSIONS_MAX = 1_000_000
NAME_MAX_CHARS = 128
TEXT_MAX_CHARS = 4096
HOSTED_MAX = 64
LINKS_MAX = 4096
HOPS_MAX = 128
GRANT_MAX_BYTES = 8192
EXCLUDED_MAX = 1024
ACCUSED_MAX = 8
MODELS_MAX = 256
ENDPOINTS_MAX = 16
MANIFEST_MAX_BYTES = 32 << 20
DISK_MAX_BYTES = 1 << 60
REGION_MAX_CHARS = 64
CACHED_MODELS_MAX = 256
CACHED_SPANS_MAX = 64
"""Runs of layers that a device may report of one model."""
OUTLOOK_MAX_S = OUTLOOK_HORIZONS_S[-1]
DEVICES_MAX = 1_000_000
LOAD_MAX = 1e6
SOURCES_MAX = 16
DIGEST_MAX_BYTES = 256 << 10
HEARTBEAT_MAX_BYTES = 64 << 10
"""Twice what 256 links and a full shelf take."""
STORE_MAX_BYTES = 512 << 10
"""All catalogues together, and what else a status tells, are cut to a bus message (`answers.py`)."""
GATEWAY_MAX_BYTES = 512 << 10
ID_CHARS = 64
IDS_KEPT_MAX = 65_536
KINDS_MAX = 32
"""Message types whose decoders are kept."""

_HEX = re.compile(r"[0-9a-f]+")
_CELL = re.compile(r"[A-Za-z0-9_-]{1,32}")
_SESSION = re.compile(r"[0-9a-f]{32}")
_BOOT = re.compile(r"[0-9]{1,16}(\.[0-9]{1,9})?")
_T = TypeVar("_T")


def decode(message: bytes, kind: type[_T]) -> _T:
    """A bus message as `kind`."""
    try:
        decoded: _T = _decoder(kind).decode(message)  # type: ignore[arg-type]  # to mypy, a TypeVar is not Hashable
        return decoded
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BusMessageError(f"expected a {getattr(kind, '__name__', kind)}: {error}") from error


@lru_cache(maxsize=KINDS_MAX)
def _decoder(kind: type) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def heartbeat(subject: str, message: bytes) -> Heartbeat:
    """A heartbeat that came on `subject`, which names its sender."""
    _size("a heartbeat", message, HEARTBEAT_MAX_BYTES)
    beat = decode(message, Heartbeat)
    _id("a node id", beat.node)
    if subject.split(".")[-2:-1] != [beat.node]:
        raise _refusal(f"a heartbeat of the subject's node ({subject})", beat.node)
    if beat.address.node != beat.node:
        raise _refusal("the sender's own address", beat.address.node)
    _address(beat.address)
    _text("a name", beat.name, NAME_MAX_CHARS)
    _text("a boot id", beat.boot, NAME_MAX_CHARS)
    _text("a version", beat.version, NAME_MAX_CHARS)
    _text("a standing", beat.standing, NAME_MAX_CHARS)
    _text("a passport", beat.passport, TEXT_MAX_CHARS)
    _number("a sequence number", beat.sequence, 0, 1 << 62)
    _number("memory_bytes", beat.memory_bytes, 0, MEMORY_MAX_BYTES)
    _number("kv_budget_bytes", beat.kv_budget_bytes, 0, beat.memory_bytes)
    _number("kv_free_bytes", beat.kv_free_bytes, 0, MEMORY_MAX_BYTES)
    _number("session_count", beat.session_count, 0, SESSIONS_MAX)
    _number("tokens_per_s", beat.tokens_per_s, 0, ROWS_PER_S_MAX)
    _number("the number of links", len(beat.link_rtt_s), 0, LINKS_MAX)
    for peer, rtt in beat.link_rtt_s.items():
        _id("a link's node id", peer)
        _number("a round trip", rtt, 0, RTT_MAX_S)
    _number("the number of stages", len(beat.hosted), 0, HOSTED_MAX)
    for hosted in beat.hosted:
        _hosted(hosted)
    _text("a region", beat.region, REGION_MAX_CHARS)
    if beat.disk_free_bytes is not None:
        _number("disk_free_bytes", beat.disk_free_bytes, 0, DISK_MAX_BYTES)
    _cached(beat.cached)
    if beat.outlook is not None:
        _outlook(beat.outlook)
    return beat


def _cached(cached: dict[Digest, tuple[Span, ...]]) -> None:
    _number("the number of cached models", len(cached), 0, CACHED_MODELS_MAX)
    for model, spans in cached.items():
        _id("a cached model's digest", model)
        _number("the number of cached spans of a model", len(spans), 0, CACHED_SPANS_MAX)
        _ascending("cached spans", spans)


def _outlook(outlook: Outlook) -> None:
    if len(outlook.survival) != len(OUTLOOK_HORIZONS_S):
        raise _refusal(f"survival at {len(OUTLOOK_HORIZONS_S)} horizons", f"{len(outlook.survival)} of them")
    most = 1.0
    for share in outlook.survival:
        _number("survival that falls with the horizon,", share, 0, most)
        most = share
    _number("expected_s", outlook.expected_s, 0, OUTLOOK_MAX_S)


def _hosted(hosted: HostedStage) -> None:
    _stage(hosted.stage)
    _number("weights_bytes", hosted.weights_bytes, 0, MEMORY_MAX_BYTES)
    _number("progress", hosted.progress, 0, 1)
    _text("an error", hosted.error or "", TEXT_MAX_CHARS)
    if hosted.speed is not None:
        _speed(hosted.speed)


def _speed(speed: Speed) -> None:
    for layer_s in (speed.layer_s_1, speed.layer_s_4, speed.layer_s_8):
        _number("seconds for a layer", layer_s, 0, LAYER_MAX_S)


def _stage(stage: StageSpec) -> None:
    _id("a model digest", stage.model)
    _ascending("pieces", stage.pieces)
    if not stage.pieces:
        raise _refusal("a stage with pieces", "none")


def _ascending(what: str, spans: tuple[Span, ...]) -> None:
    edge = 0
    for span in spans:
        if not edge <= span.first < span.last <= LAYERS_MAX:
            raise _refusal(f"ascending {what} of at most {LAYERS_MAX} layers", str(span))
        edge = span.last


def leaving(subject: str, message: bytes) -> NodeLeaving:
    """A device's goodbye."""
    said = decode(message, NodeLeaving)
    sent_by(subject, said.node)
    return said


def sent_by(subject: str, sender: str) -> None:
    """Hold a message to the name that the bus let its sender use. Raises `BusMessageError`."""
    if sender_of(subject) != sender:
        raise _refusal(f"a message of {sender_of(subject)!r} on its subject", sender)


def gateway_request(subject: str, message: bytes) -> RouteRequest:
    """A gateway's request for a chain; its `origin` is who sent it."""
    request = _route_request(decode(message, RouteRequest))
    if request.origin is not None:
        sent_by(subject, request.origin)
        return request
    sender = sender_of(subject)
    return msgspec.structs.replace(request, origin=NodeId(sender)) if _is_id(sender) else request


def _route_request(request: RouteRequest) -> RouteRequest:
    if request.origin is not None:
        _id("an origin", request.origin)
    if not _SESSION.fullmatch(request.session):
        raise _refusal("a session id of 32 hex digits", request.session)
    _number("reserve_tokens", request.reserve_tokens, 1, CONTEXT_MAX_TOKENS)
    _number("the number of hops to keep", len(request.keep), 0, HOPS_MAX)
    _number("the number of nodes to exclude", len(request.exclude), 0, EXCLUDED_MAX)
    _number("the number of accusations", len(request.accused), 0, ACCUSED_MAX)
    for told in request.accused:
        _id("an accused node's id", told.node)
        _id("the id of a node that refused", told.refused_by or told.node)
        _number("the number of others behind an accusation", len(told.others), 0, HOPS_MAX)
        for other in told.others:
            _id("a node id behind an accusation", other)
    for hop in request.keep:
        _address(hop.address)
        _number("a kept hop's first layer", hop.span.first, 0, LAYERS_MAX)
        _number("a kept hop's last layer", hop.span.last, hop.span.first + 1, LAYERS_MAX)
    return request


# --- between cells --------------------------------------------------------------------------------


def cell_digest(subject: str, message: bytes, read: Callable[[bytes], CellDigest]) -> CellDigest:
    """A digest that came on `subject`, which names its cell. `read` opens it (`CellWords.told`)."""
    _size("a digest", message, DIGEST_MAX_BYTES)
    digest = read(message)
    _cell(digest.cell)
    if subject != digests(digest.cell):
        raise _refusal(f"a digest of the subject's cell ({subject})", digest.cell)
    if not _BOOT.fullmatch(digest.boot):
        raise _refusal("the time when a term began, in digits", digest.boot)
    _text("a region", digest.region, REGION_MAX_CHARS)
    _cell(digest.cell if digest.dissolves_into is None else digest.dissolves_into)
    if digest.dissolves_into == digest.cell:
        raise _refusal("another cell to dissolve into", digest.cell)
    _number("a sequence number", digest.sequence, 0, 1 << 62)
    _number("devices", digest.devices, 0, DEVICES_MAX)
    _number("devices_max", digest.devices_max, 0, DEVICES_MAX)
    _number("the number of models", len(digest.models), 0, MODELS_MAX)
    for told in digest.models:
        _model_digest(told)
    return digest


def _model_digest(told: ModelDigest) -> None:
    _id("a model digest", told.model)
    _number("tokens_per_s_max", told.tokens_per_s_max, 0, ROWS_PER_S_MAX)
    _number("load", told.load, 0, LOAD_MAX)
    _number("copies_min", told.copies_min, 0, DEVICES_MAX)
    _number("kv_free_sessions", told.kv_free_sessions, 0, SESSIONS_MAX)
    _number("the number of missing spans", len(told.missing), 0, CACHED_SPANS_MAX)
    _ascending("missing layers", told.missing)
    if told.servable and told.missing:
        raise _refusal("a servable model without missing layers", str(told.missing[0]))


def cell_question(message: bytes, read: Callable[[bytes], CellQuestion]) -> CellQuestion:
    """What another cell asks. `read` opens it (`CellWords.asked`)."""
    question = read(message)
    _cell(question.cell)
    if isinstance(question, FindChain):
        _route_request(question.request)
    if isinstance(question, FindFiles):
        _id("a model digest", question.model)
    return question


def route_reply(message: bytes, request: RouteRequest, layer_count: int) -> RouteReply:
    """Another cell's answer to a request: a chain over exactly the model's layers of devices that are not excluded, no
    stage of which comes twice, or an error."""
    reply = decode(message, RouteReply)
    _text("an error", reply.error or "", TEXT_MAX_CHARS)
    _text("an error's code", reply.code or "", NAME_MAX_CHARS)
    if not reply.hops:
        return reply
    _number("the number of hops", len(reply.hops), 1, HOPS_MAX)
    edge = 0
    for hop in reply.hops:
        _address(hop.address)
        if hop.span.first != edge or hop.span.last <= edge:
            raise _refusal(f"a hop that goes on from layer {edge}", str(hop.span))
        edge = hop.span.last
    if edge != layer_count:
        raise _refusal(f"a chain of {layer_count} layers", f"{edge}")
    stages = {(hop.address.node, hop.visit) for hop in reply.hops}
    nodes = {node for node, _ in stages}
    _number("the number of grants", len(reply.grants), 0, len(reply.hops))
    for grant in reply.grants:
        _size("a grant", grant, GRANT_MAX_BYTES)
    if len(stages) < len(reply.hops) or nodes & set(request.exclude):
        raise _refusal("hops of different stages, no device excluded", " ".join(sorted(node[:8] for node in nodes)))
    return reply


def files_found(message: bytes) -> FilesFound:
    """Who in another cell has a model's files."""
    found = decode(message, FilesFound)
    _number("the number of sources", len(found.sources), 0, SOURCES_MAX)
    for address in found.sources:
        _address(address)
    return found


def _cell(cell: str) -> None:
    if not _CELL.fullmatch(cell):
        raise _refusal("a cell's name of 1 to 32 letters, digits, dashes", cell)


def store_announced(subject: str, message: bytes) -> StoreAnnounced:
    """A store's announcement."""
    _size("a store's announcement", message, STORE_MAX_BYTES)
    announced = decode(message, StoreAnnounced)
    _address(announced.address)
    sent_by(subject, announced.address.node)
    _number("the number of models", len(announced.models), 0, MODELS_MAX)
    for entry in announced.models:
        _entry(entry)
    return announced


def _entry(entry: ModelEntry) -> None:
    _id("a model digest", entry.model)
    _text("a model name", entry.name, NAME_MAX_CHARS)
    _number("manifest_bytes", entry.manifest_bytes, 1, MANIFEST_MAX_BYTES)
    config = entry.config
    _number("layer_count", config.layer_count, 1, LAYERS_MAX)
    for size in (config.hidden_size, config.kv_head_count, config.head_dim, config.context_length):
        _number("a size of the model", size, 1, CONTEXT_MAX_TOKENS)
    embedding, head, layers = entry.weights_bytes
    if len(layers) != config.layer_count:
        raise _refusal(f"weights of {config.layer_count} layers", f"{len(layers)}")
    for size in (embedding, head, *layers):
        _number("weights_bytes", size, 0, MEMORY_MAX_BYTES)


def gateway_report(subject: str, message: bytes) -> GatewayReport:
    """A gateway's figures."""
    _size("a gateway's report", message, GATEWAY_MAX_BYTES)
    report = decode(message, GatewayReport)
    _id("a gateway id", report.gateway)
    sent_by(subject, report.gateway)
    _text("a url", report.url, TEXT_MAX_CHARS)
    _number("sessions", report.sessions, 0, SESSIONS_MAX)
    _number("tokens_per_s", report.tokens_per_s, 0, ROWS_PER_S_MAX)
    _number("the number of chains", len(report.chains), 0, SESSIONS_MAX)
    return report


def _size(what: str, message: bytes, bytes_max: int) -> None:
    if len(message) > bytes_max:
        raise _refusal(f"{what} of up to {bytes_max} bytes", f"{len(message)}")


def _address(address: PeerAddress) -> None:
    _id("an address with a node id", address.node)
    _number("the number of endpoints", len(address.endpoints), 0, ENDPOINTS_MAX)
    for endpoint in address.endpoints:
        _text("an endpoint", endpoint, NAME_MAX_CHARS)


def _id(what: str, value: str) -> None:
    if not _is_id(value):
        raise _refusal(f"{what} of {ID_CHARS} hex digits", value)


def _is_id(value: str) -> bool:
    return len(value) == ID_CHARS and _is_hex(value)


@lru_cache(maxsize=IDS_KEPT_MAX)
def _is_hex(value: str) -> bool:
    """A fleet's ids come again in every heartbeat. Only what has an id's length gets here and is kept."""
    return bool(_HEX.fullmatch(value))


def _number(what: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # false for what is not a number, too
        raise _refusal(f"{what} from {least:g} to {most:g}", f"{value!r}")


def _text(what: str, value: str, chars_max: int) -> None:
    if len(value) > chars_max or not value.isprintable():
        raise _refusal(f"{what} of up to {chars_max} printable characters", value)


def _refusal(expected: str, came: str) -> BusMessageError:
    return BusMessageError(f"expected {expected}, got {came[:80]!r}")
