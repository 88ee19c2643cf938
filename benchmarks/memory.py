"""Resident memory of a worker process against its promise: weights, KV budget and 250 MB.

    python benchmarks/memory.py [--store FOLDER] [--tokens 4096]

Method: a worker hosts a span of the default model, sessions fill its KV budget, and then its resident set is read
(Linux: `VmRSS`, and `VmHWM` for the peak while loading).

Results: a table, and JSON in `benchmarks/results/memory.json`.
"""

import argparse
import asyncio
import json
from pathlib import Path

import numpy as np
import platformdirs

from fallow.domain.frames import Phase
from fallow.domain.ids import SessionId
from fallow.domain.model import Span, StageSpec, cut_points
from fallow.engine.client import WorkerEngine
from fallow.engine.contract import Loaded, Step
from fallow.engine.settings import EngineSettings
from fallow.models.default import ensure_default_model
from fallow.models.manifest import layer_files, manifest_digest
from fallow.models.store import Store

ALLOWANCE_BYTES = 250_000_000
STEP_ROWS = 128


class Measured:
    """One span: what it may take and what it takes."""

    def __init__(self, span: Span, loaded: Loaded, kv_bytes: int, memory: dict[str, int]) -> None:
        self.span = span
        self.loaded = loaded
        self.kv_bytes = kv_bytes
        self.resident_bytes, self.peak_bytes = memory["VmRSS"], memory["VmHWM"]
        self.allowed_bytes = loaded.weights_bytes + kv_bytes + ALLOWANCE_BYTES


async def measure(store: Store, parts: int, tokens: int) -> Measured:
    """Host one of `parts` spans of the model and fill `tokens` tokens of cache."""
    manifest = ensure_default_model(store)
    layers = manifest.config.layer_count
    last = min((cut for cut in (*cut_points(layers), layers) if cut * parts >= layers), default=layers)
    span, digest = Span(0, last), manifest_digest(manifest)
    stage = StageSpec(model=digest, pieces=(span,))
    config = manifest.config
    kv_bytes = tokens * 2 * 4 * config.kv_head_count * config.head_dim * span.layer_count
    engine = WorkerEngine(EngineSettings(kv_budget_bytes=kv_bytes), [store.root])
    await engine.start()
    try:
        paths = {ref.digest: store.blob_path(ref.digest) for ref in layer_files(manifest, stage)}
        loaded = await engine.load(stage, manifest, {name: path for name, path in paths.items() if path is not None})
        for number in range(4):
            name = SessionId(f"{number:032x}")
            await engine.open(name, digest, span, tokens // 4)
            for position in range(0, tokens // 4, STEP_ROWS):
                rows = np.full(min(STEP_ROWS, tokens // 4 - position), 17, np.int32)
                await engine.step(
                    Step(
                        session=name, position=position, count=len(rows), phase=Phase.PREFILL, logits_from=1 << 30,
                        top_k=1, payload=rows.tobytes(),
                    )
                )  # fmt: skip
        assert engine.process_id is not None
        return Measured(span, loaded, kv_bytes, memory_of(engine.process_id))
    finally:
        await engine.close()


def memory_of(process_id: int) -> dict[str, int]:
    """`VmRSS` and `VmHWM` in bytes."""
    fields = (line.split() for line in Path(f"/proc/{process_id}/status").read_text().splitlines())
    return {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields if field[0] in ("VmRSS:", "VmHWM:")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=platformdirs.user_cache_path("fallow") / "bench-store")
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    rows = []
    print(f"{'span':>8}{'weights MB':>12}{'KV MB':>8}{'resident MB':>13}{'peak MB':>9}{'allowed MB':>12}{'load s':>8}")
    for parts in (1, 2, 3):
        found = asyncio.run(measure(Store(options.store), parts, options.tokens))
        sizes = (
            found.loaded.weights_bytes,
            found.kv_bytes,
            found.resident_bytes,
            found.peak_bytes,
            found.allowed_bytes,
        )
        weights, kv, resident, peak, allowed = (size / 1e6 for size in sizes)
        print(
            f"{found.span!s:>8}{weights:12.0f}{kv:8.0f}{resident:13.0f}{peak:9.0f}{allowed:12.0f}{found.loaded.load_s:8.2f}"
        )
        rows.append(
            {"span": str(found.span), "weights_mb": weights, "kv_mb": kv, "resident_mb": resident, "peak_mb": peak}
        )
        if found.resident_bytes > found.allowed_bytes:
            raise SystemExit(f"{found.span}: {resident:.0f} MB resident, {allowed:.0f} MB allowed")
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "memory.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
