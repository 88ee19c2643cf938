"""Single flipped bits, in weights, in the KV cache and in frames: what notices them, and what else becomes of them.

    python benchmarks/bitflips.py [--flips 200] [--store FOLDER] [--seed 1]

Needs Linux and the right to write into one's own children's memory (`/proc/PID/mem`; as root, or a permissive
`ptrace_scope`). Method: the default model over two workers, 15 layers each, as two devices would host it, with what
stands between devices in between: the frame codec, the receiving stage's rules for rows (`node/row_checks.py`) and the
gateway's for results (`gateway/results.py`). Two sessions answer greedily at the same time. A trial flips one bit:

- weights: anywhere in a worker's own memory (the heap with the runtime's packed copies; caches, libraries and files are
  left out), before the answer; afterwards the worker is asked to check itself, and the bit is put back.
- KV cache: in a key or value that one session will read, after its prompt.
- frames: anywhere in the bytes of a frame of rows, header and payload, of one session.

A trial is *caught* before the answer (by whom is counted), or *caught later* (canary, re-hash), or *harmless* (the same
tokens), or *silent* (other tokens, and nothing noticed). Whether the other session's tokens and the other worker stayed
as they were is counted too. Flips in frames are those that reach the codec: on a link between devices, encryption
refuses every flipped bit before.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Coroutine, Iterable
from pathlib import Path

import msgspec
import numpy as np
import platformdirs

from fallow.domain.errors import EngineLost, FallowError, FrameError, NumericFault
from fallow.domain.frames import Frame, Phase, Result, Rows
from fallow.domain.ids import Digest, SessionId
from fallow.domain.model import Manifest, Span, StageSpec
from fallow.engine.client import WorkerEngine
from fallow.engine.contract import Step
from fallow.engine.kv import slot_length
from fallow.engine.settings import EngineSettings
from fallow.fabric.codec import FrameDecoder, encode
from fallow.gateway.results import last_candidates
from fallow.models.default import ensure_default_model
from fallow.models.manifest import layer_files, manifest_digest
from fallow.models.store import Store
from fallow.models.tokenizer import load_tokenizer
from fallow.node.row_checks import RowChecks

PROMPTS = ("The three laws of thermodynamics are", "def fibonacci(n):\n    # returns the n-th number\n")
TOKENS = 10
TOP_K = 8
SLOTS, CONTEXT = 4, 448
SETTINGS = EngineSettings(
    slots_max=SLOTS, max_session_tokens=CONTEXT, canary_interval_s=0, rehash_share=0, kv_budget_bytes=1 << 28
)
PAGE_BYTES = 4096
LARGE_BYTES = 1 << 20
"""Smaller mappings are stacks and bookkeeping."""

Answer = tuple[tuple[int, ...], ...]


class Caught(Exception):
    """Something noticed: `by` says what."""

    def __init__(self, by: str) -> None:
        super().__init__(by)
        self.by = by


class Pair:
    """Two workers with half of the model each, and what stands between them."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.manifest, self.model = manifest, manifest_digest(manifest)
        layers = manifest.config.layer_count
        self.spans = (Span(0, layers // 2), Span(layers // 2, layers))
        self.engines = [WorkerEngine(SETTINGS, [store.root]) for _ in self.spans]
        self.checks = RowChecks()
        self.checks.learn(self.model, manifest)
        tokenizer = load_tokenizer(_path(store, manifest.tokenizer.digest))
        self.prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
        self._store = store
        self._names = 0
        self.restarts = 0

    async def start(self, index: int) -> None:
        """Start a worker, or start it again."""
        engine, span = self.engines[index], self.spans[index]
        await engine.start()
        stage = StageSpec(model=self.model, pieces=(span,))
        files = {ref.digest: _path(self._store, ref.digest) for ref in layer_files(self.manifest, stage)}
        await engine.load(stage, self.manifest, files)

    async def mend(self) -> None:
        for index, engine in enumerate(self.engines):
            if engine.lost.is_set():
                self.restarts += 1
                await self.start(index)

    async def close(self) -> None:
        for engine in self.engines:
            await engine.close()


class Conversation:
    """One greedy answer. `flip` may change a frame's bytes."""

    def __init__(self, pair: Pair, prompt: list[int]) -> None:
        pair._names += 1
        self.name = SessionId(f"{pair._names:032x}")
        self.pair, self.prompt, self.tokens = pair, prompt, list[int]()
        self.position = 0
        self.flip_at: int | None = None
        self.random = random.Random(0)

    async def open(self) -> None:
        for engine, span in zip(self.pair.engines, self.pair.spans, strict=True):
            await engine.open(self.name, self.pair.model, span, len(self.prompt) + TOKENS + 1)

    async def free(self) -> None:
        for engine in self.pair.engines:
            with contextlib.suppress(EngineLost):
                await engine.free(self.name)

    async def prefill(self) -> None:
        await self._advance(self.prompt, Phase.PREFILL)

    async def decode(self) -> None:
        while len(self.tokens) < TOKENS:
            await self._advance(self.tokens[-1:], Phase.DECODE)

    async def _advance(self, tokens: list[int], phase: Phase) -> None:
        pair, first = self.pair, np.asarray(tokens, np.int32).tobytes()
        out = await pair.engines[0].step(self._step(phase, len(tokens), self.position, first))
        rows = Rows(
            session=self.name, epoch=1, position=self.position, count=len(tokens), phase=phase,
            logits_from=self.position + len(tokens) - 1, top_k=TOP_K,
        )  # fmt: skip
        frame = self._over_the_wire(Frame(rows, out.payload))
        header = frame.header
        if not isinstance(header, Rows) or header.session != self.name or header.epoch != 1:
            raise Caught("the frame is for nobody: dropped, and the gateway asks again")
        if header.position != self.position:
            raise Caught("position_mismatch")
        strange = pair.checks.complaint(pair.model, pair.spans[1].first, frame.payload, header.count)
        if strange is not None:
            raise Caught("the receiving stage's rules")
        step = self._step(header.phase, header.count, header.logits_from, frame.payload, header.top_k)
        stepped = await pair.engines[1].step(step)
        result = Result(
            session=self.name, epoch=1, position=self.position, count=header.count, logit_count=stepped.logit_count,
            k=stepped.k,
        )  # fmt: skip
        if result.count != len(tokens) or stepped.logit_count == 0:
            raise Caught("the gateway: not the result that it waits for")
        candidates = last_candidates(result, stepped.payload, pair.manifest.config.vocab_size)
        if candidates is None:
            raise Caught("the gateway's rules for results")
        self.position += len(tokens)
        self.tokens.append(int(candidates.ids[0]))

    def _step(self, phase: Phase, count: int, logits_from: int, payload: object, top_k: int | None = TOP_K) -> Step:
        return Step(
            session=self.name, position=self.position, count=count, phase=phase, logits_from=logits_from,
            top_k=top_k, payload=payload,
        )  # fmt: skip

    def _over_the_wire(self, frame: Frame) -> Frame:
        if self.flip_at != len(self.tokens):
            return frame
        sent = bytearray(encode(frame))
        bit = self.random.randrange(8 * len(sent))
        sent[bit // 8] ^= 1 << bit % 8
        try:
            [received] = FrameDecoder().feed(bytes(sent)) or [None]
        except FrameError as error:
            raise Caught("the codec: bad_frame") from error
        if received is None:  # its length grew: the rest never comes
            raise Caught("the frame never ends: a stall, and the gateway asks again")
        return received


async def answers(pair: Pair) -> Answer:
    """Both sessions' tokens. Raises `Caught`, or a `FallowError` of an engine."""
    conversations = [Conversation(pair, prompt) for prompt in pair.prompts]
    return await converse(conversations)


async def converse(conversations: list[Conversation], between: object = None) -> Answer:
    try:
        for conversation in conversations:
            await conversation.open()
        failed = await _outcomes(conversation.prefill() for conversation in conversations)
        if callable(between):
            between()
        going = [c for c, error in zip(conversations, failed, strict=True) if error is None]
        failed += await _outcomes(conversation.decode() for conversation in going)
        for error in filter(None, failed):
            raise error
    finally:
        for conversation in conversations:
            await conversation.free()
    return tuple(tuple(conversation.tokens) for conversation in conversations)


async def _outcomes(work: Iterable[Coroutine[object, object, None]]) -> list[BaseException | None]:
    """What each raised, when all have ended: a neighbour goes on."""
    return await asyncio.gather(*work, return_exceptions=True)


# --- memory of a worker -------------------------------------------------------------------------


class Memory:
    """The memory of a process that this one started."""

    def __init__(self, process: int) -> None:
        self._file = os.open(f"/proc/{process}/mem", os.O_RDWR)
        self.own: list[tuple[int, int]] = []
        """Writable memory that belongs to no file and is no cache: start and size."""
        self.caches: list[tuple[int, int]] = []
        for start, size, flags in _mappings(process):
            if "wr" in flags and "nh" in flags:  # only caches refuse huge pages
                self.caches.append((start, size))
            elif "wr" in flags and size >= LARGE_BYTES:
                self.own.append((start, size))

    def read(self, address: int, size: int) -> bytes:
        return os.pread(self._file, size, address)

    def flip(self, address: int, bit: int) -> None:
        byte = self.read(address, 1)[0]
        os.pwrite(self._file, bytes([byte ^ 1 << bit]), address)

    def close(self) -> None:
        os.close(self._file)

    def used_address(self, chance: random.Random) -> int:
        """An address in own memory whose page holds something."""
        while True:
            sizes = [size for _, size in self.own]
            start, size = chance.choices(self.own, sizes)[0]
            address = start + chance.randrange(size)
            page = address // PAGE_BYTES * PAGE_BYTES
            try:
                if any(self.read(page, PAGE_BYTES)):
                    return address
            except OSError:
                continue

    def cache_address(self, chance: random.Random, config: object, tokens: int) -> int:
        """A cell of slot 0 that holds a key or value of the first `tokens` tokens."""
        heads, width = config.kv_head_count, config.head_dim  # type: ignore[attr-defined]
        longest = slot_length(config.context_length, CONTEXT)  # type: ignore[attr-defined]
        block = (SLOTS + 1) * 4 * heads * longest * width
        blocks = [start + at for start, size in self.caches for at in range(0, size - block + 1, block)]
        cell = (chance.randrange(heads) * longest + chance.randrange(tokens)) * width + chance.randrange(width)
        return chance.choice(blocks) + 4 * cell + chance.randrange(4)


def _mappings(process: int) -> list[tuple[int, int, list[str]]]:
    found: list[tuple[int, int, list[str]]] = []
    start = size = 0
    anonymous = False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            first, last = (int(part, 16) for part in words[0].split("-"))
            start, size, anonymous = first, last - first, words[4] == "0" and words[-1] != "[stack]"
        elif words[0] == "VmFlags:" and anonymous:
            found.append((start, size, words[1:]))
    return found


# --- trials -------------------------------------------------------------------------------------


class Tally(msgspec.Struct):
    """What became of the flips in one place."""

    flips: int = 0
    before: Counter[str] = msgspec.field(default_factory=Counter)
    later: Counter[str] = msgspec.field(default_factory=Counter)
    harmless: int = 0
    silent: int = 0
    later_wrong: int = 0
    """Of those caught later: how many answers were other ones by then."""
    neighbours_changed: int = 0
    neighbours_lost: int = 0

    def row(self) -> list[object]:
        before, later = sum(self.before.values()), sum(self.later.values())
        return [self.flips, before, later, self.later_wrong, self.harmless, self.silent, self.neighbours_changed]


def _by(error: FallowError) -> str:
    if isinstance(error, EngineLost):
        return "the process ended: another device takes over"
    return "numeric_fault of the stage itself" if isinstance(error, NumericFault) else error.code


async def flip_weights(pair: Pair, truth: Answer, chance: random.Random, tally: Tally) -> None:
    index = chance.randrange(2)
    process = pair.engines[index].process_id
    assert process is not None
    memory = Memory(process)
    address, bit = memory.used_address(chance), chance.randrange(8)
    memory.flip(address, bit)
    given: Answer | None = None
    caught: str | None = None
    try:
        given = await answers(pair)
    except Caught as error:
        caught = error.by
    except FallowError as error:
        caught = _by(error)
    await _judge(pair, tally, truth, given, caught, index)
    if not pair.engines[index].lost.is_set():
        memory.flip(address, bit)
    memory.close()
    await pair.mend()


async def _judge(pair: Pair, tally: Tally, truth: Answer, given: Answer | None, caught: str | None, index: int) -> None:
    """Count a flip in weights: what was said before the answer, what a check finds after it."""
    tally.flips += 1
    tally.neighbours_lost += pair.engines[1 - index].lost.is_set()
    if caught is not None:
        tally.before[caught] += 1
        return
    try:
        found = await pair.engines[index].check()
    except EngineLost:
        found = "the process ended"
    if found is not None:
        tally.later["canary" if "canary" in found else "re-hash" if "re-hash" in found else found] += 1
        tally.later_wrong += given != truth
    elif given == truth:
        tally.harmless += 1
    else:
        tally.silent += 1


async def flip_cache(pair: Pair, truth: Answer, chance: random.Random, tally: Tally) -> None:
    index = chance.randrange(2)
    process = pair.engines[index].process_id
    assert process is not None
    memory = Memory(process)
    address = memory.cache_address(chance, pair.manifest.config, len(pair.prompts[0]))
    conversations = [Conversation(pair, prompt) for prompt in pair.prompts]
    await _disturbed(conversations, truth, tally, lambda: memory.flip(address, chance.randrange(8)))
    tally.neighbours_lost += any(engine.lost.is_set() for engine in pair.engines)
    memory.close()
    await pair.mend()


async def flip_frame(pair: Pair, truth: Answer, chance: random.Random, tally: Tally) -> None:
    conversations = [Conversation(pair, prompt) for prompt in pair.prompts]
    conversations[0].flip_at = chance.randrange(TOKENS)
    conversations[0].random = chance
    await _disturbed(conversations, truth, tally, None)
    tally.neighbours_lost += any(engine.lost.is_set() for engine in pair.engines)
    await pair.mend()


async def _disturbed(conversations: list[Conversation], truth: Answer, tally: Tally, between: object) -> None:
    """The first conversation meets a flip; the second one is its neighbour."""
    tally.flips += 1
    try:
        given = await converse(conversations, between)
    except Caught as error:
        tally.before[error.by] += 1
    except FallowError as error:
        tally.before[_by(error)] += 1
    else:
        tally.harmless += given[0] == truth[0]
        tally.silent += given[0] != truth[0]
    tally.neighbours_changed += tuple(conversations[1].tokens) != truth[1]


def _path(store: Store, digest: Digest) -> Path:
    path = store.blob_path(digest)
    assert path is not None
    return path


PLACES = {"weights": flip_weights, "KV cache": flip_cache, "frames": flip_frame}


async def run(store: Store, flips: int, seed: int, places: list[str]) -> dict[str, Tally]:
    pair = Pair(store, ensure_default_model(store))
    tallies: dict[str, Tally] = {}
    try:
        for index in range(2):
            await pair.start(index)
        truth = await answers(pair)
        assert await answers(pair) == truth, "the answer is not reproducible"
        for place in places:
            trial = PLACES[place]
            chance, tally = random.Random(f"{seed} {place}"), Tally()
            began_s = time.monotonic()
            for _ in range(flips):
                await trial(pair, truth, chance, tally)
            tallies[place] = tally
            assert await answers(pair) == truth, "a flip outlived its trial"
            print(f"{place}: {flips} flips in {time.monotonic() - began_s:.0f} s, {pair.restarts} restarts so far")
    finally:
        await pair.close()
    return tallies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--store", type=Path, default=platformdirs.user_cache_path("fallow") / "bench-bitflips")
    parser.add_argument("--only", choices=list(PLACES), action="append")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bitflips.json")
    options = parser.parse_args()
    tallies = asyncio.run(run(Store(options.store), options.flips, options.seed, options.only or list(PLACES)))
    print(f"\n{'':10}{'flips':>8}{'before':>8}{'later':>8}{'(wrong)':>8}{'harmless':>10}{'silent':>8}{'neighb.':>8}")
    for place, tally in tallies.items():
        cells = tally.row()
        print(
            f"{place:10}"
            + "".join(f"{cell!s:>{width}}" for cell, width in zip(cells, (8, 8, 8, 8, 10, 8, 8), strict=True))
        )
        for reason, count in [*tally.before.most_common(), *tally.later.most_common()]:
            print(f"{'':12}{count:4}  {reason}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({place: msgspec.to_builtins(tally) for place, tally in tallies.items()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
