"""Carries out orders: fetches what a stage needs, has the engine load it, and says how far it is.

Rules
- One task for each model carries out the newest order. A newer order ends the fetching for an older one; a load
  that has begun is let finish, because the engine cannot be left half way, and the newer order follows.
- What is hosted already serves on until the engine has loaded what replaces it.
- Fetching is tried again `FETCH_TRIES_MAX` times, with growing pauses. After that, and after a load that fails, the
  stage is `FAILED` with the reason, until the next order.
- When the engine was lost, or the device may work again, everything that was ready is loaded again from the files that
  are here.

It does not decide what to host, and does not restart the engine.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from fallow.domain.clock import Clock
from fallow.domain.errors import BlobCorrupt, BlobUnavailable, FallowError
from fallow.domain.fleet import Accepted, DropStage, HostedStage, NodeCommand, PlaceStage, StageStatus
from fallow.domain.ids import Digest
from fallow.domain.model import BlobRef, StageSpec
from fallow.engine.contract import Loaded, StageEngine
from fallow.models.manifest import layer_files
from fallow.models.store import Store
from fallow.node.fetch import Fetcher
from fallow.node.row_checks import RowChecks

FETCH_TRIES_MAX = 4
FETCH_PAUSE_S = 1.0
MODELS_MAX = 32
ERROR_MAX_CHARS = 500
PROGRESS_STEP = 0.05
"""How much must arrive before a change is worth a heartbeat."""

log = logging.getLogger(__name__)


class _Hosted:
    """One model on this device."""

    def __init__(self) -> None:
        self.order: PlaceStage | None = None
        """The newest order; `None` when it is to be dropped."""
        self.ready: StageSpec | None = None
        self.loaded: Loaded | None = None
        self.status = StageStatus.FETCHING
        self.progress = 0.0
        self.error: str | None = None
        self.doubtful = False
        """Whether its files are to be read and hashed before they are used again."""
        self.newer = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.fetching: asyncio.Task[None] | None = None

    @property
    def settled(self) -> bool:
        return self.order is not None and self.ready == self.order.stage


class Hosting:
    """What this device hosts. `on_change` is called after every change that a heartbeat should tell."""

    def __init__(
        self, engine: StageEngine, store: Store, fetcher: Fetcher, clock: Clock, on_change: Callable[[], None],
        checks: RowChecks | None = None,
    ) -> None:  # fmt: skip
        """`checks` learn the rules of what is hosted here."""
        self._checks = checks or RowChecks()
        self._engine = engine
        self._store = store
        self._fetcher = fetcher
        self._clock = clock
        self._on_change = on_change
        self._models: dict[Digest, _Hosted] = {}
        self._loading = asyncio.Lock()
        self._closed = False

    # --- orders ---------------------------------------------------------------------------------

    def order(self, command: NodeCommand) -> Accepted:
        """Take an order; carrying it out goes on in the background."""
        match command:
            case PlaceStage():
                return self._place(command)
            case DropStage():
                return self._drop(command)

    def _place(self, command: PlaceStage) -> Accepted:
        edge = 0
        for piece in command.stage.pieces:
            if not edge <= piece.first < piece.last:
                return Accepted(ok=False, message=f"expected ascending pieces that do not overlap, got {piece}")
            edge = piece.last
        if not command.stage.pieces:
            return Accepted(ok=False, message="expected pieces to host, got none")
        if command.stage.model not in self._models and len(self._models) >= MODELS_MAX:
            return Accepted(ok=False, message=f"{MODELS_MAX} models are hosted here already")
        hosted = self._models.setdefault(command.stage.model, _Hosted())
        same = hosted.order is not None and hosted.order.stage == command.stage
        if same and hosted.status is not StageStatus.FAILED:
            return Accepted(ok=True, message="that is so already, or under way")
        self._renew(command.stage.model, hosted, command)
        return Accepted(ok=True)

    def _drop(self, command: DropStage) -> Accepted:
        hosted = self._models.get(command.model)
        if hosted is not None:
            self._renew(command.model, hosted, None)
        return Accepted(ok=True)

    def _renew(self, model: Digest, hosted: _Hosted, order: PlaceStage | None) -> None:
        hosted.order = order
        hosted.status = StageStatus.READY if hosted.settled else StageStatus.FETCHING
        hosted.progress = 0.0
        hosted.error = None
        hosted.newer.set()
        if hosted.fetching is not None:
            hosted.fetching.cancel()
        if hosted.task is None or hosted.task.done():
            hosted.task = asyncio.get_running_loop().create_task(self._carry_out(model, hosted))
        self._on_change()

    # --- what is hosted -------------------------------------------------------------------------

    def hosted(self) -> tuple[HostedStage, ...]:
        """For each model: what is ready, and what is on the way to replace it or has failed to."""
        stages: list[HostedStage] = []
        for item in self._models.values():
            if item.ready is not None and item.loaded is not None:
                stages.append(
                    HostedStage(
                        stage=item.ready,
                        status=StageStatus.READY,
                        weights_bytes=item.loaded.weights_bytes,
                        progress=1.0,
                        speed=item.loaded.speed,
                    )
                )
            if item.order is not None and not item.settled:
                stages.append(
                    HostedStage(
                        stage=item.order.stage,
                        status=item.status,
                        progress=item.progress,
                        error=item.error,
                        damaged=item.doubtful,
                    )
                )
        return tuple(stages)

    # --- carrying out ---------------------------------------------------------------------------

    async def _carry_out(self, model: Digest, hosted: _Hosted) -> None:
        """Until the newest order is carried out or has failed."""
        while True:
            hosted.newer.clear()
            order = hosted.order
            try:
                if order is None:
                    await self._unload(model, hosted)
                elif not hosted.settled:
                    await self._host(order, hosted)
            except asyncio.CancelledError:
                if self._closed or not hosted.newer.is_set():
                    raise
            except Exception as error:
                if not isinstance(error, FallowError):
                    log.exception("hosting model %s failed", model[:8])
                if hosted.order is order:
                    self._failed(hosted, error)
            if not hosted.newer.is_set():
                return

    def _failed(self, hosted: _Hosted, error: Exception) -> None:
        text = error.message if isinstance(error, FallowError) else f"{type(error).__name__}: {error}"
        hosted.status = StageStatus.FAILED
        hosted.error = _printable(text)
        log.warning("a stage failed to load: %s", hosted.error)
        self._on_change()

    async def _unload(self, model: Digest, hosted: _Hosted) -> None:
        async with self._loading:
            if hosted.order is not None:
                return
            hosted.ready = hosted.loaded = None
            self._on_change()
            await self._engine.unload(model)
            self._checks.forget(model)
        if hosted.order is None:
            del self._models[model]
            self._on_change()

    async def _host(self, order: PlaceStage, hosted: _Hosted) -> None:
        if hosted.doubtful:
            await self._discard_damaged(order)
            hosted.doubtful = False
        hosted.fetching = asyncio.get_running_loop().create_task(self._fetch(order, hosted))
        try:
            await hosted.fetching
        finally:
            hosted.fetching.cancel()
            hosted.fetching = None
        async with self._loading:
            if hosted.order is not order:
                return
            await self._load(order.stage, hosted)

    async def _load(self, stage: StageSpec, hosted: _Hosted) -> None:
        hosted.status = StageStatus.LOADING
        self._on_change()
        manifest = await asyncio.to_thread(self._store.manifest, stage.model)
        files = {ref.digest: self._store.blob_path(ref.digest) for ref in layer_files(manifest, stage)}
        there = {digest: path for digest, path in files.items() if path is not None}
        if len(there) < len(files):
            raise BlobUnavailable("a file was removed from the store before it could be loaded")
        self._checks.learn(stage.model, manifest)
        hosted.loaded = await self._engine.load(stage, manifest, there)
        hosted.ready = stage
        if hosted.settled:
            hosted.status = StageStatus.READY
            hosted.error = None
        log.info("hosting %s of %s", ", ".join(map(str, stage.pieces)), manifest.name)
        self._on_change()

    async def _fetch(self, order: PlaceStage, hosted: _Hosted) -> None:
        for tried in range(1, FETCH_TRIES_MAX + 1):
            try:
                manifest = await self._fetcher.manifest(order.stage.model, order.manifest_bytes, order.sources)
                refs = layer_files(manifest, order.stage)
                await self._fetcher.fetch_all(refs, order.sources, lambda share: self._progressed(hosted, share))
                return
            except (BlobUnavailable, BlobCorrupt) as error:
                if tried == FETCH_TRIES_MAX:
                    raise
                log.info("fetching for model %s failed, once more soon: %s", order.stage.model[:8], error)
                await self._clock.sleep(FETCH_PAUSE_S * 2 ** (tried - 1))

    def _progressed(self, hosted: _Hosted, share: float) -> None:
        told = int(hosted.progress / PROGRESS_STEP)
        hosted.progress = share
        if int(share / PROGRESS_STEP) > told:
            self._on_change()

    # --- the engine's life ----------------------------------------------------------------------

    async def _discard_damaged(self, order: PlaceStage) -> None:
        """Remove files that are not what their digest says, so that they are fetched again."""
        manifest = await asyncio.to_thread(self._store.manifest, order.stage.model)
        damaged = await asyncio.to_thread(_damaged, self._store, layer_files(manifest, order.stage))
        for path in damaged:
            log.warning("the file %s of %s has changed on the disk; it is fetched again", path.name[:12], manifest.name)
            path.unlink(missing_ok=True)

    def engine_damaged(self, why: str) -> None:
        """The engine found that what it held had changed: what was ready has failed, until `reload` has it loaded again
        from files that are hashed first."""
        held = [hosted for hosted in self._models.values() if hosted.ready is not None and hosted.order is not None]
        self.engine_lost()
        for hosted in held:
            hosted.status, hosted.error, hosted.doubtful = StageStatus.FAILED, _printable(why), True
        self._on_change()

    def engine_lost(self) -> None:
        """Nothing is ready any more. Orders stay, and are carried out again by `reload`."""
        for hosted in self._models.values():
            if hosted.ready is not None and hosted.order is not None:
                hosted.status = StageStatus.LOADING
            hosted.ready = hosted.loaded = None
        self._on_change()

    def stop(self) -> None:
        """This device may not work: end what is being fetched or loaded. Orders stay, and `reload` carries them out."""
        for hosted in self._models.values():
            if hosted.task is not None and not hosted.task.done():
                hosted.task.cancel()
        self.engine_lost()

    def drop_all_but(self, allowed: Callable[[Digest], bool]) -> tuple[Digest, ...]:
        """Stop hosting models that are not allowed any more; which these are."""
        dropped = [model for model, hosted in self._models.items() if hosted.order is not None and not allowed(model)]
        for model in dropped:
            self._renew(model, self._models[model], None)
        return tuple(dropped)

    def reload(self) -> None:
        """The engine runs again: load everything that should be here, also what failed because it was lost."""
        for model, hosted in list(self._models.items()):
            if not hosted.settled:
                self._renew(model, hosted, hosted.order)

    async def close(self) -> None:
        """Stop fetching and loading. The engine remains its owner's to close."""
        self._closed = True
        tasks = [hosted.task for hosted in self._models.values() if hosted.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _damaged(store: Store, refs: Iterable[BlobRef]) -> list[Path]:
    """Those of these files that are here and are not what their digest says. Reads them all."""
    found = []
    for ref in refs:
        path = store.blob_path(ref.digest)
        if path is None:
            continue
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != ref.digest:
                found.append(path)
    return found


def _printable(text: str) -> str:
    return "".join(filter(str.isprintable, " ".join(text.split())))[:ERROR_MAX_CHARS]
