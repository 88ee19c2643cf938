"""A model whose weights pass 2 GB, from a GGUF file to tokens: whole on one worker, and in two halves on two.

    python benchmarks/large.py [--layers 28] [--tokens 12]

A protobuf, and so an ONNX file, ends at 2 GB; weights are handed over beside the graph instead, memory-mapped. This
shows that nothing on the way has that limit: a GGUF file (random Q8_0 weights, the default model's tokenizer) is
written, imported, and run. It says how long each step took, what stayed resident, and whether the halves give the
whole's tokens. Needs about 6 GB of disk and 4 GB of memory for a minute or two.

Results: a table, and JSON in `benchmarks/results/large.json`.
"""

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from fallow.domain.frames import Phase
from fallow.domain.ids import ModelName, SessionId
from fallow.domain.model import Manifest, Span, StageSpec, cut_points
from fallow.engine.client import WorkerEngine
from fallow.engine.contract import Loaded, Step
from fallow.engine.settings import EngineSettings
from fallow.models.default import default_gguf
from fallow.models.importer import import_model
from fallow.models.manifest import layer_files, manifest_digest
from fallow.models.store import Store

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 2560, 20, 4, 128, 8960
BLOCK_BYTES, BLOCK_VALUES = 34, 32
"""Q8_0: a float16 scale and 32 signed bytes."""
CONTEXT = 512
PROMPT = 48
LIMIT_BYTES = 1 << 31
ALLOWANCE_BYTES = 250_000_000
"""What a worker may take beside its weights and its cache."""
SESSION = SessionId(f"{1:032x}")


def write_gguf(path: Path, layers: int, template: Path) -> int:
    """A Llama of that many layers with random weights, and the tokenizer of `template`. Its size in bytes."""
    writer = GGUFWriter(path, "llama")
    for name, value in {
        "block_count": layers, "context_length": CONTEXT, "embedding_length": HIDDEN,
        "feed_forward_length": INTERMEDIATE, "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_string("general.name", "large random")
    vocabulary = _copy_tokenizer(template, writer)
    draw = np.random.default_rng(1)
    pool = draw.integers(0, 256, size=(INTERMEDIATE, HIDDEN // BLOCK_VALUES, BLOCK_BYTES), dtype=np.uint8)
    pool[:, :, :2] = np.array([0.03 / 127], np.float16).view(np.uint8)

    def matrix(name: str, rows: int, columns: int) -> None:
        needed = rows * columns // BLOCK_VALUES
        blocks = np.resize(
            np.roll(pool.reshape(-1, BLOCK_BYTES), int(draw.integers(1, 1 << 16)), 0), (needed, BLOCK_BYTES)
        )
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=GGMLQuantizationType.Q8_0)

    matrix("token_embd.weight", vocabulary, HIDDEN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for layer in range(layers):
        matrix(f"blk.{layer}.attn_q.weight", HEADS * HEAD_DIM, HIDDEN)
        matrix(f"blk.{layer}.attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        matrix(f"blk.{layer}.attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        matrix(f"blk.{layer}.attn_output.weight", HIDDEN, HEADS * HEAD_DIM)
        matrix(f"blk.{layer}.ffn_gate.weight", INTERMEDIATE, HIDDEN)
        matrix(f"blk.{layer}.ffn_up.weight", INTERMEDIATE, HIDDEN)
        matrix(f"blk.{layer}.ffn_down.weight", HIDDEN, INTERMEDIATE)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.stat().st_size


def _copy_tokenizer(template: Path, writer: GGUFWriter) -> int:
    """Copy every `tokenizer.*` field; how many tokens there are."""
    vocabulary = 0
    for name, field in GGUFReader(template).fields.items():
        if not name.startswith("tokenizer."):
            continue
        value = field.contents()
        vocabulary = len(value) if name == "tokenizer.ggml.tokens" else vocabulary
        kind = field.types[0]
        writer.add_key_value(name, value, kind, field.types[-1] if kind is GGUFValueType.ARRAY else None)
    return vocabulary


async def generate(store: Store, manifest: Manifest, spans: list[Span], tokens: int) -> dict[str, object]:
    """Greedy tokens over the spans, a worker each, and what the workers took."""
    digest = manifest_digest(manifest)
    kv_bytes = CONTEXT * 2 * 4 * KV_HEADS * HEAD_DIM * manifest.config.layer_count
    engines: list[WorkerEngine] = []
    loads: list[Loaded] = []
    try:
        for span in spans:
            engine = WorkerEngine(EngineSettings(kv_budget_bytes=kv_bytes), [store.root])
            engines.append(engine)
            await engine.start()
            stage = StageSpec(model=digest, pieces=(span,))
            paths = {ref.digest: store.blob_path(ref.digest) for ref in layer_files(manifest, stage)}
            loads.append(await engine.load(stage, manifest, {name: path for name, path in paths.items() if path}))
            await engine.open(SESSION, digest, span, PROMPT + tokens)
        rows = np.arange(100, 100 + PROMPT, dtype=np.int32)
        position, phase, out = 0, Phase.PREFILL, []
        began_s = first_s = time.perf_counter()
        for _ in range(tokens):
            payload = rows.tobytes()
            for engine in engines:
                step = Step(
                    session=SESSION, position=position, count=len(rows), phase=phase,
                    logits_from=position + len(rows) - 1, top_k=1, payload=payload,
                )  # fmt: skip
                payload = bytes((await engine.step(step)).payload)
            position, phase = position + len(rows), Phase.DECODE
            rows = np.frombuffer(payload, np.int32, 1)
            out.append(int(rows[0]))
            first_s = time.perf_counter() if len(out) == 1 else first_s
        ended_s = time.perf_counter()
        resident = [psutil.Process(engine.process_id).memory_info().rss for engine in engines]
        allowed = [load.weights_bytes + kv_bytes + ALLOWANCE_BYTES for load in loads]
    finally:
        for engine in engines:
            await engine.close()
    return {
        "spans": [str(span) for span in spans], "tokens": out, "load_s": [load.load_s for load in loads],
        "weights_mb": [load.weights_bytes / 1e6 for load in loads], "prefill_s": first_s - began_s,
        "decode_tokens_per_s": (tokens - 1) / (ended_s - first_s), "resident_mb": [size / 1e6 for size in resident],
        "within_allowance": all(size <= most for size, most in zip(resident, allowed, strict=True)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--tokens", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fallow-large-") as folder:
        file, store = Path(folder) / "large.gguf", Store(Path(folder) / "store")
        size = write_gguf(file, options.layers, default_gguf())
        began_s = time.perf_counter()
        manifest = import_model(file, store, name=ModelName("large-random")).manifest
        import_s = time.perf_counter() - began_s
        file.unlink()
        print(f"GGUF of {size / 1e9:.2f} GB imported in {import_s:.0f} s")
        layers = manifest.config.layer_count
        middle = min(cut_points(layers), key=lambda cut: abs(cut - layers / 2))
        whole = asyncio.run(generate(store, manifest, [Span(0, layers)], options.tokens))
        halves = asyncio.run(generate(store, manifest, [Span(0, middle), Span(middle, layers)], options.tokens))
    for run in (whole, halves):
        print(json.dumps(run))
    result = {"gguf_bytes": size, "import_s": import_s, "whole": whole, "halves": halves}
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "large.json").write_text(json.dumps(result, indent=2) + "\n")
    if whole["tokens"] != halves["tokens"]:
        raise SystemExit("the halves gave other tokens than the whole")
    if size > LIMIT_BYTES and not (whole["within_allowance"] and halves["within_allowance"]):
        raise SystemExit("a worker took more memory than its weights, its cache and 250 MB")


if __name__ == "__main__":
    main()
