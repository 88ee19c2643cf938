"""What every header field may hold, checked once at the edge so that what is behind the codec trusts its types.

Rules
- A field has one meaning wherever it appears, so the table is by field name; each kind's checks are looked up once,
  at import. A field that is missing there gets the widest check of its type; a test asks for a proper one.
- A violation is a `FrameError` with the kind, the field, what was expected and what came.
- Not here: relations that need the model or the session, such as a payload's size.
"""

import math
import re
from collections.abc import Callable
from typing import Any, Final, get_args

import msgspec

from fallow.domain.errors import FrameError
from fallow.domain.frames import (
    MAX_ROWS_PER_FRAME,
    Ahead,
    AnyHeader,
    Chunk,
    Header,
    Hello,
    PeerAddress,
    Result,
)
from fallow.domain.model import Span
from fallow.domain.sampling import Recipe

MAX_POSITION: Final = (1 << 31) - 1
"""Positions are int32 in the engine's tensors; a frame's last row must fit as well."""
MAX_EPOCH: Final = (1 << 53) - 1
MAX_NONCE: Final = (1 << 64) - 1
MAX_TOP_K: Final = 1024
MAX_LAYERS: Final = 4096
MAX_VERSION: Final = (1 << 16) - 1
MAX_ENDPOINTS: Final = 16
MAX_ENDS: Final = 64
MAX_ENDPOINT_CHARS: Final = 256
MAX_CAPABILITIES: Final = 64
MAX_NAME_CHARS: Final = 64
MAX_MESSAGE_CHARS: Final = 4096
MAX_PASSPORT_CHARS: Final = 4096
MAX_GRANT_BYTES: Final = 8192
"""An envelope, and the passport of who signed it."""

Expectation = str
"""What was expected; a check returns it when the value is not that, and `None` when all is well."""
Check = Callable[[Any], Expectation | None]


def _within(low: int, high: int) -> Check:
    def check(value: int) -> Expectation | None:
        return None if low <= value <= high else f"{low} to {high}"

    return check


def _hex(digits: int) -> Check:
    matches = re.compile(rf"[0-9a-f]{{{digits}}}").fullmatch

    def check(value: str) -> Expectation | None:
        return None if matches(value) else f"{digits} lower-case hex digits"

    return check


def _text(chars_max: int) -> Check:
    def check(value: str) -> Expectation | None:
        return None if len(value) <= chars_max else f"at most {chars_max} characters"

    return check


def _octets(bytes_max: int) -> Check:
    def check(value: bytes) -> Expectation | None:
        return None if len(value) <= bytes_max else f"at most {bytes_max} bytes"

    return check


def _texts(count_max: int, chars_max: int) -> Check:
    def check(values: tuple[str, ...]) -> Expectation | None:
        if len(values) <= count_max and all(len(value) <= chars_max for value in values):
            return None
        return f"at most {count_max} of at most {chars_max} characters"

    return check


def _optional(inner: Check) -> Check:
    def check(value: object) -> Expectation | None:
        return None if value is None else inner(value)

    return check


def _span(value: Span) -> Expectation | None:
    return None if 0 <= value.first < value.last <= MAX_LAYERS else f"0 <= first < last <= {MAX_LAYERS}"


_node = _hex(64)
_endpoints = _texts(MAX_ENDPOINTS, MAX_ENDPOINT_CHARS)


def _address(value: PeerAddress) -> Expectation | None:
    return _node(value.node) or _endpoints(value.endpoints)


def _recipe(value: Recipe) -> Expectation | None:
    if not (0 <= value.temperature < math.inf and 0 <= value.top_p <= 1 and 0 <= value.min_p <= 1):
        return "a temperature of 0 or more, and shares"
    return _top_k(value.top_k) or _within(0, MAX_NONCE)(value.seed) or _within(0, MAX_POSITION)(value.index)


def _ahead(value: Ahead) -> Expectation | None:
    if len(value.ends) > MAX_ENDS or any(not 0 <= token <= MAX_POSITION for token in value.ends):
        return f"at most {MAX_ENDS} tokens that end an answer"
    return (
        _address(value.first)
        or _hex(32)(value.first_session)
        or _recipe(value.recipe)
        or _position(value.drawn_from)
        or _position(value.until)
    )


_position = _within(0, MAX_POSITION - MAX_ROWS_PER_FRAME)
_version = _within(0, MAX_VERSION)
_top_k = _optional(_within(1, MAX_TOP_K))
_name = _text(MAX_NAME_CHARS)

_FIELDS: Final[dict[str, Check]] = {
    "version_min": _version,
    "version_max": _version,
    "capabilities": _texts(MAX_CAPABILITIES, MAX_NAME_CHARS),
    "role": _name,
    "passport": _text(MAX_PASSPORT_CHARS),
    "nonce": _within(0, MAX_NONCE),
    "code": _name,
    "message": _text(MAX_MESSAGE_CHARS),
    "session": _hex(32),
    "epoch": _within(0, MAX_EPOCH),
    "model": _hex(64),
    "span": _span,
    "grant": _octets(MAX_GRANT_BYTES),
    "reserve_tokens": _within(0, MAX_POSITION),
    "position": _position,
    "log_start": _position,
    "flowed_epoch": _within(0, MAX_EPOCH),
    "previous": _optional(_node),
    "next": _optional(_address),
    "next_session": _optional(_hex(32)),
    "forward_from": _position,
    "results_from": _position,
    "rewind_to": _optional(_position),
    "ahead": _optional(_ahead),
    "ahead_from": _optional(_node),
    "confirmed": _optional(_position),
    "void_from": _optional(_position),
    "chosen": _optional(_within(0, MAX_POSITION)),
    "count": _within(1, MAX_ROWS_PER_FRAME),
    "logits_from": _within(0, MAX_POSITION),
    "top_k": _top_k,
    "logit_count": _within(0, MAX_ROWS_PER_FRAME),
    "k": _top_k,
    "suspect": _optional(_node),
    "digest": _hex(64),
    "index": _within(0, MAX_POSITION),
}
_CLOSED: Final = {"found", "phase"}
"""Booleans and enums: their types are their ranges."""


def _anything_bounded(value: object) -> Expectation | None:
    if isinstance(value, int):
        return _within(0, MAX_NONCE)(value)
    return _text(MAX_MESSAGE_CHARS)(value) if isinstance(value, str) else None


def _checks_of(kind: type[Header]) -> tuple[tuple[str, Check], ...]:
    return tuple((name, _FIELDS.get(name, _anything_bounded)) for name in kind.__struct_fields__ if name not in _CLOSED)


_CHECKS: Final[dict[type, tuple[tuple[str, Check], ...]]] = {kind: _checks_of(kind) for kind in get_args(AnyHeader)}


def fields_without_check() -> set[str]:
    """Names that the table above lacks."""
    named = {name for kind in get_args(AnyHeader) for name in kind.__struct_fields__}
    return named - set(_FIELDS) - _CLOSED


def check_header(header: AnyHeader, payload_bytes: int) -> None:
    """Raise `FrameError` unless every field is in range and the payload is one that the kind may have."""
    for name, check in _CHECKS[type(header)]:
        expected = check(getattr(header, name))
        if expected is not None:
            raise FrameError(
                f"{type(header).__name__}.{name}: expected {expected}, got {shortened(getattr(header, name))}"
            )
    if payload_bytes and not header.has_payload:
        raise FrameError(f"{type(header).__name__} carries no payload, got {payload_bytes} bytes")
    relation = _RELATIONS.get(type(header))
    if relation is not None:
        relation(header, payload_bytes)


def _hello(header: Hello, payload_bytes: int) -> None:
    if header.version_min > header.version_max:
        raise FrameError(f"Hello: expected version_min <= version_max, got {header.version_min}, {header.version_max}")


def _result(header: Result, payload_bytes: int) -> None:
    if header.logit_count > header.count:
        raise FrameError(f"Result: expected logit_count <= count, got {header.logit_count} of {header.count}")


def _chunk(header: Chunk, payload_bytes: int) -> None:
    if payload_bytes and not header.found:
        raise FrameError(f"Chunk: expected no payload when not found, got {payload_bytes} bytes")


_RELATIONS: Final[dict[type[Header], Callable[[Any, int], None]]] = {Hello: _hello, Result: _result, Chunk: _chunk}


def shortened(value: object) -> str:
    """A hostile value, fit for an error message."""
    text = value if isinstance(value, str) else str(msgspec.to_builtins(value))
    text = repr(text) if isinstance(value, str) else text
    return text if len(text) <= 200 else text[:200] + "…"
