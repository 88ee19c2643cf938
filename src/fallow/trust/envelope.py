"""Signed documents: a body, what kind of document it is, and who signed both.

Rules
- What is signed is DSSE's pre-authentication encoding of kind and body (Dead Simple Signing Envelope, v1), so that a
  document of one kind can never pass for one of another, and no parser runs before the signature was checked.
- The body is JSON of a frozen struct; the signature covers its bytes as they came.
- Whether the signer may say what the body says is its reader's question.
"""

from enum import StrEnum
from typing import TypeVar

import msgspec

from fallow.domain.errors import SignatureInvalid
from fallow.domain.ids import NodeId
from fallow.trust.keys import Identity, verify

ENVELOPE_MAX_BYTES = 256 * 1024

T = TypeVar("T")


class Kind(StrEnum):
    """What a signed document is."""

    GRANT = "fallow/grant"
    LEADER = "fallow/leader"
    ORDER = "fallow/order"
    DIGEST = "fallow/digest"
    """What a cell tells others of itself."""
    QUESTION = "fallow/question"
    """What a cell asks of another."""
    HALT = "fallow/halt"
    REVOCATIONS = "fallow/revocations"
    REQUEST = "fallow/request"
    CONSENT = "fallow/consent"
    RELAY = "fallow/relay"
    MEMBER = "fallow/member"
    """Who would like to sit on the council."""


class Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """As it travels, in MessagePack."""

    kind: str
    body: bytes
    signer: NodeId
    signature: bytes


def pre_authentication(kind: str, body: bytes) -> bytes:
    """The bytes that are signed: DSSE's `PAE(type, body)`."""
    name = kind.encode()
    return b"DSSEv1 %d %b %d %b" % (len(name), name, len(body), body)


def seal(kind: Kind, body: msgspec.Struct, signer: Identity) -> bytes:
    """An encoded envelope of a struct."""
    encoded = msgspec.json.encode(body)
    signature = signer.sign(pre_authentication(kind, encoded))
    return msgspec.msgpack.encode(Envelope(kind, encoded, signer.node, signature))


def unseal(kind: Kind, type_: type[T], envelope: bytes) -> tuple[T, NodeId]:
    """The struct in an envelope, and who signed it. Raises `SignatureInvalid` for all but that kind, well signed."""
    if len(envelope) > ENVELOPE_MAX_BYTES:
        raise SignatureInvalid(f"expected an envelope of up to {ENVELOPE_MAX_BYTES} bytes, got {len(envelope)}")
    try:
        read = msgspec.msgpack.decode(envelope, type=Envelope)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SignatureInvalid(f"expected a signed {kind}, got what cannot be read: {error}") from None
    if read.kind != kind:
        raise SignatureInvalid(f"expected a signed {kind}, got a {read.kind[:40]!r}")
    verify(read.signer, read.signature, pre_authentication(read.kind, read.body))
    try:
        return msgspec.json.decode(read.body, type=type_), read.signer
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SignatureInvalid(f"a well signed {kind} that cannot be read: {error}") from None
