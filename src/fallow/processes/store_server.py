"""The operator's store on the network: answers `FetchChunk` on links and announces its models on the bus.

Rules
- The announcement goes out every `ANNOUNCE_INTERVAL_S`, and at once when a coordinator says hello, so a model that is
  added while everything runs is served without a restart.
- Chunks are read in threads by `READERS` tasks; at most `REQUESTS_MAX` requests wait. Beyond that the answer is that the
  chunk was not found here, and the asker tries elsewhere or later.
- Only complete models are announced. Manifests and files are public to whoever may open a link.
"""

import asyncio
import logging
from typing import Final

import msgspec

from fallow.domain.clock import Clock
from fallow.domain.errors import FabricError
from fallow.domain.fleet import ModelEntry, StoreAnnounced, Subjects
from fallow.domain.frames import Chunk, FetchChunk, Frame, PeerAddress
from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import Manifest
from fallow.fabric.contract import Bus, Subscription
from fallow.fabric.peers import Peers
from fallow.models.store import Store

ANNOUNCE_INTERVAL_S: Final = 1.0
READERS: Final = 2
REQUESTS_MAX: Final = 1024

log = logging.getLogger(__name__)


class StoreServer:
    """Serves a store. Feed it frames with `on_frame`."""

    def __init__(
        self, store: Store, bus: Bus, peers: Peers, clock: Clock, subjects: Subjects, address: PeerAddress
    ) -> None:
        self._store = store
        self._bus = bus
        self._peers = peers
        self._clock = clock
        self._subjects = subjects
        self._address = address
        self._requests: asyncio.Queue[tuple[NodeId, FetchChunk]] = asyncio.Queue(REQUESTS_MAX)
        self._entries: dict[Digest, ModelEntry] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Announce, and answer until `close`. Raises `BusUnavailable`."""
        self._subscription = await self._bus.subscribe(self._subjects.hello, self._on_hello)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._answer()) for _ in range(READERS)]
        self._tasks.append(loop.create_task(self._announce_for_ever()))

    async def close(self) -> None:
        if self._subscription is not None:
            await self._subscription.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def on_frame(self, peer: NodeId, frame: Frame) -> bool:
        """Take a request for a chunk; `False` for other kinds. Never waits."""
        header = frame.header
        if not isinstance(header, FetchChunk):
            return False
        try:
            self._requests.put_nowait((peer, header))
        except asyncio.QueueFull:
            self._peers.post(peer, Frame(Chunk(digest=header.digest, index=header.index, found=False)))
        return True

    async def announce(self) -> None:
        """Tell the coordinator what is here now."""
        models = await asyncio.to_thread(self._current_entries)
        announcement = StoreAnnounced(address=self._address, models=models)
        try:
            await self._bus.publish(self._subjects.store, msgspec.json.encode(announcement))
        except FabricError as error:
            log.debug("the store could not be announced: %s", error)

    async def _on_hello(self, _subject: str, _message: bytes) -> None:
        await self.announce()

    async def _announce_for_ever(self) -> None:
        while True:
            try:
                await self.announce()
            except OSError as error:
                log.warning("the store cannot be read: %s", error)
            await self._clock.sleep(ANNOUNCE_INTERVAL_S)

    def _current_entries(self) -> tuple[ModelEntry, ...]:
        """Entries are kept by digest: what a digest stands for cannot change, but files can be removed."""
        current: dict[Digest, ModelEntry] = {}
        for digest, manifest in self._store.models():
            known = self._entries.get(digest)
            if known is not None:
                current[digest] = known
            elif self._store.holds(manifest):
                current[digest] = self._entry(digest, manifest)
        self._entries = current
        return tuple(current.values())

    def _entry(self, digest: Digest, manifest: Manifest) -> ModelEntry:
        path = self._store.blob_path(digest)
        encoded = self._store.manifest_bytes(digest)
        return ModelEntry(
            name=manifest.name,
            model=digest,
            manifest_bytes=len(encoded),
            config=manifest.config,
            quantisation=manifest.quantisation,
            weights_bytes=(
                manifest.embedding.size_bytes,
                manifest.head.size_bytes,
                tuple(layer.size_bytes for layer in manifest.layers),
            ),
            created_unix_s=int(path.stat().st_mtime) if path is not None else 0,
        )

    async def _answer(self) -> None:
        while True:
            peer, wanted = await self._requests.get()
            try:
                content = await asyncio.to_thread(self._store.read_chunk, wanted.digest, wanted.index)
                header = Chunk(digest=wanted.digest, index=wanted.index, found=content is not None)
                # The asker dialled us, so its link is open; without it there is nobody to answer.
                await self._peers.send(PeerAddress(peer, ()), Frame(header, content or b""))
            except (FabricError, OSError) as error:
                log.debug("a chunk for %s was not sent: %s", peer[:8], error)
