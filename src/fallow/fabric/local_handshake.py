"""Mutual authentication of two local processes by their Ed25519 keys. Pure: bytes in, bytes out.

A challenge-response in three messages, in the manner of SIGMA without key exchange:

    dialler  -> listener:  MAGIC | dialler's public key (32) | nonce (32)
    listener -> dialler:   MAGIC | listener's public key | nonce | signature (64)
    dialler  -> listener:  signature (64)

Each signs MAGIC, its own role, both keys (dialler first) and both nonces. The nonces make a signature good for this
connection alone, the keys bind it to these two, and the role keeps it from being reflected to its sender. It
authenticates the ends, not the bytes in between: on a socket that only this user can reach, that is what is missing.
"""

import secrets
from enum import Enum
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fallow.domain.errors import LinkClosed
from fallow.domain.ids import NodeId

MAGIC: Final = b"fallow local link v1\n"
KEY_BYTES: Final = 32
NONCE_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
_CHALLENGE_BYTES: Final = len(MAGIC) + KEY_BYTES + NONCE_BYTES


class Role(Enum):
    """Which side of a link this process is."""

    DIALLER = b"dialler"
    LISTENER = b"listener"


class Identity:
    """A device's key pair, from its 32-byte Ed25519 seed."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public_bytes = private.public_key().public_bytes_raw()
        self.node = NodeId(self.public_bytes.hex())

    @classmethod
    def from_seed(cls, seed: bytes) -> "Identity":
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    def sign(self, message: bytes) -> bytes:
        return self._private.sign(message)


class Handshake:
    """One side of the handshake. `peer` is set once the other side has proved its id."""

    def __init__(self, identity: Identity, role: Role, expected: NodeId | None) -> None:
        self._identity = identity
        self._role = role
        self._expected = expected
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._received = bytearray()
        self._theirs: tuple[bytes, bytes] | None = None
        """The other side's key and nonce."""
        self.peer: NodeId | None = None

    def first(self) -> bytes:
        """What to send when the connection opens."""
        return self._challenge() if self._role is Role.DIALLER else b""

    @property
    def rest(self) -> bytes:
        """Bytes that came behind the handshake: the link's first."""
        return bytes(self._received)

    def feed(self, data: bytes) -> bytes:
        """Take bytes, return what to send. Raises `LinkClosed` when the other side is not who it must be."""
        self._received += data
        reply = b""
        if self._theirs is None:
            if not MAGIC.startswith(bytes(self._received[: len(MAGIC)])):
                raise LinkClosed("expected a local link's handshake, got something else")
            if len(self._received) < _CHALLENGE_BYTES:
                return b""
            challenge = self._take(_CHALLENGE_BYTES)[len(MAGIC) :]
            self._theirs = (challenge[:KEY_BYTES], challenge[KEY_BYTES:])
            if self._expected is not None and self._theirs[0].hex() != self._expected:
                raise LinkClosed(f"expected {self._expected[:8]}, found {self._theirs[0].hex()[:8]}")
            if self._role is Role.LISTENER:
                reply = self._challenge() + self._identity.sign(self._statement(self._role))
        if self.peer is None and len(self._received) >= SIGNATURE_BYTES:
            self._verify(self._take(SIGNATURE_BYTES))
            if self._role is Role.DIALLER:
                reply += self._identity.sign(self._statement(self._role))
        return reply

    def _challenge(self) -> bytes:
        return MAGIC + self._identity.public_bytes + self._nonce

    def _take(self, size: int) -> bytes:
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    def _statement(self, signer: Role) -> bytes:
        assert self._theirs is not None
        ours = (self._identity.public_bytes, self._nonce)
        dialler, listener = (ours, self._theirs) if self._role is Role.DIALLER else (self._theirs, ours)
        return b"".join((MAGIC, signer.value, dialler[0], listener[0], dialler[1], listener[1]))

    def _verify(self, signature: bytes) -> None:
        assert self._theirs is not None
        signer = Role.LISTENER if self._role is Role.DIALLER else Role.DIALLER
        key = self._theirs[0]
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(signature, self._statement(signer))
        except (InvalidSignature, ValueError):
            raise LinkClosed(f"the peer claims to be {key.hex()[:8]} and could not prove it") from None
        self.peer = NodeId(key.hex())
