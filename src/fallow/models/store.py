"""The content-addressed store: every model file by its SHA-256, and an index of models by name.

Rules
- A blob is at `blobs/ab/cd/<digest>` only when all of it is there and has that digest. It appears by an atomic rename
  after an fsync, so a crash leaves either the whole blob or none.
- A partial blob keeps no journal. What counts as present after a restart is what still has its chunk's digest; a
  `kill -9` or a torn write costs at most the chunks it tore.
- A manifest is a blob too. `models/<name>` holds the digest of the manifest that has that name.
- `remove` deletes what the removed model alone refers to, so it never touches the files of an import in progress;
  `collect_garbage` deletes everything that no model refers to, and is for when no import or transfer runs.

It does no networking, checks no tensor, and trusts only names and digests that it has validated.
"""

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from fallow.domain.errors import BlobCorrupt, ModelError, UnknownModel
from fallow.domain.ids import Digest, ModelName
from fallow.domain.model import BLOB_CHUNK_BYTES, BlobRef, Manifest
from fallow.models.manifest import blob_refs, check_blob_ref, check_name, decode_manifest, encode_manifest

MANIFEST_BEGINS = b'{"bos_token_id":'
"""Manifests are canonical: the first key is always the same, and no other file begins so."""
_DIGEST_PATTERN = re.compile(r"[0-9a-f]{64}")


def is_digest(text: str) -> bool:
    """Whether `text` is 64 lower-case hex digits, and so safe to use in a path."""
    return _DIGEST_PATTERN.fullmatch(text) is not None


class Store:
    """A directory of verified blobs. Safe to share between processes; methods block on disk, not on each other."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs"
        self._partial = root / "partial"
        self._models = root / "models"
        for folder in (self._blobs, self._partial, self._models):
            folder.mkdir(parents=True, exist_ok=True)

    # --- blobs ----------------------------------------------------------------------------------

    def blob_path(self, digest: Digest) -> Path | None:
        """Where a verified blob lies, or `None` when it is not here (or `digest` is not a digest)."""
        if not is_digest(digest):
            return None
        path = self._place(digest)
        return path if path.is_file() else None

    def has(self, digest: Digest) -> bool:
        return self.blob_path(digest) is not None

    def read_chunk(self, digest: Digest, index: int) -> bytes | None:
        """Chunk `index` of a blob; `None` when the blob is not here or has no such chunk. Not verified again."""
        path = self.blob_path(digest)
        if path is None or index < 0:
            return None
        try:
            if index * BLOB_CHUNK_BYTES >= path.stat().st_size:  # seeking far beyond the end is an error
                return None
            with path.open("rb") as file:
                file.seek(index * BLOB_CHUNK_BYTES)
                chunk = file.read(BLOB_CHUNK_BYTES)
        except FileNotFoundError:  # removed since we looked
            return None
        return chunk or None

    def writer(self) -> "BlobWriter":
        """A new blob of unknown digest, written front to back."""
        return BlobWriter(self)

    def add_bytes(self, content: bytes | bytearray | memoryview) -> BlobRef:
        with self.writer() as writer:
            writer.write(content)
            return writer.commit()

    def add_file(self, path: Path) -> BlobRef:
        """Copy a file in."""
        with self.writer() as writer, path.open("rb") as file:
            while piece := file.read(BLOB_CHUNK_BYTES):
                writer.write(piece)
            return writer.commit()

    def partial(self, ref: BlobRef) -> "PartialBlob":
        """Start or resume the transfer of a blob. Raises `ModelError` for a reference that makes no sense."""
        check_blob_ref(ref, "blob")
        return PartialBlob(self, ref, self._partial / ref.digest)

    def _place(self, digest: str) -> Path:
        return self._blobs / digest[:2] / digest[2:4] / digest

    def _admit(self, temporary: Path, digest: str) -> None:
        """Give a complete, fsynced file its final name."""
        place = self._place(digest)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.replace(place)
        except PermissionError:  # Windows does not replace a file that is mapped; it is the same file anyway
            if not place.is_file():
                raise
            temporary.unlink()
        _sync_folder(place.parent)

    # --- models ---------------------------------------------------------------------------------

    def put_manifest(self, manifest: Manifest) -> Digest:
        """Index a model under its name; a model that had the name before is removed. Its files may come later."""
        encoded = encode_manifest(manifest)
        decode_manifest(encoded)
        digest = self.add_bytes(encoded).digest
        previous = self._indexed().get(manifest.name)
        self._write_index(manifest.name, digest)
        if previous is not None and previous != digest:
            self._delete_unshared(previous)
        return digest

    def manifest_bytes(self, digest: Digest) -> bytes:
        """Raises `UnknownModel` when it is not here, `BlobCorrupt` when the disk has changed it."""
        path = self.blob_path(digest)
        if path is None:
            raise UnknownModel(f"no model with digest {digest[:64]!r} is in the store at {self.root.name}")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise BlobCorrupt(f"the manifest {digest} has changed on disk; remove the model and add it again")
        return content

    def manifest(self, digest: Digest) -> Manifest:
        return decode_manifest(self.manifest_bytes(digest))

    def models(self) -> list[tuple[Digest, Manifest]]:
        """Every indexed model, by name. An entry whose manifest is gone or broken is left out."""
        found: list[tuple[Digest, Manifest]] = []
        for _, digest in sorted(self._indexed().items()):
            with contextlib.suppress(UnknownModel, ModelError, BlobCorrupt):
                found.append((digest, self.manifest(digest)))
        return found

    def manifests(self) -> list[tuple[Digest, Manifest]]:
        """Every manifest that is here, whether a name refers to it or not: a device keeps its models without names."""
        found: list[tuple[Digest, Manifest]] = []
        for path in sorted(self._files()):
            with contextlib.suppress(OSError, UnknownModel, ModelError, BlobCorrupt):
                if is_digest(path.name) and _begins_like_a_manifest(path):
                    found.append((Digest(path.name), self.manifest(Digest(path.name))))
        return found

    def by_name(self, name: str) -> tuple[Digest, Manifest]:
        """Raises `UnknownModel`, naming what is there."""
        digest = self._indexed().get(ModelName(name))
        if digest is None:
            there = ", ".join(sorted(self._indexed())) or "nothing"
            raise UnknownModel(f"there is no model {name[:96]!r} in the store; it holds {there}")
        return digest, self.manifest(digest)

    def holds(self, manifest: Manifest) -> bool:
        """Whether every file of a model is here."""
        return all(self.has(ref.digest) for ref in blob_refs(manifest))

    def remove(self, name: str) -> int:
        """Forget a model and delete what only it refers to. Returns the bytes freed. Raises `UnknownModel`."""
        digest = self._indexed().get(ModelName(name))
        if digest is None:
            raise UnknownModel(f"there is no model {name[:96]!r} in the store")
        (self._models / name).unlink(missing_ok=True)
        return self._delete_unshared(digest)

    def collect_garbage(self) -> int:
        """Delete every blob and partial that no model refers to. Returns the bytes freed."""
        keep = self._referenced()
        return sum(_unlink(path) for path in list(self._files()) if path.name not in keep)

    def _indexed(self) -> dict[ModelName, Digest]:
        index: dict[ModelName, Digest] = {}
        for entry in self._models.iterdir():
            if not entry.name.startswith("."):
                with contextlib.suppress(OSError, UnicodeDecodeError, ModelError):
                    digest = entry.read_text("ascii").strip()
                    if is_digest(digest):
                        index[check_name(entry.name)] = Digest(digest)
        return index

    def _write_index(self, name: ModelName, digest: Digest) -> None:
        handle, temporary = tempfile.mkstemp(dir=self._models, prefix=".")
        with os.fdopen(handle, "wb") as file:
            file.write(digest.encode("ascii"))
            _sync(file)
        Path(temporary).replace(self._models / check_name(name))
        _sync_folder(self._models)

    def _referenced(self) -> set[str]:
        return {name for digest, manifest in self.models() for name in _digests_of(digest, manifest)}

    def _delete_unshared(self, digest: Digest) -> int:
        """Delete a model's files except those that an indexed model refers to."""
        try:
            mine = _digests_of(digest, self.manifest(digest))
        except (UnknownModel, ModelError, BlobCorrupt):
            mine = {digest}
        mine -= self._referenced()
        return sum(_unlink(path) for name in mine for path in (self._place(name), self._partial / name))

    def _files(self) -> Iterator[Path]:
        yield from (path for path in self._blobs.glob("*/*/*") if path.is_file())
        yield from (path for path in self._partial.iterdir() if path.is_file())


class BlobWriter:
    """A blob that is being written. Leaving the context without `commit` discards it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        handle, name = tempfile.mkstemp(dir=store.root / "partial", prefix=".new-")
        self._path = Path(name)
        self._file = os.fdopen(handle, "wb")
        self._whole = hashlib.sha256()
        self._chunk = hashlib.sha256()
        self._chunk_digests: list[Digest] = []
        self._size_bytes = 0

    def write(self, content: bytes | bytearray | memoryview) -> None:
        """Append bytes of any length."""
        view = memoryview(content).cast("B")
        self._file.write(view)
        self._whole.update(view)
        at = 0
        while at < len(view):
            room = BLOB_CHUNK_BYTES - self._size_bytes % BLOB_CHUNK_BYTES
            piece = view[at : at + room]
            self._chunk.update(piece)
            self._size_bytes += len(piece)
            at += len(piece)
            if self._size_bytes % BLOB_CHUNK_BYTES == 0:
                self._end_chunk()

    def commit(self) -> BlobRef:
        """Make it durable and visible."""
        if self._size_bytes == 0:
            raise ModelError("an empty file cannot be stored")
        if self._size_bytes % BLOB_CHUNK_BYTES:
            self._end_chunk()
        _sync(self._file)
        self._file.close()
        digest = Digest(self._whole.hexdigest())
        self._store._admit(self._path, digest)
        return BlobRef(digest=digest, size_bytes=self._size_bytes, chunk_digests=tuple(self._chunk_digests))

    def _end_chunk(self) -> None:
        self._chunk_digests.append(Digest(self._chunk.hexdigest()))
        self._chunk = hashlib.sha256()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


class PartialBlob:
    """A blob in transfer: chunks arrive in any order, each verified before it is written."""

    def __init__(self, store: Store, ref: BlobRef, path: Path) -> None:
        self.ref = ref
        self._store = store
        self._path = path
        self._present = [False] * len(ref.chunk_digests)
        if store.has(ref.digest):
            self._present = [True] * len(ref.chunk_digests)
        elif path.is_file():
            self._verify_what_is_there()

    def has(self, index: int) -> bool:
        return 0 <= index < len(self._present) and self._present[index]

    def missing(self) -> list[int]:
        """Chunks still to come, ascending."""
        return [index for index, present in enumerate(self._present) if not present]

    @property
    def progress(self) -> float:
        """Share of the chunks that are here, 0 to 1."""
        return sum(self._present) / len(self._present)

    def write_chunk(self, index: int, chunk: bytes | bytearray | memoryview) -> None:
        """Keep a chunk. Raises `BlobCorrupt` when it is not the one that the manifest promises; nothing is written."""
        if not 0 <= index < len(self._present):
            raise BlobCorrupt(f"blob {self.ref.digest} has {len(self._present)} chunks; chunk {index} does not exist")
        expected_bytes = self._chunk_bytes(index)
        if len(chunk) != expected_bytes:
            raise BlobCorrupt(
                f"chunk {index} of blob {self.ref.digest}: expected {expected_bytes} bytes, got {len(chunk)}"
            )
        found = hashlib.sha256(chunk).hexdigest()
        if found != self.ref.chunk_digests[index]:
            raise BlobCorrupt(
                f"chunk {index} of blob {self.ref.digest}: "
                f"expected SHA-256 {self.ref.chunk_digests[index]}, got {found}"
            )
        if self._present[index]:
            return
        with _open_for_update(self._path) as file:
            file.seek(index * BLOB_CHUNK_BYTES)
            file.write(chunk)
        self._present[index] = True

    def complete(self) -> Path:
        """Verify the whole and move it into the store. Returns its path; idempotent.

        Raises `BlobCorrupt` when chunks are missing, or when the chunks are right but the whole is not: then the
        reference itself lies, and what was fetched is deleted.
        """
        already = self._store.blob_path(self.ref.digest)
        if already is not None:
            self._path.unlink(missing_ok=True)
            return already
        absent = self.missing()
        if absent:
            raise BlobCorrupt(f"blob {self.ref.digest} lacks {len(absent)} chunks, first {absent[0]}")
        with self._path.open("r+b") as file:
            file.truncate(self.ref.size_bytes)
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found == self.ref.digest:
                _sync(file)
        if found != self.ref.digest:
            self._path.unlink(missing_ok=True)
            self._present = [False] * len(self._present)
            raise BlobCorrupt(f"blob {self.ref.digest} as a whole has SHA-256 {found}; its reference is wrong")
        self._store._admit(self._path, self.ref.digest)
        return self._store._place(self.ref.digest)

    def discard(self) -> None:
        """Forget what has arrived."""
        self._path.unlink(missing_ok=True)
        self._present = [self._store.has(self.ref.digest)] * len(self._present)

    def _chunk_bytes(self, index: int) -> int:
        return min(BLOB_CHUNK_BYTES, self.ref.size_bytes - index * BLOB_CHUNK_BYTES)

    def _verify_what_is_there(self) -> None:
        with self._path.open("rb") as file:
            for index, expected in enumerate(self.ref.chunk_digests):
                chunk = file.read(self._chunk_bytes(index))
                if not chunk:
                    return
                self._present[index] = hashlib.sha256(chunk).hexdigest() == expected


def _begins_like_a_manifest(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MANIFEST_BEGINS)) == MANIFEST_BEGINS


def _digests_of(digest: Digest, manifest: Manifest) -> set[str]:
    return {digest, *(ref.digest for ref in blob_refs(manifest))}


def _open_for_update(path: Path) -> BinaryIO:
    """Open for writing at any place without truncating, creating it when absent."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644), "r+b")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make a rename durable, where the platform can."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _unlink(path: Path) -> int:
    try:
        size_bytes = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size_bytes
