"""What of models is on this device's disk, hosted or not, and how much room is left: what a heartbeat tells of it.

Rules
- Looked up in a thread, at the start and when something that was fetched may have changed it; a heartbeat only reads
  the last result.
- A layer counts when its file is in the store. Whether embedding and head are there too is found out when a stage is
  ordered.
"""

import asyncio
import shutil
from collections.abc import Iterable
from typing import Final

import msgspec

from fallow.domain.ids import Digest
from fallow.domain.model import Manifest, Span
from fallow.models.store import Store

MODELS_MAX: Final = 64
"""Of which layers are told; a disk that has parts of more tells the first."""


class Shelf(msgspec.Struct, frozen=True, kw_only=True):
    """What is there."""

    cached: dict[Digest, tuple[Span, ...]] = {}
    disk_free_bytes: int | None = None


class ShelfReader:
    """Looks it up. One for each device."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._manifests: dict[Digest, Manifest] | None = None

    async def read(self, hosted: Iterable[Digest] = ()) -> Shelf:
        """The shelf now; `hosted` are models whose manifests may be new."""
        return await asyncio.to_thread(self._read, tuple(hosted))

    def _read(self, hosted: tuple[Digest, ...]) -> Shelf:
        if self._manifests is None:
            self._manifests = dict(self._store.manifests()[:MODELS_MAX])
        for model in hosted:
            if model not in self._manifests and len(self._manifests) < MODELS_MAX and self._store.has(model):
                self._manifests[model] = self._store.manifest(model)
        spans = {model: layers_there(self._store, manifest) for model, manifest in self._manifests.items()}
        return Shelf(cached={model: there for model, there in spans.items() if there}, disk_free_bytes=self._free())

    def _free(self) -> int | None:
        root = getattr(self._store, "root", None)
        if root is None:
            return None
        try:
            return shutil.disk_usage(root).free
        except OSError:
            return None


def layers_there(store: Store, manifest: Manifest) -> tuple[Span, ...]:
    """The maximal runs of layers whose files are in the store."""
    spans: list[Span] = []
    for index, ref in enumerate(manifest.layers):
        if not store.has(ref.digest):
            continue
        if spans and spans[-1].last == index:
            spans[-1] = Span(spans[-1].first, index + 1)
        else:
            spans.append(Span(index, index + 1))
    return tuple(spans)
