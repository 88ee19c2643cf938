"""A damaged device stops where it is: workers in their sandbox, bits flipped in a live worker, rows that lie.

Real workers with the default model or a small one, real stages on links in memory. What needs rights that this machine
does not give is skipped with the reason.
"""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "engine"))

from engine_world import Model, family, name_of, step_of

from fallow.domain.errors import EngineLost
from fallow.domain.frames import Phase
from fallow.domain.model import Quantisation
from fallow.engine.client import WorkerEngine
from fallow.engine.confined import filter_is_known, landlock_version
from fallow.engine.sandbox import bubblewrap_works
from fallow.engine.settings import Confinement, EngineSettings

KINDS = [
    pytest.param(
        Confinement.BUBBLEWRAP,
        marks=pytest.mark.skipif(not bubblewrap_works(), reason="bubblewrap is not installed, or may not work here"),
    ),
    pytest.param(
        Confinement.LANDLOCK,
        marks=pytest.mark.skipif(
            landlock_version() < 1 or not filter_is_known(), reason="this kernel has no Landlock, or is not known"
        ),
    ),
]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
QUICK = EngineSettings(
    niceness=0, slots_max=4, max_session_tokens=192, canary_interval_s=0.05, rehash_share=0.5, rehash_rest_s=0.1
)


def model() -> Model:
    return family("qwen2", Quantisation.Q8)


async def loaded(settings: EngineSettings) -> WorkerEngine:
    engine = WorkerEngine(settings, [model().folder])
    await engine.start()
    stage = model().stage()
    await engine.load(stage, model().manifest, model().files(stage))
    return engine


async def answer(engine: WorkerEngine, number: int) -> bytes:
    name = name_of(number)
    await engine.open(name, model().digest, model().whole, 60)
    said = [await engine.step(step_of(name, 0, [5, 6, 7, 8]))]
    said += [await engine.step(step_of(name, 4 + i, [9 + i], Phase.DECODE)) for i in range(4)]
    await engine.free(name)
    return b"".join(bytes(stepped.payload) for stepped in said)


def with_settings(settings: EngineSettings, **changed: object) -> EngineSettings:
    return EngineSettings(**{**{name: getattr(settings, name) for name in settings.__struct_fields__}, **changed})


# --- the sandbox --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_confined_worker_answers_as_an_unconfined_one(kind: Confinement) -> None:
    async def script() -> None:
        answers = []
        for confinement in (Confinement.NONE, kind):
            engine = await loaded(with_settings(QUICK, confinement=confinement))
            assert engine.confinement is confinement
            answers.append(await answer(engine, 1))
            assert await engine.check() is None
            await engine.close()
        assert answers[0] == answers[1]

    asyncio.run(script())


@LINUX
@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_has_no_rights_no_network_and_no_descriptor_but_its_channel(kind: Confinement) -> None:
    async def script() -> None:
        engine = await loaded(with_settings(QUICK, confinement=kind))
        assert engine.process_id is not None
        own = Path(f"/proc/{engine.process_id}")
        status = dict(line.split(":\t", 1) for line in (own / "status").read_text().splitlines() if ":\t" in line)
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        names = [str(entry.readlink()) for entry in (own / "fd").iterdir()]
        sockets = [name for name in names if name.startswith("socket:")]
        assert len(sockets) == 1, names
        others = {name.split(":")[0] for name in names if not name.startswith(("socket:", str(model().folder)))}
        assert others <= {"/dev/null", "pipe"}, names
        if kind is Confinement.BUBBLEWRAP:
            assert int(status["CapEff"], 16) == 0
            assert (own / "ns" / "net").readlink() != Path("/proc/self/ns/net").readlink()
            assert not (own / "root" / "etc" / "passwd").exists()
        await engine.close()

    asyncio.run(script())


@LINUX
@pytest.mark.parametrize("kind", KINDS)
def test_no_worker_outlives_an_agent_that_is_killed(kind: Confinement) -> None:
    script = textwrap.dedent(f"""
        import asyncio, sys
        from fallow.engine.client import WorkerEngine
        from fallow.engine.settings import Confinement, EngineSettings
        async def main():
            engine = WorkerEngine(EngineSettings(confinement=Confinement("{kind}")), [])
            await engine.start()
            print(engine.process_id, flush=True)
            await asyncio.sleep(60)
        asyncio.run(main())
    """)
    agent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    worker = psutil.Process(int(agent.stdout.readline()))
    agent.kill()
    agent.wait()
    gone, alive = psutil.wait_procs([worker], timeout=5)
    assert gone and not alive


@LINUX
@pytest.mark.parametrize("kind", KINDS)
def test_the_agent_can_stop_a_worker_at_once_even_a_stopped_one(kind: Confinement) -> None:
    async def script() -> None:
        engine = await loaded(with_settings(QUICK, confinement=kind))
        assert engine.process_id is not None
        worker = psutil.Process(engine.process_id)
        os.kill(engine.process_id, signal.SIGSTOP)
        began_s = time.monotonic()
        await engine.close()
        await asyncio.to_thread(psutil.wait_procs, [worker], 5)
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
        assert time.monotonic() - began_s < 3
        assert not engine.lost.is_set()

    asyncio.run(script())


# --- bits in a live worker ----------------------------------------------------------------------


def _weights_in(process: int, pattern: bytes) -> list[int]:
    """Where these bytes lie in a process's own memory."""
    found = []
    with Path(f"/proc/{process}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{process}/maps").read_text().splitlines():
            words = line.split()
            start, end = (int(part, 16) for part in words[0].split("-"))
            if not words[1].startswith("rw") or words[4] != "0" or end - start > 1 << 28:
                continue
            try:
                memory.seek(start)
                data = memory.read(end - start)
            except OSError:
                continue
            at = data.find(pattern)
            while at >= 0:
                found.append(start + at)
                at = data.find(pattern, at + 1)
    return found


@LINUX
@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_in_the_runtimes_copy_of_a_weight_ends_the_worker_with_the_reason(kind: Confinement) -> None:
    """A norm's float32 weights are where they can be recognised; the packed matrices are flipped by the benchmark."""

    async def script() -> None:
        engine = await loaded(with_settings(QUICK, confinement=kind, canary_interval_s=0.0, rehash_share=0.0))
        assert engine.process_id is not None and await engine.check() is None
        from fallow.models.tensors import Part, open_tensors

        manifest = model().manifest
        path = model().files(model().stage())[manifest.layers[1].digest]
        norm = open_tensors(path, manifest.config, manifest.quantisation, Part.LAYER)["mlp_norm"]
        try:
            places = _weights_in(engine.process_id, norm.tobytes())
        except PermissionError:
            pytest.skip("this user may not look into the memory of its own children")
        assert places
        found = None
        with Path(f"/proc/{engine.process_id}/mem").open("r+b", buffering=0) as memory:
            for place in places:
                memory.seek(place + 2)
                byte = memory.read(1)[0]
                memory.seek(place + 2)
                memory.write(bytes([byte ^ 1 << 6]))
                found = found or await engine.check()
        assert found is not None and "piece" in found and "canary" in found
        await engine.close()

    asyncio.run(script())


@LINUX
def test_a_canary_that_fails_by_itself_takes_the_engine_out_of_service(tmp_path: Path) -> None:
    async def script() -> None:
        files = {}
        stage = model().stage()
        for digest, path in model().files(stage).items():
            files[digest] = tmp_path / digest
            files[digest].write_bytes(path.read_bytes())
        engine = WorkerEngine(QUICK, [tmp_path])
        await engine.start()
        await engine.load(stage, model().manifest, files)
        await answer(engine, 1)
        victim = model().manifest.layers[0].digest
        with files[victim].open("r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"\x55")
        await asyncio.wait_for(engine.lost.wait(), 60)
        assert engine.loss is not None and engine.loss.damaged
        assert victim[:12] in engine.loss.reason and "re-hash" in engine.loss.reason
        with pytest.raises(EngineLost):
            await answer(engine, 2)
        await engine.close()

    asyncio.run(script())


# --- rows that lie ------------------------------------------------------------------------------


def test_the_default_models_rows_pass_and_damaged_ones_do_not(store: Path) -> None:
    from fallow.domain.model import Span, StageSpec
    from fallow.engine.core import EngineCore
    from fallow.models.manifest import layer_files, manifest_digest
    from fallow.models.store import Store
    from fallow.node.row_checks import RowChecks

    files = Store(store)
    (_, manifest), *_ = files.models()
    digest, span = manifest_digest(manifest), Span(0, 15)
    core = EngineCore(EngineSettings(niceness=0, slots_max=2))
    stage = StageSpec(model=digest, pieces=(span,))
    paths = {ref.digest: files.blob_path(ref.digest) for ref in layer_files(manifest, stage)}
    core.load(stage, manifest, {name: path for name, path in paths.items() if path is not None})
    checks = RowChecks()
    checks.learn(digest, manifest)
    tokens = np.random.default_rng(1).integers(manifest.config.vocab_size, size=120).tolist()
    core.open(name_of(1), digest, span, 200)
    core.step(1, step_of(name_of(1), 0, tokens))
    while core.has_work:
        core.turn()
    [(_, stepped)] = core.outcomes()
    rows = np.frombuffer(stepped.payload, np.float16).reshape(len(tokens), -1)
    assert checks.complaint(digest, 15, rows.tobytes(), len(rows)) is None
    damaged = rows.copy()
    damaged.view(np.uint16)[60, 100] |= 0x7C00
    assert checks.complaint(digest, 15, damaged.tobytes(), len(rows)) is not None
    with np.errstate(over="ignore"):
        tampered = (rows * np.float16(8), rows * np.float16(0), -rows * np.float16(9))
    for wrong in tampered:
        assert checks.complaint(digest, 15, wrong[60:61].tobytes(), 1) is not None
