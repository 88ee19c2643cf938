"""A device's model files without bytes: which files are there, and in which pieces they travel.

It is a `Store` to the agent. Every file is an empty promise of the declared size: it moves over simulated links in
pieces of `TRANSFER_BYTES`, larger than the real chunks so that a layer costs tens of messages and not hundreds. Disks
outlive their device's process.

Not here: verification, torn writes, a full disk.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

from fallow.domain.errors import UnknownModel
from fallow.domain.ids import Digest
from fallow.domain.model import BlobRef, Manifest
from fallow.models.manifest import decode_manifest, encode_manifest
from fallow.models.store import PartialBlob, Store

TRANSFER_BYTES: Final = 4 << 20
PIECE: Final = b"a piece of a model file, whose size is charged by the network and not carried in memory"


class SimulatedDisk(Store):
    """A store that holds names. `pieces_of`: in how many pieces a file travels; with 0 it is there when asked for."""

    def __init__(self, pieces_of: Callable[[Digest], int]) -> None:
        self.pieces_of = pieces_of
        self.files: dict[Digest, None] = {}
        self.arriving: dict[Digest, dict[int, None]] = {}
        """Pieces still to come of files in transfer; an interrupted transfer goes on where it was."""
        self._manifests: dict[Digest, bytes] = {}
        self._decoded: dict[Digest, Manifest] = {}

    # --- what `Store` offers, as far as agents and gateways ask ---

    def blob_path(self, digest: Digest) -> Path | None:
        return Path(digest) if digest in self.files or digest in self._manifests else None

    def has(self, digest: Digest) -> bool:
        return digest in self.files or digest in self._manifests

    def read_chunk(self, digest: Digest, index: int) -> bytes | None:
        manifest = self._manifests.get(digest)
        if manifest is not None:
            return manifest if index == 0 else None
        return PIECE if digest in self.files else None

    def add_bytes(self, content: bytes | bytearray | memoryview) -> BlobRef:
        """Only manifests are added whole."""
        digest = Digest(hashlib.sha256(content).hexdigest())
        self._manifests[digest] = bytes(content)
        return BlobRef(digest=digest, size_bytes=len(content), chunk_digests=(digest,))

    def put_manifest(self, manifest: Manifest) -> Digest:
        return self.add_bytes(encode_manifest(manifest)).digest

    def manifest_bytes(self, digest: Digest) -> bytes:
        try:
            return self._manifests[digest]
        except KeyError:
            raise UnknownModel(f"no model with digest {digest[:64]!r} is on this disk") from None

    def manifest(self, digest: Digest) -> Manifest:
        found = self._decoded.get(digest)
        if found is None:
            found = self._decoded[digest] = decode_manifest(self.manifest_bytes(digest))
        return found

    def models(self) -> list[tuple[Digest, Manifest]]:
        return [(digest, self.manifest(digest)) for digest in self._manifests]

    def manifests(self) -> list[tuple[Digest, Manifest]]:
        return self.models()

    def partial(self, ref: BlobRef) -> PartialBlob:
        return cast(PartialBlob, _Arriving(self, ref))


class _Arriving:
    """A file in transfer."""

    def __init__(self, disk: SimulatedDisk, ref: BlobRef) -> None:
        self._disk = disk
        self._ref = ref
        pieces = 0 if disk.has(ref.digest) else disk.pieces_of(ref.digest)
        self._missing = disk.arriving.setdefault(ref.digest, dict.fromkeys(range(pieces)))

    def missing(self) -> list[int]:
        return list(self._missing)

    def write_chunk(self, index: int, _: bytes) -> None:
        self._missing.pop(index, None)

    def complete(self) -> Path:
        self._disk.files[self._ref.digest] = None
        self._disk.arriving.pop(self._ref.digest, None)
        return Path(self._ref.digest)
