"""The frame codec: `Frame` to bytes and back.

Wire form: u32 total length (of the whole frame, this field included) | u32 header length | header | payload. Lengths
are little-endian. The header is a msgpack map with its kind under `kind`; the payload is raw bytes.

Rules
- The decoder is fed whatever the transport delivered and returns whole frames. A truncated frame is never returned.
- Every violation is a `FrameError` that says what was expected and what came. After one, the stream has no frame
  boundaries any more: the decoder stays failed.
- Ranges and id formats are checked here, once (`frame_checks.py`). Fields that this version does not know are ignored;
  kinds that it does not know are refused by name.
- A declared length allocates nothing: memory grows with the bytes that really came.
- Not here: whether a payload has the size that its rows need. Only the stage knows the model's width.
"""

from struct import Struct
from typing import Final, get_args

import msgspec

from fallow.domain.errors import FrameError
from fallow.domain.frames import MAX_FRAME_BYTES, MAX_HEADER_BYTES, AnyHeader, Frame
from fallow.fabric.frame_checks import check_header, shortened

Buffer = bytes | bytearray | memoryview

PREFIX_BYTES: Final = 8
COPY_PAYLOAD_BYTES: Final = 16 * 1024
"""Smaller payloads are copied out of the read buffer, so that a kept row never keeps a whole read alive."""

_PREFIX = Struct("<II")
_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[AnyHeader] = msgspec.msgpack.Decoder(AnyHeader)
_KINDS: Final[dict[str, type]] = {str(kind.__struct_config__.tag): kind for kind in get_args(AnyHeader)}


# --- encoding -----------------------------------------------------------------------------------


def encode_parts(frame: Frame) -> tuple[bytes, Buffer]:
    """Prefix with header, and the payload as it is (not copied). Raises `FrameError` for what a peer would refuse."""
    header = _ENCODER.encode(frame.header)
    payload = frame.payload
    payload_bytes = payload.nbytes if type(payload) is memoryview else len(payload)
    total = PREFIX_BYTES + len(header) + payload_bytes
    if total > MAX_FRAME_BYTES or len(header) > MAX_HEADER_BYTES:
        raise FrameError(
            f"frame too large: at most {MAX_HEADER_BYTES} header and {MAX_FRAME_BYTES} bytes in all, "
            f"got {len(header)} and {total}"
        )
    if payload_bytes and not frame.header.has_payload:
        raise FrameError(f"{type(frame.header).__name__} carries no payload, got {payload_bytes} bytes")
    return _PREFIX.pack(total, len(header)) + header, payload


def encode(frame: Frame) -> bytes:
    """The frame as one `bytes`. Raises `FrameError` for what a peer would refuse."""
    head, payload = encode_parts(frame)
    return b"".join((head, payload)) if len(payload) else head


# --- decoding -----------------------------------------------------------------------------------


class FrameDecoder:
    """Turns a byte stream into frames. One per link and direction.

    `feed` returns the frames that became whole. When garbage follows good frames in one piece of data, the good ones
    are returned and `failure` is set; the next `feed` raises it.
    """

    __slots__ = ("_buffer", "_expected", "failure")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._expected: tuple[int, int] | None = None
        """Total and header length of the frame that the buffer starts with, once known."""
        self.failure: FrameError | None = None

    @property
    def pending_bytes(self) -> int:
        """Bytes held of a frame that is not whole yet."""
        return len(self._buffer)

    def feed(self, data: Buffer) -> list[Frame]:
        """Take bytes, return whole frames in order. Raises `FrameError` when the first thing in `data` is garbage."""
        if self.failure is not None:
            raise self.failure
        frames: list[Frame] = []
        try:
            offset = self._fill(data, frames) if self._buffer else 0
            self._slice(data, offset, frames)
        except FrameError as failure:
            self.failure = failure
            self._buffer = bytearray()
            if not frames:
                raise
        return frames

    def finish(self) -> None:
        """The stream ended. Raises `FrameError` when it ended inside a frame."""
        if self._buffer and self.failure is None:
            wanted = self._expected[0] if self._expected else PREFIX_BYTES
            self.failure = FrameError(f"stream ended inside a frame: {len(self._buffer)} of {wanted} bytes came")
            raise self.failure

    def _fill(self, data: Buffer, frames: list[Frame]) -> int:
        """Complete the frame in the buffer. Returns how much of `data` that took."""
        buffer = self._buffer
        offset = 0
        if self._expected is None:
            offset = min(PREFIX_BYTES - len(buffer), len(data))
            buffer += memoryview(data)[:offset]
            if len(buffer) < PREFIX_BYTES:
                return offset
            self._expected = _lengths(buffer, 0)
        total, header_bytes = self._expected
        end = min(offset + total - len(buffer), len(data))
        buffer += memoryview(data)[offset:end]
        if len(buffer) == total:
            self._buffer, self._expected = bytearray(), None
            view = memoryview(buffer)
            header = _parse(view[PREFIX_BYTES : PREFIX_BYTES + header_bytes])
            body = view[PREFIX_BYTES + header_bytes :]
            frames.append(_checked(header, body if len(body) >= COPY_PAYLOAD_BYTES else bytes(body)))
        return end

    def _slice(self, data: Buffer, offset: int, frames: list[Frame]) -> None:
        """Cut whole frames out of `data` from `offset`; keep the rest."""
        size = len(data)
        view = memoryview(data)
        while size - offset >= PREFIX_BYTES:
            total, header_bytes = _lengths(data, offset)
            end = offset + total
            if end > size:
                self._expected = (total, header_bytes)
                break
            body = offset + PREFIX_BYTES + header_bytes
            header = _parse(view[offset + PREFIX_BYTES : body])
            # A view keeps the whole read alive: fine when the payload is most of it, wasteful otherwise.
            whole = end - body >= COPY_PAYLOAD_BYTES and 2 * (end - body) >= size and type(data) is bytes
            frames.append(_checked(header, view[body:end] if whole else bytes(view[body:end])))
            offset = end
        if offset < size:
            self._buffer += view[offset:]


def _lengths(data: Buffer, offset: int) -> tuple[int, int]:
    total, header_bytes = _PREFIX.unpack_from(data, offset)
    if total > MAX_FRAME_BYTES:
        raise FrameError(f"frame too large: at most {MAX_FRAME_BYTES} bytes, {total} declared")
    if header_bytes > MAX_HEADER_BYTES:
        raise FrameError(f"header too large: at most {MAX_HEADER_BYTES} bytes, {header_bytes} declared")
    if not 0 < header_bytes <= total - PREFIX_BYTES:
        raise FrameError(f"expected a header inside the frame, got {header_bytes} header bytes in a frame of {total}")
    return total, header_bytes


def _parse(data: memoryview) -> AnyHeader:
    try:
        return _DECODER.decode(data)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise FrameError(_explain(data, error)) from None


class _Kind(msgspec.Struct):
    kind: str


def _explain(data: memoryview, error: Exception) -> str:
    try:
        kind = msgspec.msgpack.decode(data, type=_Kind).kind
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return f"expected a msgpack map with a kind: {shortened(str(error))}"
    if kind not in _KINDS:
        return f"unknown frame kind {shortened(kind)}; known are {', '.join(sorted(_KINDS))}"
    return f"bad {kind} header: {shortened(str(error))}"


def _checked(header: AnyHeader, payload: Buffer) -> Frame:
    check_header(header, len(payload))
    return Frame(header, payload)
