"""A party's identity: one Ed25519 key, kept in a file that only its owner may read.

Rules
- The public key, as lower-case hex, is the party's `NodeId` everywhere. The same 32 bytes are its iroh endpoint id and,
  in base32 with a prefix and a checksum, its nkey on the bus.
- The file holds the 32 bytes of the seed and nothing else. It is there whole or not at all, and never replaced: of
  processes that start at once, all have the key of the first.
- What is signed is always an envelope (`trust/envelope.py`) or NATS's nonce, never a stranger's bytes alone.
"""

import base64
import binascii
import os
import re
import stat
from functools import lru_cache
from pathlib import Path

import msgspec
import nkeys
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fallow.domain.errors import ConfigError, SignatureInvalid
from fallow.domain.ids import NodeId
from fallow.private_file import write_first

SEED_BYTES = 32
KEY_BYTES = 32
"""Of a public key."""
SIGNATURE_BYTES = 64
KEYS_KEPT_MAX = 16
"""Private keys that are ready to sign: a process has few."""
_NONCE = re.compile(rb"[A-Za-z0-9_-]{8,64}")


class Identity(msgspec.Struct, frozen=True):
    """A party's key pair. Do not print it."""

    seed: bytes
    node: NodeId

    def __repr__(self) -> str:
        return f"Identity({self.node[:8]}…)"

    def sign(self, message: bytes) -> bytes:
        """An Ed25519 signature of 64 bytes. For bytes of our own making only: see `sign_nonce`."""
        return _private(self.seed).sign(message)

    def sign_nonce(self, nonce: bytes) -> bytes:
        """Prove to a bus's server that the key is ours, by what it drew.

        A server that was taken over draws what it likes, so nothing is signed that could be read as anything else: no
        envelope is made of these characters alone. Raises `SignatureInvalid` for another text.
        """
        if not _NONCE.fullmatch(nonce):
            raise SignatureInvalid(f"the bus's server asks for a signature under {nonce[:20]!r}, which is no nonce")
        return self.sign(nonce)


@lru_cache(maxsize=KEYS_KEPT_MAX)
def _private(seed: bytes) -> Ed25519PrivateKey:
    """To make the key anew would take as long as to sign with it."""
    return Ed25519PrivateKey.from_private_bytes(seed)


def identity_of(seed: bytes) -> Identity:
    """The identity that a seed of 32 bytes stands for."""
    public = Ed25519PrivateKey.from_private_bytes(seed).public_key()
    return Identity(seed, NodeId(public.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()))


def new_identity() -> Identity:
    """A key that was never used before."""
    return identity_of(os.urandom(SEED_BYTES))


def public_key(node: NodeId) -> Ed25519PublicKey:
    """The key that an id is. Raises `SignatureInvalid` for any text but 64 lower-case hex digits.

    The same key in other letters would be another name: one that no list of revoked parties holds.
    """
    try:
        raw = bytes.fromhex(node)
        if raw.hex() == node:
            return Ed25519PublicKey.from_public_bytes(raw)
    except ValueError:
        pass
    raise SignatureInvalid(f"expected a key of {2 * KEY_BYTES} lower-case hex digits, got {node[:80]!r}")


def verify(signer: NodeId, signature: bytes, message: bytes) -> None:
    """Raises `SignatureInvalid` unless `signer` signed `message`."""
    try:
        public_key(signer).verify(signature, message)
    except InvalidSignature:
        raise SignatureInvalid(f"expected a signature of {signer[:8]}, got one that is not") from None


# --- nkeys: the same keys as NATS writes them ------------------------------------------------------


def user_nkey(node: NodeId) -> str:
    """A party's name on the bus: `U…`."""
    return nkey_of(public_key(node).public_bytes_raw(), nkeys.PREFIX_BYTE_USER)


def nkey_of(public: bytes, prefix: int) -> str:
    """A public key as NATS writes it."""
    head = bytes([prefix]) + public
    return base64.b32encode(head + nkeys.crc16(bytearray(head)).to_bytes(2, "little")).rstrip(b"=").decode()


def node_of_nkey(nkey: str, prefix: int = nkeys.PREFIX_BYTE_USER) -> NodeId:
    """The party behind a public nkey of that kind. Raises `SignatureInvalid` for anything else."""
    try:
        raw = base64.b32decode(nkey + "=" * (-len(nkey) % 8))
    except (binascii.Error, ValueError):
        raise SignatureInvalid(f"expected a public nkey, got {nkey[:12]!r}") from None
    if len(raw) != 35 or raw[0] != prefix or nkeys.crc16(bytearray(raw[:-2])) != int.from_bytes(raw[-2:], "little"):
        raise SignatureInvalid(f"expected a public nkey of its kind, got {nkey[:12]!r}")
    return NodeId(raw[1:-2].hex())


# --- files ----------------------------------------------------------------------------------------


def load_or_create(path: Path) -> Identity:
    """The identity in a file; a new one when there is no file.

    Raises `ConfigError` when the file is not a seed, or others may read it, or there is no room for a new one.
    """
    try:
        return load(path)
    except FileNotFoundError:
        pass
    try:
        return create(path)
    except FileExistsError:  # another process was faster
        return load(path)
    except PermissionError:
        raise
    except OSError as error:
        raise ConfigError(
            f"A private key cannot be kept in {path} ({error.strerror or error}), and none was made. Make room there, "
            "and run the same command again."
        ) from None


def create(path: Path) -> Identity:
    """A new identity, kept in a file that was not there. Raises `FileExistsError`."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_first(path, os.urandom(SEED_BYTES))
    return load(path)


def load(path: Path) -> Identity:
    """The identity in a file. Raises `FileNotFoundError`, and `ConfigError` as `load_or_create` does."""
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        seed = file.read(SEED_BYTES + 1)
    if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{path} holds a private key, but others may read it: run chmod 600 {path}")
    if len(seed) != SEED_BYTES:
        raise ConfigError(
            f"{path} should hold a private key of {SEED_BYTES} bytes and holds {len(seed)}: restore it, "
            "or delete it to become a new device"
        )
    return identity_of(seed)
