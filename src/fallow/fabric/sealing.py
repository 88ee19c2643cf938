"""The relay's handshake and seal: what lets a link cross a bus that nobody trusts. Pure: bytes in, bytes out.

The construction, of known parts, all of them from the `cryptography` library:

    dialler  -> listener:  DIAL     link id | both NodeIds | a fresh X25519 key             | signature
    listener -> dialler:   ANSWER   link id | a fresh X25519 key | a secret, sealed to the dialler's | signature
    dialler  -> listener:  CONFIRM  link id | a secret, sealed to the listener's                     | signature

- The pattern is that of a mutually signed key exchange (ISO/IEC 9798-3; SIGMA and TLS 1.3 sign a transcript likewise):
  each signature (Ed25519, the device's identity) covers its own purpose, the cell, and every byte sent so far, so both
  NodeIds, the link id and both fresh keys. A recorded message fits no other exchange, and no other place in its own.
- Secrets are carried by HPKE (RFC 9180, base mode, X25519 / HKDF-SHA256 / ChaCha20-Poly1305), 32 bytes each way, with
  purpose and transcript as `info`. Both are needed, so either side's randomness suffices. The X25519 keys are used once
  and forgotten: a device key that is stolen later opens no recorded link.
- One key for each direction comes from both secrets by HKDF-SHA256 (RFC 5869), salted with the hash of the transcript.
- Records are sealed with ChaCha20-Poly1305, the nonce counting from 0, as in TLS 1.3. A record opens only as the next
  one of its link and direction: what was altered, replayed, reordered, mixed in from another link, or follows one that
  was dropped, is a `SealBroken`. The end of a link is a record as well (`sealed_link.py`).

What it does not give. The bus sees who talks with whom, when, how often, and how long records are (nothing is padded).
It can refuse to carry anything: then nothing arrives, and silence is noticed by pings. It is not secure against quantum
computers. Who may open a link at all is decided elsewhere (`Peers`, grants).
"""

import secrets
from enum import IntEnum
from struct import Struct
from typing import Final

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fallow.domain.errors import SealBroken
from fallow.domain.ids import NodeId
from fallow.fabric.codec import Buffer
from fallow.fabric.local_handshake import Identity

VERSION: Final = 1
"""First byte of every message, and part of what is signed."""
LINK_ID_BYTES: Final = 16
KEY_BYTES: Final = 32
SECRET_BYTES: Final = 32
SEALED_SECRET_BYTES: Final = KEY_BYTES + SECRET_BYTES + 16
SIGNATURE_BYTES: Final = 64
TAG_BYTES: Final = 16
RECORDS_MAX: Final = 1 << 32
"""In one direction of one link; then the link must be opened anew. Days of decoding."""
CELL_BYTES_MAX: Final = 255

_SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
_HEAD: Final = Struct(f">BB{LINK_ID_BYTES}s")
_RECORD_HEAD: Final = Struct(f">BB{LINK_ID_BYTES}sQ")
HEAD_BYTES: Final = _HEAD.size
RECORD_OVERHEAD_BYTES: Final = _RECORD_HEAD.size + TAG_BYTES
_DIAL_BYTES: Final = HEAD_BYTES + 3 * KEY_BYTES + SIGNATURE_BYTES
_ANSWER_BYTES: Final = HEAD_BYTES + KEY_BYTES + SEALED_SECRET_BYTES + SIGNATURE_BYTES
_CONFIRM_BYTES: Final = HEAD_BYTES + SEALED_SECRET_BYTES + SIGNATURE_BYTES


class Kind(IntEnum):
    """Second byte of every message."""

    DIAL = 1
    ANSWER = 2
    CONFIRM = 3
    RECORD = 4
    BUSY = 5
    """Instead of an `ANSWER`. Not signed: whoever could forge it could as well keep the answer back."""


class Head:
    """What the bus can read of a message."""

    __slots__ = ("kind", "link_id")

    def __init__(self, kind: Kind, link_id: bytes) -> None:
        self.kind = kind
        self.link_id = link_id


def parse_head(message: Buffer) -> Head:
    """Kind and link of a message. Raises `SealBroken` for what is no relay message of this version."""
    if len(message) < HEAD_BYTES:
        raise SealBroken(f"expected a relay message of at least {HEAD_BYTES} bytes, got {len(message)}")
    version, kind, link_id = _HEAD.unpack_from(message)
    if version != VERSION:
        raise SealBroken(f"expected relay messages of version {VERSION}, got {version}; update the older device")
    try:
        return Head(Kind(kind), link_id)
    except ValueError:
        raise SealBroken(f"unknown kind of relay message: {kind}") from None


def record_head(link_id: bytes) -> bytes:
    """What every record of a link begins with."""
    return _HEAD.pack(VERSION, Kind.RECORD, link_id)


def busy(link_id: bytes) -> bytes:
    """The answer of a listener that has no room for another handshake."""
    return _HEAD.pack(VERSION, Kind.BUSY, link_id)


# --- records ------------------------------------------------------------------------------------


class Sealer:
    """Seals one direction's records, in order."""

    __slots__ = ("_aead", "_count", "_link_id")

    def __init__(self, key: bytes, link_id: bytes) -> None:
        self._aead = ChaCha20Poly1305(key)
        self._link_id = link_id
        self._count = 0

    def seal(self, plain: Buffer) -> bytes:
        """The message for the bus. Raises `SealBroken` once the key has sealed `RECORDS_MAX` records."""
        count = self._count
        if count >= RECORDS_MAX:
            raise SealBroken(f"this link has carried {RECORDS_MAX} records, all that its key is good for")
        self._count = count + 1
        head = _RECORD_HEAD.pack(VERSION, Kind.RECORD, self._link_id, count)
        return head + self._aead.encrypt(count.to_bytes(12, "big"), plain, head)


class Opener:
    """Opens the other direction's records: each once, and only in the order in which they were sealed."""

    __slots__ = ("_aead", "_count", "_link_id")

    def __init__(self, key: bytes, link_id: bytes) -> None:
        self._aead = ChaCha20Poly1305(key)
        self._link_id = link_id
        self._count = 0

    def open(self, message: Buffer) -> bytes:
        """What was sealed. Raises `SealBroken`; the link is over then."""
        if len(message) < RECORD_OVERHEAD_BYTES:
            raise SealBroken(f"expected a record of at least {RECORD_OVERHEAD_BYTES} bytes, got {len(message)}")
        version, kind, link_id, count = _RECORD_HEAD.unpack_from(message)
        if (version, kind, link_id) != (VERSION, Kind.RECORD, self._link_id):
            raise SealBroken("expected a record of this link, got another message")
        if count != self._count:
            what = "were lost or held back" if count < RECORDS_MAX and count > self._count else "came again"
            raise SealBroken(f"expected record {self._count} of the link, got {count}: records {what} on the relay")
        view = memoryview(message)
        head = _RECORD_HEAD.size
        try:
            plain = self._aead.decrypt(count.to_bytes(12, "big"), view[head:], view[:head])
        except InvalidTag:
            raise SealBroken(f"record {count} of the link was altered on the relay") from None
        self._count = count + 1
        return plain


class Seals:
    """What a finished handshake gives one side."""

    __slots__ = ("link_id", "opener", "peer", "sealer")

    def __init__(self, peer: NodeId, link_id: bytes, sending: bytes, receiving: bytes) -> None:
        self.peer = peer
        self.link_id = link_id
        self.sealer = Sealer(sending, link_id)
        self.opener = Opener(receiving, link_id)


# --- the handshake ------------------------------------------------------------------------------


class Dialler:
    """The side that opens a link. Good for one exchange."""

    def __init__(self, identity: Identity, peer: NodeId, cell: str) -> None:
        self._identity = identity
        self._peer = peer
        self._peer_key = _key_of(peer)
        self._key = X25519PrivateKey.generate()
        self.link_id = secrets.token_bytes(LINK_ID_BYTES)
        body = b"".join((
            _HEAD.pack(VERSION, Kind.DIAL, self.link_id),
            identity.public_bytes,
            self._peer_key,
            self._key.public_key().public_bytes_raw(),
        ))  # fmt: skip
        self._context = _context(cell)
        self.dial: bytes = body + identity.sign(self._context + body)
        """What to send first."""

    def answered(self, answer: bytes) -> tuple[bytes, Seals]:
        """The `CONFIRM` to send before any record, and the link's seals. Raises `SealBroken`."""
        _expect(answer, Kind.ANSWER, _ANSWER_BYTES, self.link_id)
        transcript = self._context + self.dial + answer[:-SIGNATURE_BYTES]
        _verify(self._peer_key, answer[-SIGNATURE_BYTES:], transcript)
        sealed = answer[HEAD_BYTES + KEY_BYTES : -SIGNATURE_BYTES]
        theirs = _unseal(sealed, self._key, self._context + self.dial + answer[: HEAD_BYTES + KEY_BYTES])
        transcript = self._context + self.dial + answer
        ours = secrets.token_bytes(SECRET_BYTES)
        head = _HEAD.pack(VERSION, Kind.CONFIRM, self.link_id)
        body = head + _seal(ours, answer[HEAD_BYTES : HEAD_BYTES + KEY_BYTES], transcript + head)
        confirm = body + self._identity.sign(transcript + body)
        sending, receiving = _traffic_keys(ours, theirs, transcript + confirm)
        return confirm, Seals(self._peer, self.link_id, sending, receiving)


class Listener:
    """The side that is dialled. Made from a `DIAL`; raises `SealBroken` when that is not meant for us, or not from
    `sender`."""

    def __init__(self, identity: Identity, cell: str, sender: NodeId, dial: bytes) -> None:
        self.link_id = parse_head(dial).link_id
        _expect(dial, Kind.DIAL, _DIAL_BYTES, self.link_id)
        dialler, listener, key = (dial[HEAD_BYTES + i * KEY_BYTES :][:KEY_BYTES] for i in range(3))
        if dialler != _key_of(sender):
            raise SealBroken(f"{sender[:8]} dialled in the name of {dialler.hex()[:8]}")
        if listener != identity.public_bytes:
            raise SealBroken(f"{sender[:8]} dialled {listener.hex()[:8]}, which is not this device")
        context = _context(cell)
        _verify(dialler, dial[-SIGNATURE_BYTES:], context + dial[:-SIGNATURE_BYTES])
        self._peer = sender
        self._peer_key = dialler
        self._key = X25519PrivateKey.generate()
        self._secret = secrets.token_bytes(SECRET_BYTES)
        head = _HEAD.pack(VERSION, Kind.ANSWER, self.link_id) + self._key.public_key().public_bytes_raw()
        body = head + _seal(self._secret, key, context + dial + head)
        self.answer: bytes = body + identity.sign(context + dial + body)
        """What to send back."""
        self._transcript = context + dial + self.answer

    def confirmed(self, confirm: bytes) -> Seals:
        """The link's seals, now that the dialler has proved who it is. Raises `SealBroken`."""
        _expect(confirm, Kind.CONFIRM, _CONFIRM_BYTES, self.link_id)
        _verify(self._peer_key, confirm[-SIGNATURE_BYTES:], self._transcript + confirm[:-SIGNATURE_BYTES])
        sealed = confirm[HEAD_BYTES:-SIGNATURE_BYTES]
        theirs = _unseal(sealed, self._key, self._transcript + confirm[:HEAD_BYTES])
        receiving, sending = _traffic_keys(theirs, self._secret, self._transcript + confirm)
        return Seals(self._peer, self.link_id, sending, receiving)


def _context(cell: str) -> bytes:
    """What every signature and sealed secret begins with. The kind of each message says its purpose and its side.

    It is not UTF-8 on purpose: a NATS server has its clients sign a text of its choice with the same key, to let them
    in. A captured one must not get a handshake signed that way.
    """
    name = cell.encode()
    if len(name) > CELL_BYTES_MAX:
        raise SealBroken(f"expected a cell's name of at most {CELL_BYTES_MAX} bytes, got {len(name)}")
    return b"\xfffallow sealed relay v1\n" + bytes([len(name)]) + name


def _key_of(node: NodeId) -> bytes:
    try:
        key = bytes.fromhex(node)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES or key.hex() != node:
        raise SealBroken(f"expected a device id of {2 * KEY_BYTES} lower-case hex digits, got {node[:80]!r}")
    return key


def _expect(message: bytes, kind: Kind, size_bytes: int, link_id: bytes) -> None:
    head = parse_head(message)
    if head.kind is Kind.BUSY and kind is Kind.ANSWER:
        raise SealBroken("the peer takes no more links over the relay at present")
    if head.kind is not kind or head.link_id != link_id or len(message) != size_bytes:
        raise SealBroken(
            f"expected the {kind.name} of this link, {size_bytes} bytes, got {head.kind.name} of "
            f"{'this' if head.link_id == link_id else 'another'} link, {len(message)} bytes"
        )


def _verify(key: bytes, signature: bytes, statement: bytes) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, statement)
    except (InvalidSignature, ValueError):
        raise SealBroken(f"the peer claims to be {key.hex()[:8]} and could not prove it") from None


def _seal(secret: bytes, to: bytes, info: bytes) -> bytes:
    try:
        return _SUITE.encrypt(secret, X25519PublicKey.from_public_bytes(to), info=info)
    except ValueError:  # a point of small order, for which there is no shared secret
        raise SealBroken("the peer sent a key that nothing can be sealed to") from None


def _unseal(sealed: bytes, key: X25519PrivateKey, info: bytes) -> bytes:
    try:
        secret = _SUITE.decrypt(sealed, key, info=info)
    except (InvalidTag, ValueError):
        raise SealBroken("the peer's sealed secret does not open") from None
    if len(secret) != SECRET_BYTES:
        raise SealBroken(f"expected a secret of {SECRET_BYTES} bytes, got {len(secret)}")
    return secret


def _traffic_keys(dialler_secret: bytes, listener_secret: bytes, transcript: bytes) -> tuple[bytes, bytes]:
    """The keys of records from the dialler, and from the listener."""
    digest = Hash(SHA256())
    digest.update(transcript)
    derive = HKDF(SHA256(), length=2 * KEY_BYTES, salt=digest.finalize(), info=b"fallow sealed relay v1 records\n")
    keys = derive.derive(dialler_secret + listener_secret)
    return keys[:KEY_BYTES], keys[KEY_BYTES:]
