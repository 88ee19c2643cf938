"""The content-addressed store: verified blobs, resumable partial blobs, the index of models, garbage."""

import hashlib
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import tiny_manifest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.errors import BlobCorrupt, ModelError, UnknownModel
from fallow.domain.model import BLOB_CHUNK_BYTES, BlobRef
from fallow.models.manifest import manifest_digest
from fallow.models.store import Store

MIB = BLOB_CHUNK_BYTES
CONTENT = os.urandom(2 * MIB + 12345)


def chunk_of(content: bytes, index: int) -> bytes:
    return content[index * MIB : (index + 1) * MIB]


def ref_of(content: bytes) -> BlobRef:
    chunks = [content[at : at + MIB] for at in range(0, len(content), MIB)]
    return BlobRef(
        digest=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
        chunk_digests=tuple(hashlib.sha256(chunk).hexdigest() for chunk in chunks),
    )


@pytest.mark.parametrize("size_bytes", [1, MIB - 1, MIB, MIB + 1, 2 * MIB])
def test_a_blob_comes_back_chunk_by_chunk(tmp_path, size_bytes):
    store, content = Store(tmp_path), CONTENT[:size_bytes]
    ref = store.add_bytes(content)
    assert ref == ref_of(content)
    path = store.blob_path(ref.digest)
    assert path == tmp_path / "blobs" / ref.digest[:2] / ref.digest[2:4] / ref.digest
    chunks = [store.read_chunk(ref.digest, index) for index in range(len(ref.chunk_digests))]
    assert b"".join(chunks) == content
    assert store.read_chunk(ref.digest, len(chunks)) is None
    assert store.read_chunk(ref.digest, -1) is None


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, len(CONTENT)), max_size=8))
def test_how_a_blob_is_written_does_not_matter(tmp_path_factory, cuts):
    store = Store(tmp_path_factory.mktemp("store"))
    edges = [0, *sorted(cuts), len(CONTENT)]
    with store.writer() as writer:
        for first, last in itertools.pairwise(edges):
            writer.write(memoryview(CONTENT)[first:last])
        assert writer.commit() == ref_of(CONTENT)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ZeroDivisionError), store.writer() as writer:
        writer.write(b"half")
        raise ZeroDivisionError
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    with pytest.raises(ModelError), store.writer() as writer:
        writer.commit()


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n", "..", "a" * 64])
def test_what_is_not_here_or_not_a_digest_is_not_found(tmp_path, digest):
    store = Store(tmp_path)
    assert store.blob_path(digest) is None
    assert not store.has(digest)
    assert store.read_chunk(digest, 0) is None
    with pytest.raises(UnknownModel):
        store.manifest(digest)


# --- partial blobs ------------------------------------------------------------------------------


def test_chunks_arrive_in_any_order_and_survive_a_restart(tmp_path):
    ref = ref_of(CONTENT)
    partial = Store(tmp_path).partial(ref)
    assert partial.missing() == [0, 1, 2]
    partial.write_chunk(2, chunk_of(CONTENT, 2))
    again = Store(tmp_path).partial(ref)
    assert (again.has(0), again.has(1), again.has(2)) == (False, False, True)
    again.write_chunk(0, chunk_of(CONTENT, 0))
    with pytest.raises(BlobCorrupt, match="lacks 1 chunks, first 1"):
        again.complete()
    again.write_chunk(1, memoryview(chunk_of(CONTENT, 1)))
    path = again.complete()
    assert path.read_bytes() == CONTENT
    assert again.complete() == path
    assert Store(tmp_path).partial(ref).progress == 1.0


def test_a_wrong_chunk_is_refused_and_changes_nothing(tmp_path):
    store, ref = Store(tmp_path), ref_of(CONTENT)
    partial = store.partial(ref)
    wrong = bytearray(chunk_of(CONTENT, 1))
    wrong[77] ^= 1
    with pytest.raises(BlobCorrupt, match=r"chunk 1 .* expected SHA-256"):
        partial.write_chunk(1, wrong)
    with pytest.raises(BlobCorrupt, match="expected 1048576 bytes, got 5"):
        partial.write_chunk(1, b"short")
    with pytest.raises(BlobCorrupt, match="chunk 3 does not exist"):
        partial.write_chunk(3, b"")
    with pytest.raises(BlobCorrupt, match="does not exist"):
        partial.write_chunk(-1, b"")
    assert partial.missing() == [0, 1, 2]
    assert not list((tmp_path / "partial").iterdir())


def test_what_the_disk_changed_is_fetched_again(tmp_path):
    ref = ref_of(CONTENT)
    partial = Store(tmp_path).partial(ref)
    for index in range(3):
        partial.write_chunk(index, chunk_of(CONTENT, index))
    with (tmp_path / "partial" / ref.digest).open("r+b") as file:
        file.seek(MIB + 5)
        file.write(b"torn")
        file.truncate(2 * MIB + 100)
    assert Store(tmp_path).partial(ref).missing() == [1, 2]


def test_a_reference_that_lies_about_the_whole_is_found_out(tmp_path):
    ref = ref_of(CONTENT)
    lying = BlobRef(digest="0" * 64, size_bytes=ref.size_bytes, chunk_digests=ref.chunk_digests)
    partial = Store(tmp_path).partial(lying)
    for index in range(3):
        partial.write_chunk(index, chunk_of(CONTENT, index))
    with pytest.raises(BlobCorrupt, match="as a whole"):
        partial.complete()
    assert not Store(tmp_path).has(lying.digest)
    assert Store(tmp_path).partial(lying).missing() == [0, 1, 2]


def test_a_reference_that_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(ModelError, match="64 lower-case hex"):
        Store(tmp_path).partial(BlobRef(digest="../../evil", size_bytes=1, chunk_digests=("a" * 64,)))
    with pytest.raises(ModelError, match="chunk digests"):
        Store(tmp_path).partial(BlobRef(digest="a" * 64, size_bytes=MIB + 1, chunk_digests=("a" * 64,)))


def test_a_transfer_survives_kill_9(tmp_path):
    """Goal: chunks written before a kill count afterwards. Method: a child writes one and is killed while it waits."""
    source = tmp_path / "content"
    source.write_bytes(CONTENT)
    script = (
        "import sys, pathlib, hashlib\n"
        "from fallow.models.store import Store\n"
        "root, content = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])\n"
        "ref = Store(root / 'other').add_file(content)\n"
        "Store(root / 'store').partial(ref).write_chunk(1, content.read_bytes()[1 << 20 : 2 << 20])\n"
        "print('written', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(source)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"written\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert Store(tmp_path / "store").partial(ref_of(CONTENT)).missing() == [0, 2]


# --- models -------------------------------------------------------------------------------------


def model_in(store: Store, name: str, *contents: bytes):
    refs = [store.add_bytes(content) for content in contents]
    return tiny_manifest(name=name, embedding=refs[0], layers=tuple(refs[1:3]), head=refs[3], tokenizer=refs[4])


def test_models_are_found_by_name_and_digest(tmp_path):
    store = Store(tmp_path)
    manifest = model_in(store, "one", b"e", b"1", b"2", b"h", b"t")
    digest = store.put_manifest(manifest)
    assert digest == manifest_digest(manifest) == store.put_manifest(manifest)
    again = Store(tmp_path)
    assert again.manifest(digest) == manifest
    assert again.by_name("one") == (digest, manifest)
    assert again.models() == [(digest, manifest)]
    assert again.holds(manifest)
    assert again.read_chunk(digest, 0) == again.manifest_bytes(digest)
    with pytest.raises(UnknownModel, match="it holds one"):
        again.by_name("../one")


def test_remove_deletes_what_no_other_model_needs(tmp_path):
    store = Store(tmp_path)
    first = model_in(store, "one", b"e", b"1", b"2", b"h", b"t")
    second = model_in(store, "two", b"e", b"x", b"y", b"h", b"t")
    in_progress = store.add_bytes(b"of an import that has not finished")
    store.put_manifest(first)
    digest = store.put_manifest(second)
    assert store.remove("two") > 0
    assert store.models() == [(manifest_digest(first), first)]
    assert store.holds(first)
    assert not any(store.has(ref.digest) for ref in second.layers)
    assert not store.has(digest)
    assert store.has(in_progress.digest)
    assert store.collect_garbage() == 34
    assert not store.has(in_progress.digest)
    assert store.holds(first)
    with pytest.raises(UnknownModel):
        store.remove("two")


def test_a_name_that_is_given_again_replaces_the_model(tmp_path):
    store = Store(tmp_path)
    store.put_manifest(model_in(store, "one", b"e", b"1", b"2", b"h", b"t"))
    newer = model_in(store, "one", b"e", b"3", b"4", b"h", b"t")
    digest = store.put_manifest(newer)
    assert store.models() == [(digest, newer)]
    assert not store.has(hashlib.sha256(b"1").hexdigest())
    assert store.holds(newer)


def test_a_manifest_that_the_disk_changed_is_not_believed(tmp_path):
    store = Store(tmp_path)
    digest = store.put_manifest(model_in(store, "one", b"e", b"1", b"2", b"h", b"t"))
    path: Path = store.blob_path(digest)
    path.write_bytes(path.read_bytes().replace(b'"vocab_size":40', b'"vocab_size":41'))
    with pytest.raises(BlobCorrupt, match="changed on disk"):
        store.manifest(digest)
    assert store.models() == []


def test_an_unsafe_name_never_reaches_the_disk(tmp_path):
    store = Store(tmp_path / "store")
    with pytest.raises(ModelError, match="model name"):
        store.put_manifest(tiny_manifest(name="../escaped"))
    assert not (tmp_path / "store" / "escaped").exists()
