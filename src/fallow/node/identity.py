"""A device's identity: one Ed25519 key, kept in a file that only its owner may read.

The public key, as lower-case hex, is the device's `NodeId` everywhere. The file holds the 32 bytes of the seed and
nothing else. This module signs nothing and talks to nobody.
"""

import os
import stat
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fallow.domain.errors import ConfigError
from fallow.domain.ids import NodeId

SEED_BYTES = 32


class Identity(msgspec.Struct, frozen=True):
    """A device's key pair. Do not print it."""

    seed: bytes
    node: NodeId

    def __repr__(self) -> str:
        return f"Identity({self.node[:8]}…)"


def identity_of(seed: bytes) -> Identity:
    """The identity that a seed of 32 bytes stands for."""
    public = Ed25519PrivateKey.from_private_bytes(seed).public_key()
    return Identity(seed, NodeId(public.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()))


def load_or_create(path: Path) -> Identity:
    """The identity in a file; a new one when there is no file.

    Raises `ConfigError` when the file is not a seed, or others may read it.
    """
    try:
        return _load(path)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:  # another process was faster
        return _load(path)
    with os.fdopen(handle, "wb") as file:
        file.write(os.urandom(SEED_BYTES))
        file.flush()
        os.fsync(file.fileno())
    return _load(path)


def _load(path: Path) -> Identity:
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        seed = file.read(SEED_BYTES + 1)
    if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{path} holds this device's private key, but others may read it: run chmod 600 {path}")
    if len(seed) != SEED_BYTES:
        raise ConfigError(
            f"{path} should hold a private key of {SEED_BYTES} bytes and holds {len(seed)}: restore it, "
            "or delete it to become a new device"
        )
    return identity_of(seed)
