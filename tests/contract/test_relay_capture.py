"""What a captured bus can read of a session over the sealed relay: ids of devices, sizes and times, and nothing else.

Method: two devices exchange the frames of a gateway and its stages over a real NATS server. Everything is written
down twice: by a proxy on the TCP connections, and by a subscriber to every subject. What was said is then looked for in
it: token ids, activations, log-probabilities, session ids, the words of frame headers. The same search over the same
frames without the seal finds all of it, so that it would find a leak.
"""

import asyncio
import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from fallow.domain.fleet import Subjects
from fallow.domain.frames import Fault, Frame, Hello, OpenStage, Phase, Ping, Result, Rows
from fallow.domain.ids import Digest, SessionId
from fallow.domain.model import Span
from fallow.fabric.broker import Broker
from fallow.fabric.codec import encode
from fallow.fabric.local_handshake import Identity
from fallow.fabric.nats_bus import NatsBus
from fallow.fabric.sealed_endpoint import RelayEndpoint
from tests.unit.fabric.support import eventually

SEEDS = (b"\x0a" * 32, b"\x0b" * 32)
NODES = tuple(Identity.from_seed(seed).node for seed in SEEDS)
RANDOM = random.Random(4)
SESSION = SessionId(RANDOM.randbytes(16).hex())
MODEL = Digest(RANDOM.randbytes(32).hex())
TOKENS = struct.pack("<64i", *(RANDOM.randrange(50_000) for _ in range(64)))
ACTIVATIONS = RANDOM.randbytes(64 * 1152)
LOGPROBS = RANDOM.randbytes(8 * 64)
WINDOW_BYTES = 8
"""Two token ids, or four activations: the shortest piece that is looked for."""
HEADER_WORDS = {
    msgspec.msgpack.encode(name)  # with its length in front: NATS itself says "account", which holds "count"
    for kind in (Hello, Ping, Rows, Result, OpenStage, Fault)
    for name in (str(kind.__struct_config__.tag), *kind.__struct_fields__, "prefill", "kv_exhausted", "please hurry")
    if len(name) >= 4  # shorter ones turn up in noise
}


def conversation() -> list[Frame]:
    """A prompt's token ids, activations, logits, and an error with words in it."""
    rows = {"session": SESSION, "epoch": 1, "logits_from": 0, "top_k": 64}
    return [
        Frame(Hello(version_min=1, version_max=1)),
        Frame(Ping(nonce=7)),
        Frame(OpenStage(session=SESSION, epoch=1, model=MODEL, span=Span(first=0, last=4), reserve_tokens=64)),
        Frame(Rows(position=0, count=64, phase=Phase.PREFILL, **rows), TOKENS),  # type: ignore[arg-type]
        Frame(Rows(position=0, count=64, phase=Phase.PREFILL, **rows), ACTIVATIONS),  # type: ignore[arg-type]
        Frame(Rows(position=64, count=1, phase=Phase.DECODE, **rows), ACTIVATIONS[:1152]),  # type: ignore[arg-type]
        Frame(Result(session=SESSION, epoch=1, position=64, count=1, logit_count=1, k=64), LOGPROBS),
        Frame(Fault(session=SESSION, epoch=1, code="kv_exhausted", message="please hurry")),
    ]


def found_in(seen: bytes) -> set[str]:
    """What of the conversation can be read in captured bytes."""
    pieces = {seen[at : at + WINDOW_BYTES] for at in range(len(seen) - WINDOW_BYTES + 1)}
    found = {
        name
        for name, secret in (("tokens", TOKENS), ("activations", ACTIVATIONS), ("log-probabilities", LOGPROBS))
        if any(secret[at : at + WINDOW_BYTES] in pieces for at in range(len(secret) - WINDOW_BYTES + 1))
    }
    found |= {msgspec.msgpack.decode(word) for word in HEADER_WORDS if word in seen}
    found |= {
        name
        for name, id_ in (("session's id", SESSION), ("model's id", MODEL))
        if id_.encode() in seen or bytes.fromhex(id_) in seen or id_[:12].encode() in seen
    }
    return found


class Tap:
    """A TCP proxy that writes down what passes, in both directions."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._tasks: set[asyncio.Task[None]] = set()
        self.seen = bytearray()

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._port)
        for source, sink in ((reader, there_writer), (there_reader, writer)):
            task = asyncio.create_task(self._copy(source, sink))
            self._tasks.add(task)

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                self.seen += data
                sink.write(data)
                await sink.drain()
        except ConnectionError:
            pass
        finally:
            sink.close()


class Captured:
    """A bus of which every byte and every message was written down."""

    def __init__(self, urls: tuple[str, ...], tap: Tap) -> None:
        self.urls, self.tap = urls, tap
        self.messages: list[tuple[str, bytes]] = []

    @property
    def carried(self) -> bytes:
        """What a subscriber to everything saw."""
        return b"\n".join(subject.encode() + b" " + message for subject, message in self.messages)


@asynccontextmanager
async def captured_bus(folder: Path) -> AsyncIterator[Captured]:
    broker = Broker(folder / "broker")
    await broker.start()
    spy = await NatsBus.connect(broker.urls, "spy")
    host, _, port = broker.urls[0].rpartition(":")
    tap = Tap(int(port))
    bus = Captured((f"{host}:{await tap.start()}",), tap)
    try:

        async def listen(subject: str, message: bytes) -> None:
            bus.messages.append((subject, message))

        await spy.subscribe(">", listen)
        yield bus
    finally:
        await spy.close()
        await tap.close()
        await broker.close()


async def talk(bus: Captured) -> None:
    """The conversation, both ways, over the sealed relay."""
    buses = [await NatsBus.connect(bus.urls, node) for node in NODES]
    endpoints = [await RelayEndpoint.open(b, "test", seed) for b, seed in zip(buses, SEEDS, strict=True)]
    ends = await asyncio.gather(endpoints[0].connect(endpoints[1].address), anext(endpoints[1].accept()))
    for end in ends:
        for frame in conversation():
            await end.send(frame)
    expected = [encode(frame) for frame in conversation()]
    for end in ends:
        assert [encode(await end.receive()) for _ in expected] == expected
    for end in ends:
        await end.close()
    for endpoint, own in zip(endpoints, buses, strict=True):
        await endpoint.close()
        await own.close()


def test_nothing_readable_crosses_a_captured_bus(tmp_path: Path) -> None:
    async def main() -> None:
        async with captured_bus(tmp_path) as bus:
            await talk(bus)
            relayed = [message for subject, message in bus.messages if subject.startswith("fallow.test.relay.")]
            assert sum(map(len, relayed)) > 2 * len(ACTIVATIONS), "it went this way, and the spy saw it"
            assert len(bus.tap.seen) > 4 * len(ACTIVATIONS)
            assert found_in(bytes(bus.tap.seen)) == set()
            assert found_in(bus.carried) == set()
            assert all(node.encode() in bus.tap.seen for node in NODES), "who talks with whom is not hidden"

    asyncio.run(asyncio.wait_for(main(), 30))


def test_the_search_finds_everything_where_there_is_no_seal(tmp_path: Path) -> None:
    async def main() -> None:
        async with captured_bus(tmp_path) as bus:
            open_bus = await NatsBus.connect(bus.urls, NODES[0])
            for message in map(encode, conversation()):
                await open_bus.publish(Subjects("test").relay(NODES[1], NODES[0]), message)
            await eventually(lambda: len(bus.messages) == len(conversation()))
            words = {msgspec.msgpack.decode(word) for word in HEADER_WORDS}
            everything = words | {"tokens", "activations", "log-probabilities", "session's id", "model's id"}
            assert found_in(bytes(bus.tap.seen)) == everything
            assert found_in(bus.carried) == everything
            await open_bus.close()

    asyncio.run(asyncio.wait_for(main(), 30))
