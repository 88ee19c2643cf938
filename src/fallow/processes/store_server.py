"""The operator's store on the network: serves its files on links and announces its models on the bus.

Rules
- The announcement goes out every `ANNOUNCE_INTERVAL_S`, and at once when a coordinator says hello, so a model that is
  added while everything runs is served without a restart.
- Only complete models are announced. Manifests and files are public to whoever may open a link.

How chunks are served is `node/fetch.py`'s, as on devices.
"""

import asyncio
import logging
from typing import Final

import msgspec

from fallow.domain.clock import Clock
from fallow.domain.errors import FabricError
from fallow.domain.fleet import ModelEntry, StoreAnnounced, Subjects
from fallow.domain.frames import FetchChunk, Frame, PeerAddress
from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import Manifest
from fallow.fabric.contract import Bus, Subscription
from fallow.fabric.peers import Peers
from fallow.models.store import Store
from fallow.node.fetch import ChunkServer

ANNOUNCE_INTERVAL_S: Final = 1.0

log = logging.getLogger(__name__)


class StoreServer:
    """Serves a store. Feed it frames with `on_frame`."""

    def __init__(
        self, store: Store, bus: Bus, peers: Peers, clock: Clock, subjects: Subjects, address: PeerAddress
    ) -> None:
        self._store = store
        self._bus = bus
        self._chunks = ChunkServer(store, peers)
        self._clock = clock
        self._subjects = subjects
        self._address = address
        self._entries: dict[Digest, ModelEntry] = {}
        self._announcing: asyncio.Task[None] | None = None
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Announce, and answer, until `close`. Raises `BusUnavailable`."""
        self._subscription = await self._bus.subscribe(self._subjects.hello, self._on_hello)
        self._announcing = asyncio.get_running_loop().create_task(self._announce_for_ever())

    async def close(self) -> None:
        if self._subscription is not None:
            await self._subscription.cancel()
        if self._announcing is not None:
            self._announcing.cancel()
            await asyncio.gather(self._announcing, return_exceptions=True)
        await self._chunks.close()

    def on_frame(self, peer: NodeId, frame: Frame) -> bool:
        """Take a request for a chunk; `False` for other kinds. Never waits."""
        header = frame.header
        if not isinstance(header, FetchChunk):
            return False
        self._chunks.handle(peer, header)
        return True

    async def announce(self) -> None:
        """Tell the coordinator what is here now."""
        models = await asyncio.to_thread(self._current_entries)
        announcement = StoreAnnounced(address=self._address, models=models)
        try:
            await self._bus.publish(self._subjects.store(self._address.node), msgspec.json.encode(announcement))
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
