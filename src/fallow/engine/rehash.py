"""The weights' files as this process maps them, hashed again and again against the manifest's digests.

Hashing goes chunk by chunk (`BLOB_CHUNK_BYTES`, the manifest has a digest for each), so that a step between two
computations is short, and gives the pages back. What is reached is what is mapped: the embedding and the head's rows
that are scored again are used straight from there, and every file is what a reload would read. The runtime's own
copies of weights are not reached; the canary (`canary.py`) is for those.
"""

import contextlib
import hashlib
import mmap
from collections.abc import Iterable, Iterator

import msgspec

from fallow.domain.ids import Digest
from fallow.domain.model import BLOB_CHUNK_BYTES, Manifest
from fallow.models.manifest import blob_refs


class Chunk(msgspec.Struct, frozen=True):
    """Part of a mapped file."""

    what: str
    """For people."""
    data: memoryview
    digest: str
    mapping: mmap.mmap
    offset: int

    def intact(self) -> bool:
        """Hash it; about a millisecond."""
        same = hashlib.sha256(self.data).hexdigest() == self.digest
        with contextlib.suppress(AttributeError, OSError):  # no madvise here: the pages stay until reclaimed
            self.mapping.madvise(mmap.MADV_DONTNEED, self.offset, len(self.data))
        return same


def file_chunks(manifest: Manifest, mapped: Iterable[tuple[Digest, mmap.mmap]]) -> Iterator[Chunk]:
    """The chunks of mapped files, each file once."""
    refs = {ref.digest: ref for ref in blob_refs(manifest)}
    for digest, mapping in dict(mapped).items():
        whole = memoryview(mapping)
        for index, wanted in enumerate(refs[digest].chunk_digests):
            offset = index * BLOB_CHUNK_BYTES
            name = f"chunk {index} of file {digest[:12]} of {manifest.name}"
            yield Chunk(name, whole[offset : offset + BLOB_CHUNK_BYTES], wanted, mapping, offset)
