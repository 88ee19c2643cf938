"""Decodes bus messages and refuses those that cannot be true. Parse at the edge once; inside, messages are trusted.

Everything raises `BusMessageError`, with what was expected and what came. A node can still lie about its speed within
reason; such a lie costs it and its sessions, not the coordinator.
"""

import math
import re
from typing import TypeVar

import msgspec

from fallow.domain.errors import BusMessageError
from fallow.domain.fleet import (
    GatewayReport,
    Heartbeat,
    HostedStage,
    ModelEntry,
    NodeLeaving,
    RouteRequest,
    Speed,
    StoreAnnounced,
)
from fallow.domain.frames import PeerAddress
from fallow.domain.model import StageSpec

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
EXCLUDED_MAX = 1024
MODELS_MAX = 256
ENDPOINTS_MAX = 16
MANIFEST_MAX_BYTES = 32 << 20

_ID = re.compile(r"[0-9a-f]{64}")
_SESSION = re.compile(r"[0-9a-f]{32}")
_T = TypeVar("_T")


def decode(message: bytes, kind: type[_T]) -> _T:
    """A bus message as `kind`."""
    try:
        return msgspec.json.decode(message, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BusMessageError(f"expected a {kind.__name__}: {error}") from error


def heartbeat(subject: str, message: bytes) -> Heartbeat:
    """A heartbeat that came on `subject`, which names its sender."""
    beat = decode(message, Heartbeat)
    _require(bool(_ID.fullmatch(beat.node)), "a node id of 64 hex digits", beat.node)
    _require(subject.split(".")[-2:-1] == [beat.node], f"a heartbeat of the subject's node ({subject})", beat.node)
    _require(beat.address.node == beat.node, "the sender's own address", beat.address.node)
    _address(beat.address)
    _text("a name", beat.name, NAME_MAX_CHARS)
    _text("a boot id", beat.boot, NAME_MAX_CHARS)
    _text("a version", beat.version, NAME_MAX_CHARS)
    _number("a sequence number", beat.sequence, 0, 1 << 62)
    _number("memory_bytes", beat.memory_bytes, 0, MEMORY_MAX_BYTES)
    _number("kv_budget_bytes", beat.kv_budget_bytes, 0, beat.memory_bytes)
    _number("kv_free_bytes", beat.kv_free_bytes, 0, MEMORY_MAX_BYTES)
    _number("session_count", beat.session_count, 0, SESSIONS_MAX)
    _number("tokens_per_s", beat.tokens_per_s, 0, ROWS_PER_S_MAX)
    _number("the number of links", len(beat.link_rtt_s), 0, LINKS_MAX)
    for rtt in beat.link_rtt_s.values():
        _number("a round trip", rtt, 0, RTT_MAX_S)
    _number("the number of stages", len(beat.hosted), 0, HOSTED_MAX)
    for hosted in beat.hosted:
        _hosted(hosted)
    return beat


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
    _require(bool(_ID.fullmatch(stage.model)), "a model digest of 64 hex digits", stage.model)
    edge = 0
    for piece in stage.pieces:
        ordered = edge <= piece.first < piece.last <= LAYERS_MAX
        _require(ordered, f"ascending pieces of at most {LAYERS_MAX} layers", str(piece))
        edge = piece.last
    _require(bool(stage.pieces), "a stage with pieces", "none")


def leaving(message: bytes) -> NodeLeaving:
    return decode(message, NodeLeaving)


def route_request(message: bytes) -> RouteRequest:
    """A request for a chain."""
    request = decode(message, RouteRequest)
    _require(bool(_SESSION.fullmatch(request.session)), "a session id of 32 hex digits", request.session)
    _number("reserve_tokens", request.reserve_tokens, 1, CONTEXT_MAX_TOKENS)
    _number("the number of hops to keep", len(request.keep), 0, HOPS_MAX)
    _number("the number of nodes to exclude", len(request.exclude), 0, EXCLUDED_MAX)
    for hop in request.keep:
        _address(hop.address)
        _number("a kept hop's first layer", hop.span.first, 0, LAYERS_MAX)
        _number("a kept hop's last layer", hop.span.last, hop.span.first + 1, LAYERS_MAX)
    return request


def store_announced(message: bytes) -> StoreAnnounced:
    """A store's announcement."""
    announced = decode(message, StoreAnnounced)
    _address(announced.address)
    _number("the number of models", len(announced.models), 0, MODELS_MAX)
    for entry in announced.models:
        _entry(entry)
    return announced


def _entry(entry: ModelEntry) -> None:
    _require(bool(_ID.fullmatch(entry.model)), "a model digest of 64 hex digits", entry.model)
    _text("a model name", entry.name, NAME_MAX_CHARS)
    _number("manifest_bytes", entry.manifest_bytes, 1, MANIFEST_MAX_BYTES)
    config = entry.config
    _number("layer_count", config.layer_count, 1, LAYERS_MAX)
    for size in (config.hidden_size, config.kv_head_count, config.head_dim, config.context_length):
        _number("a size of the model", size, 1, CONTEXT_MAX_TOKENS)
    embedding, head, layers = entry.weights_bytes
    _require(len(layers) == config.layer_count, f"weights of {config.layer_count} layers", f"{len(layers)}")
    for size in (embedding, head, *layers):
        _number("weights_bytes", size, 0, MEMORY_MAX_BYTES)


def gateway_report(message: bytes) -> GatewayReport:
    """A gateway's figures."""
    report = decode(message, GatewayReport)
    _require(bool(_ID.fullmatch(report.gateway)), "a gateway id of 64 hex digits", report.gateway)
    _text("a url", report.url, TEXT_MAX_CHARS)
    _number("sessions", report.sessions, 0, SESSIONS_MAX)
    _number("tokens_per_s", report.tokens_per_s, 0, ROWS_PER_S_MAX)
    _number("the number of chains", len(report.chains), 0, SESSIONS_MAX)
    return report


def _address(address: PeerAddress) -> None:
    _require(bool(_ID.fullmatch(address.node)), "an address with a node id of 64 hex digits", address.node)
    _number("the number of endpoints", len(address.endpoints), 0, ENDPOINTS_MAX)
    for endpoint in address.endpoints:
        _text("an endpoint", endpoint, NAME_MAX_CHARS)


def _number(what: str, value: float, least: float, most: float) -> None:
    _require(math.isfinite(value) and least <= value <= most, f"{what} from {least:g} to {most:g}", f"{value!r}")


def _text(what: str, value: str, chars_max: int) -> None:
    _require(
        len(value) <= chars_max and value.isprintable(), f"{what} of up to {chars_max} printable characters", value
    )


def _require(holds: bool, expected: str, came: str) -> None:
    if not holds:
        raise BusMessageError(f"expected {expected}, got {came[:80]!r}")
