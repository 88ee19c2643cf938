"""What an agent and its worker process say to each other over a socket pair.

A frame is two little-endian uint32 (header length, payload length), a msgpack header and a raw payload. Requests carry
a ticket; every request is answered once, by its ticket, in any order. `Beat` answers nothing: it says that the worker
is alive while a long step goes on. Nothing is pickled; each side decodes only the other's message types.
"""

import struct
from collections.abc import Iterator
from typing import Annotated, Generic, TypeVar

import msgspec

from fallow.domain.errors import EngineError, FrameError
from fallow.domain.frames import MAX_FRAME_BYTES, Phase
from fallow.domain.ids import Digest, SessionId
from fallow.domain.model import Manifest, Span, StageSpec
from fallow.engine.contract import Drawn, Loaded, Step, Stepped

PREFIX = struct.Struct("<II")
MAX_HEADER_BYTES = 64 << 20
"""A load carries a manifest with the digest of every chunk of every file: 64 MiB is 500 GB of weights."""
MAX_PAYLOAD_BYTES = MAX_FRAME_BYTES
Token = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
"""As rows carry it: an int32."""

Payload = bytes | bytearray | memoryview


class Request(msgspec.Struct, frozen=True, tag_field="kind", array_like=True):
    """Base of what the agent asks; the ticket comes back in the reply."""

    ticket: int


class Load(Request, frozen=True, tag="load"):
    """Build a stage from local files, by digest."""

    stage: StageSpec
    manifest: Manifest
    files: dict[Digest, str]


class Unload(Request, frozen=True, tag="unload"):
    """Let go of a model and its sessions."""

    model: Digest


class Open(Request, frozen=True, tag="open"):
    """Admit a session at position 0."""

    session: SessionId
    model: Digest
    span: Span
    reserve_tokens: int


class Reserve(Request, frozen=True, tag="reserve"):
    """Grow a session's reservation."""

    session: SessionId
    reserve_tokens: int


class Run(Request, frozen=True, tag="run"):
    """A `contract.Step`; its rows are the payload."""

    session: SessionId
    position: int
    count: int
    phase: Phase
    logits_from: int
    top_k: int | None
    drawn: Drawn | None = None


class Rewind(Request, frozen=True, tag="rewind"):
    """Forget a session's rows at and above a position."""

    session: SessionId
    position: int


class Free(Request, frozen=True, tag="free"):
    """End a session."""

    session: SessionId


class Check(Request, frozen=True, tag="check"):
    """Ask every canary and hash every file now."""


AnyRequest = Load | Unload | Open | Reserve | Run | Rewind | Free | Check


class Reply(msgspec.Struct, frozen=True, tag_field="kind", array_like=True):
    """Base of what the worker answers."""


class Ready(Reply, frozen=True, tag="ready"):
    """The worker's first words."""

    kv_free_bytes: int


class Done(Reply, frozen=True, tag="done"):
    """A request was carried out; how busy the worker is now."""

    ticket: int
    sessions: int
    kv_free_bytes: int
    loaded: Loaded | None = None
    complaint: str | None = None
    """What a `Check` found."""


class Computed(Reply, frozen=True, tag="computed"):
    """A `contract.Stepped`; its rows or log-probabilities are the payload."""

    ticket: int
    logit_count: int
    k: int | None
    compute_s: float
    drawn: Token | None = None


class Failed(Reply, frozen=True, tag="failed"):
    """A request was refused or failed; `code` is that of a `FallowError`."""

    ticket: int
    code: str
    message: str


class Beat(Reply, frozen=True, tag="beat"):
    """Still computing."""


class Broken(Reply, frozen=True, tag="broken"):
    """What is hosted here has changed since it was loaded: nothing of this process may be believed any more."""

    reason: str


AnyReply = Ready | Done | Computed | Failed | Beat | Broken

_ENCODER = msgspec.msgpack.Encoder()
REQUESTS: msgspec.msgpack.Decoder[AnyRequest] = msgspec.msgpack.Decoder(AnyRequest)
REPLIES: msgspec.msgpack.Decoder[AnyReply] = msgspec.msgpack.Decoder(AnyReply)

Message = TypeVar("Message")


def encode(header: AnyRequest | AnyReply, payload: Payload = b"") -> tuple[bytes, Payload]:
    """Prefix and header in one, and the payload as it is. Raises `EngineError` when the payload is too large."""
    size = memoryview(payload).nbytes
    if size > MAX_PAYLOAD_BYTES:
        raise EngineError(f"a step's rows are at most {MAX_PAYLOAD_BYTES} bytes, not {size}")
    encoded = _ENCODER.encode(header)
    return PREFIX.pack(len(encoded), size) + encoded, payload


class Frames(Generic[Message]):
    """Bytes to frames. Payloads are views of what was fed, or copies when a frame came in parts."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[Message]) -> None:
        self._decoder = decoder
        self._held = bytearray()

    def feed(self, received: bytes) -> Iterator[tuple[Message, memoryview]]:
        """The frames that are complete now. Raises `FrameError` for lengths or headers that cannot be."""
        data = memoryview(received)
        if self._held:
            self._held += received
            if len(self._held) < self._wanted(memoryview(self._held)):
                return
            data = memoryview(bytes(self._held))
            self._held = bytearray()
        at = 0
        while True:
            rest = data[at:]
            size = self._wanted(rest)
            if len(rest) < size:
                self._held += rest
                return
            header_size, payload_size = PREFIX.unpack_from(rest)
            start = PREFIX.size + header_size
            yield self._decode(rest[PREFIX.size : start]), rest[start : start + payload_size]
            at += size

    def _wanted(self, data: memoryview) -> int:
        if len(data) < PREFIX.size:
            return PREFIX.size
        header_size, payload_size = PREFIX.unpack_from(data)
        if header_size > MAX_HEADER_BYTES or payload_size > MAX_PAYLOAD_BYTES:
            raise FrameError(f"engine frame: a header of {header_size} and a payload of {payload_size} bytes")
        return PREFIX.size + int(header_size) + int(payload_size)

    def _decode(self, header: memoryview) -> Message:
        try:
            return self._decoder.decode(header)
        except msgspec.DecodeError as error:
            raise FrameError(f"engine frame: {error}") from error


def run_request(ticket: int, step: Step) -> Run:
    return Run(ticket, step.session, step.position, step.count, step.phase, step.logits_from, step.top_k, step.drawn)


def step_of(run: Run, payload: Payload) -> Step:
    return Step(
        session=run.session,
        position=run.position,
        count=run.count,
        phase=run.phase,
        logits_from=run.logits_from,
        top_k=run.top_k,
        payload=payload,
        drawn=run.drawn,
    )


def stepped_of(computed: Computed, payload: Payload) -> Stepped:
    return Stepped(
        payload=payload,
        logit_count=computed.logit_count,
        k=computed.k,
        compute_s=computed.compute_s,
        drawn=computed.drawn,
    )


def computed_of(ticket: int, stepped: Stepped) -> Computed:
    return Computed(ticket, stepped.logit_count, stepped.k, stepped.compute_s, stepped.drawn)
