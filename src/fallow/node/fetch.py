"""Model files between peers: serve chunks that are here, fetch those that are not.

Rules
- A chunk is believed only when it has the digest that the manifest promises; a manifest, when it has the digest that
  names the model. A source that sends anything else is dropped for that blob, and the reason kept.
- All sources of a blob are asked at once, each with at most `WINDOW_CHUNKS_PER_SOURCE` requests in flight over all
  blobs. A source that does not answer in `CHUNK_TIMEOUT_S`, has not got the blob, or is lost, is dropped for that blob;
  its chunks go to the others. Nobody left: `BlobUnavailable`, with every source's reason.
- What has arrived is kept, so an interrupted fetch goes on where it was, also after a restart.
- Serving is bounded by peer: beyond `SERVED_PER_PEER_MAX` requests waiting, further ones are answered as not found. A
  peer that does not take a chunk for as long as it would have waited for it does not get it.

Disk work runs in threads, so that a session's rows never wait for it.
"""

import asyncio
import hashlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

from fallow.domain.errors import BlobCorrupt, BlobUnavailable, FabricError, FallowError
from fallow.domain.frames import Chunk, FetchChunk, Frame, PeerAddress
from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import BLOB_CHUNK_BYTES, BlobRef, Manifest
from fallow.fabric.peers import Peers
from fallow.models.manifest import MAX_MANIFEST_BYTES, decode_manifest
from fallow.models.store import PartialBlob, Store

WINDOW_CHUNKS_PER_SOURCE = 4
CHUNK_TIMEOUT_S = 15.0
BLOBS_IN_PARALLEL_MAX = 4
SERVED_PER_PEER_MAX = 8
"""Requests of one peer that are served at a time; those who fetch have half as many in flight. Each holds a chunk."""

log = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview


class ChunkServer:
    """Answers `FetchChunk`."""

    def __init__(self, store: Store, peers: Peers) -> None:
        self._store = store
        self._peers = peers
        self._serving: Counter[NodeId] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    def handle(self, peer: NodeId, header: FetchChunk) -> None:
        """Answer a request when the disk has delivered. Never waits."""
        if self._serving[peer] >= SERVED_PER_PEER_MAX:
            self._peers.post(peer, Frame(Chunk(digest=header.digest, index=header.index, found=False)))
            return
        self._serving[peer] += 1
        task = asyncio.get_running_loop().create_task(self._serve(peer, header))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, peer: NodeId, header: FetchChunk) -> None:
        try:
            chunk = await asyncio.to_thread(self._store.read_chunk, header.digest, header.index)
            answer = Chunk(digest=header.digest, index=header.index, found=chunk is not None)
            async with asyncio.timeout(CHUNK_TIMEOUT_S):
                await self._peers.send(PeerAddress(peer, ()), Frame(answer, chunk or b""))
        except (FabricError, OSError, TimeoutError) as error:
            log.info("a chunk for %s could not be served: %s", peer[:8], error)
        finally:
            self._serving[peer] -= 1
            if not self._serving[peer]:
                del self._serving[peer]

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


_Key = tuple[NodeId, Digest, int]


class Fetcher:
    """Fetches blobs into the store. One for all models of a device."""

    def __init__(self, store: Store, peers: Peers) -> None:
        self._store = store
        self._peers = peers
        self._awaited: dict[_Key, asyncio.Future[Buffer | None]] = {}
        self._windows: dict[NodeId, asyncio.Semaphore] = {}
        self._blobs = asyncio.Semaphore(BLOBS_IN_PARALLEL_MAX)
        self._fetching: WeakValueDictionary[Digest, asyncio.Lock] = WeakValueDictionary()

    # --- what arrives ---------------------------------------------------------------------------

    def on_chunk(self, peer: NodeId, header: Chunk, payload: Buffer) -> None:
        """Take an answer. One that nobody waits for is ignored."""
        awaited = self._awaited.get((peer, header.digest, header.index))
        if awaited is not None and not awaited.done():
            awaited.set_result(payload if header.found else None)

    def peer_lost(self, peer: NodeId, reason: str) -> None:
        """Give up what a peer was asked for."""
        for key, awaited in list(self._awaited.items()):
            if key[0] == peer and not awaited.done():
                awaited.set_exception(BlobUnavailable(f"the link broke: {reason}"))

    # --- fetching -------------------------------------------------------------------------------

    async def manifest(self, model: Digest, size_bytes: int, sources: Sequence[PeerAddress]) -> Manifest:
        """A model's manifest, from the store or from peers. Raises `BlobUnavailable` or `ModelError`."""
        if not self._store.has(model):
            content = await self._small_blob(model, size_bytes, sources)
            await asyncio.to_thread(self._store.add_bytes, content)
        return decode_manifest(await asyncio.to_thread(self._store.manifest_bytes, model))

    async def _small_blob(self, digest: Digest, size_bytes: int, sources: Sequence[PeerAddress]) -> bytes:
        """A blob whose digest is known and whose chunks' digests are not: from one source at a time."""
        if not 0 < size_bytes <= MAX_MANIFEST_BYTES:
            raise BlobUnavailable(f"a manifest of {size_bytes} bytes is not one that Fallow fetches")
        reasons: list[str] = []
        for source in sources:
            content = bytearray()
            try:
                for index in range(-(-size_bytes // BLOB_CHUNK_BYTES)):
                    content += await self._chunk(source, digest, index)
                if hashlib.sha256(content).hexdigest() == digest:
                    return bytes(content)
                raise BlobCorrupt("its bytes have another digest")
            except FallowError as error:
                reasons.append(f"{source.node[:8]}: {error}")
        raise BlobUnavailable(f"the manifest {digest[:12]} cannot be had: {'; '.join(reasons) or 'no sources'}")

    async def fetch_all(
        self, refs: Sequence[BlobRef], sources: Sequence[PeerAddress], progress: Callable[[float], None]
    ) -> None:
        """Have all these blobs, several at a time. `progress` hears the share of bytes that is here, 0 to 1.

        Raises `BlobUnavailable`.
        """
        total_bytes = sum(ref.size_bytes for ref in refs)
        here_bytes = 0

        def arrived(size_bytes: int) -> None:
            nonlocal here_bytes
            here_bytes += size_bytes
            progress(min(here_bytes / total_bytes, 1.0) if total_bytes else 1.0)

        async with _AllOrNothing() as tasks:
            for ref in refs:
                tasks.create_task(self._fetch(ref, sources, arrived))

    async def _fetch(self, ref: BlobRef, sources: Sequence[PeerAddress], arrived: Callable[[int], None]) -> None:
        # Two models may share a file: the second one waits and finds it there.
        alone = self._fetching.setdefault(ref.digest, asyncio.Lock())
        async with alone, self._blobs:
            if self._store.has(ref.digest):
                arrived(ref.size_bytes)
                return
            partial = await asyncio.to_thread(self._store.partial, ref)
            missing = deque(partial.missing())
            arrived(max(ref.size_bytes - len(missing) * BLOB_CHUNK_BYTES, 0))
            await self._pull(ref, partial, missing, sources, arrived)
            await asyncio.to_thread(partial.complete)

    async def _pull(
        self,
        ref: BlobRef,
        partial: PartialBlob,
        missing: deque[int],
        sources: Sequence[PeerAddress],
        arrived: Callable[[int], None],
    ) -> None:
        reasons: dict[NodeId, str] = {}
        left = len(missing)
        done = asyncio.Event()
        wanted = asyncio.Event()

        async def work(source: PeerAddress) -> None:
            """One request after the other, until nothing is left or the source is dropped."""
            nonlocal left
            while left and source.node not in reasons:
                if not missing:
                    # Others are on the last chunks: stand by, in case that they fail.
                    wanted.clear()
                    await wanted.wait()
                    continue
                index = missing.popleft()
                try:
                    chunk = await self._chunk(source, ref.digest, index)
                    await asyncio.to_thread(partial.write_chunk, index, chunk)
                except BaseException as error:
                    missing.appendleft(index)
                    wanted.set()
                    if not isinstance(error, FallowError):
                        raise
                    if reasons.setdefault(source.node, error.message) == error.message:
                        log.info("blob %s: %s is dropped as a source: %s", ref.digest[:12], source.node[:8], error)
                    break
                left -= 1
                arrived(len(chunk))
            wanted.set()
            if not left or len(reasons) == len(sources):
                done.set()

        if not left:
            return
        if not sources:
            raise BlobUnavailable(f"blob {ref.digest[:12]} cannot be had: no peer is known to have it")
        async with _AllOrNothing() as tasks:
            workers = [tasks.create_task(work(source)) for source in sources for _ in range(WINDOW_CHUNKS_PER_SOURCE)]
            await done.wait()
            for worker in workers:
                worker.cancel()
        if left:
            why = "; ".join(f"{node[:8]}: {reason}" for node, reason in reasons.items())
            raise BlobUnavailable(f"blob {ref.digest[:12]} cannot be had: {why}")

    async def _chunk(self, source: PeerAddress, digest: Digest, index: int) -> Buffer:
        """One chunk from one source, not verified. Raises `FabricError`, `BlobUnavailable`."""
        key = (source.node, digest, index)
        async with self._windows.setdefault(source.node, asyncio.Semaphore(WINDOW_CHUNKS_PER_SOURCE)):
            awaited: asyncio.Future[Buffer | None] = asyncio.get_running_loop().create_future()
            self._awaited[key] = awaited
            try:
                async with asyncio.timeout(CHUNK_TIMEOUT_S):
                    await self._peers.send(source, Frame(FetchChunk(digest=digest, index=index)))
                    chunk = await awaited
            except TimeoutError:
                raise BlobUnavailable(f"chunk {index} did not come within {CHUNK_TIMEOUT_S:g} s") from None
            finally:
                self._awaited.pop(key, None)
        if chunk is None:
            raise BlobUnavailable("it has not got it")
        return chunk


class _AllOrNothing:
    """A group of tasks: the first failure cancels the rest and is raised as it is."""

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> asyncio.TaskGroup:
        return await self._group.__aenter__()

    async def __aexit__(self, *exc: object) -> None:
        try:
            await self._group.__aexit__(*exc)  # type: ignore[arg-type]
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
