"""Hosting: the newest order wins, what serves goes on serving, failures are told and can be tried again."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from fallow.domain.errors import EngineError
from fallow.domain.fleet import DropStage, HostedStage, ModelEntry, PlaceStage, StageStatus
from fallow.domain.ids import Digest
from fallow.domain.model import Manifest, Span, StageSpec
from fallow.engine.contract import Loaded
from fallow.engine.memory import MemoryEngine
from fallow.fabric.memory import MemoryFabric
from fallow.node.hosting import Hosting
from fallow.simulator.virtual_time import LoopClock, run_virtual
from tests.simulation.control import toy_model
from tests.unit.node.support import Receiver, Source

A, B, C = Span(0, 2), Span(2, 4), Span(4, 6)


class Engine(MemoryEngine):
    """Remembers what it loaded; refuses to while `broken`."""

    def __init__(self) -> None:
        super().__init__(load_s=1.0)
        self.broken = False
        self.loads: list[tuple[Span, ...]] = []

    async def load(self, stage: StageSpec, manifest: Manifest, files: Mapping[Digest, Path]) -> Loaded:
        self.loads.append(stage.pieces)
        if self.broken:
            raise EngineError("out of\nmemory")
        assert all(path.is_file() for path in files.values())
        return await super().load(stage, manifest, files)


class Bench:
    """One device's hosting, with a store peer beside it."""

    def __init__(self, folder: Path) -> None:
        fabric = MemoryFabric(0.001)
        self.receiver = Receiver(fabric, folder)
        self.source = Source(fabric, 1, folder)
        self.engine = Engine()
        self.changes = 0
        self.entry: ModelEntry = toy_model(self.source.store)
        self.hosting = Hosting(self.engine, self.receiver.store, self.receiver.fetcher, LoopClock(), self._on_change)

    def _on_change(self) -> None:
        self.changes += 1

    def place(self, *pieces: Span) -> bool:
        stage = StageSpec(model=self.entry.model, pieces=pieces)
        command = PlaceStage(stage=stage, manifest_bytes=self.entry.manifest_bytes, sources=(self.source.address,))
        return self.hosting.order(command).ok

    def told(self) -> list[tuple[tuple[Span, ...], StageStatus]]:
        return [(item.stage.pieces, item.status) for item in self.hosting.hosted()]

    async def until(self, *told: tuple[tuple[Span, ...], StageStatus]) -> None:
        async with asyncio.timeout(60):
            while self.told() != list(told):
                await asyncio.sleep(0.01)


def run(folder: Path, script: Callable[[Bench], Awaitable[None]]) -> None:
    async def program() -> None:
        bench = Bench(folder)
        await bench.source.peers.start()
        await bench.receiver.peers.start()
        await bench.engine.start()
        await script(bench)
        await bench.hosting.close()

    run_virtual(program())


def test_an_order_is_fetched_loaded_and_ready_and_every_step_is_told(tmp_path: Path) -> None:
    async def script(bench: Bench) -> None:
        seen: list[StageStatus] = []
        assert bench.place(A, B)
        while StageStatus.READY not in seen:
            (item,) = bench.hosting.hosted()
            if item.status not in seen:
                seen.append(item.status)
            await asyncio.sleep(0.0001)
        assert seen == [StageStatus.FETCHING, StageStatus.LOADING, StageStatus.READY]
        assert bench.changes >= 3
        ready: HostedStage = bench.hosting.hosted()[0]
        assert ready.speed is not None
        assert ready.weights_bytes > 0
        changes = bench.changes
        assert bench.place(A, B)
        await asyncio.sleep(5)
        assert (bench.engine.loads, bench.changes) == ([(A, B)], changes), "the same order again changes nothing"

    run(tmp_path, script)


def test_only_the_files_of_the_stage_are_fetched(tmp_path: Path) -> None:
    async def script(bench: Bench) -> None:
        bench.place(B)
        await bench.until(((B,), StageStatus.READY))
        manifest = bench.source.store.manifest(bench.entry.model)
        here = [bench.receiver.store.has(ref.digest) for ref in manifest.layers]
        assert here == [False, False, True, True, False, False]
        assert not bench.receiver.store.has(manifest.embedding.digest)

    run(tmp_path, script)


def test_what_is_ready_serves_until_its_successor_is(tmp_path: Path) -> None:
    async def script(bench: Bench) -> None:
        bench.place(A)
        await bench.until(((A,), StageStatus.READY))
        bench.place(A, B)
        await bench.until(((A,), StageStatus.READY), ((A, B), StageStatus.LOADING))
        await bench.until(((A, B), StageStatus.READY))

    run(tmp_path, script)


def test_a_newer_order_ends_fetching_for_an_older_one(tmp_path: Path) -> None:
    async def script(bench: Bench) -> None:
        bench.place(A)
        await asyncio.sleep(0.004)
        bench.place(C)
        await bench.until(((C,), StageStatus.READY))
        assert bench.engine.loads == [(C,)]

    run(tmp_path, script)


def test_a_newer_order_follows_a_load_that_has_begun(tmp_path: Path) -> None:
    async def script(bench: Bench) -> None:
        bench.place(A)
        await bench.until(((A,), StageStatus.LOADING))
        await asyncio.sleep(0.5)
        bench.place(C)
        await bench.until(((A,), StageStatus.READY), ((C,), StageStatus.LOADING))
        await bench.until(((C,), StageStatus.READY))
        assert bench.engine.loads == [(A,), (C,)]

    run(tmp_path, script)


def test_a_model_that_is_dropped_while_it_loads_goes(tmp_path: Path) -> None:
    async def script(bench: Bench) -> None:
        bench.place(A)
        await bench.until(((A,), StageStatus.LOADING))
        assert bench.hosting.order(DropStage(model=bench.entry.model)).ok
        await bench.until()
        bench.place(B)
        await bench.until(((B,), StageStatus.READY))

    run(tmp_path, script)


def test_a_failed_load_is_told_leaves_what_serves_and_can_be_ordered_again(tmp_path: Path) -> None:
    async def script(bench: Bench) -> None:
        bench.place(A)
        await bench.until(((A,), StageStatus.READY))
        bench.engine.broken = True
        bench.place(A, B)
        await bench.until(((A,), StageStatus.READY), ((A, B), StageStatus.FAILED))
        assert bench.hosting.hosted()[1].error == "out of memory"
        bench.engine.broken = False
        bench.place(A, B)
        await bench.until(((A, B), StageStatus.READY))

    run(tmp_path, script)


def test_an_order_back_to_what_is_ready_needs_no_load(tmp_path: Path) -> None:
    async def script(bench: Bench) -> None:
        bench.place(A)
        await bench.until(((A,), StageStatus.READY))
        bench.place(A, B)
        bench.place(A)
        await bench.until(((A,), StageStatus.READY))
        await asyncio.sleep(5)
        assert bench.engine.loads == [(A,)]

    run(tmp_path, script)


def test_when_no_source_answers_the_failure_is_told(tmp_path: Path) -> None:
    async def script(bench: Bench) -> None:
        await bench.source.peers.close()
        bench.place(A)
        await bench.until(((A,), StageStatus.FAILED))
        assert "cannot be had" in (bench.hosting.hosted()[0].error or "")

    run(tmp_path, script)


def test_after_a_loss_of_the_engine_everything_is_loaded_again(tmp_path: Path) -> None:
    async def script(bench: Bench) -> None:
        bench.place(A)
        await bench.until(((A,), StageStatus.READY))
        bench.engine.crash()
        bench.hosting.engine_lost()
        assert bench.told() == [((A,), StageStatus.LOADING)]
        await bench.engine.start()
        asked = len(bench.source.asked)
        bench.hosting.reload()
        await bench.until(((A,), StageStatus.READY))
        assert len(bench.source.asked) == asked

    run(tmp_path, script)


def test_an_engine_that_found_damage_is_loaded_again_from_files_that_are_hashed_first(tmp_path: Path) -> None:
    async def script(bench: Bench) -> None:
        bench.place(A)
        await bench.until(((A,), StageStatus.READY))
        layer = bench.source.store.manifest(bench.entry.model).layers[0]
        damaged = bench.receiver.store.blob_path(layer.digest)
        assert damaged is not None
        content = damaged.read_bytes()
        damaged.chmod(0o644)
        damaged.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        bench.engine.crash()
        bench.hosting.engine_damaged("piece [0,2) answers otherwise (canary)")
        [stage] = bench.hosting.hosted()
        assert (stage.status, stage.error) == (StageStatus.FAILED, "piece [0,2) answers otherwise (canary)")
        await bench.engine.start()
        bench.hosting.reload()
        await bench.until(((A,), StageStatus.READY))
        assert damaged.read_bytes() == content, "it was fetched again"

    run(tmp_path, script)


def test_orders_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    async def script(bench: Bench) -> None:
        for pieces in ((), (B, A), (Span(2, 2),), (Span(0, 3), Span(2, 4))):
            assert not bench.place(*pieces)
        assert bench.hosting.order(DropStage(model=Digest("ee" * 32))).ok
        bench.place(Span(4, 9))
        await bench.until(((Span(4, 9),), StageStatus.FAILED))

    run(tmp_path, script)
