"""Strangers on the links of a running service: what they send is refused by name, and nobody else notices.

Two real devices with half of the model each, and a gateway. During every attack a neighbour streams greedy answers
through the API, each of which must be token-identical to the undisturbed one, over the same chain. Afterwards every
process is the same one as before, no log holds a traceback, no answer was repaired, and memory has not grown.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import pytest

from fallow.domain.errors import LinkClosed
from fallow.domain.frames import (
    MAX_FRAME_BYTES,
    Chunk,
    CloseSession,
    Fault,
    FetchChunk,
    Flow,
    Frame,
    Hello,
    OpenStage,
    PeerAddress,
    Ping,
    Refused,
    Result,
    StageState,
)
from fallow.domain.ids import Digest
from fallow.domain.model import Span
from fallow.engine.settings import EngineSettings
from fallow.fabric.codec import encode
from fallow.fabric.local_link import HANDSHAKE_TIMEOUT_S, MAX_HANDSHAKES, LocalEndpoint, socket_path
from fallow.fabric.peers import HANDSHAKE_TIMEOUT_S as HELLO_TIMEOUT_S
from fallow.fabric.peers import MAX_LINKS_PER_PEER
from fallow.gateway.keys import new_key
from fallow.node.stage_session import UNUSED_MAX_S
from fallow.processes.local_service import LocalService
from fallow.wiring import socket_folder
from tests.system.harness import Answer, ask, service
from tests.system.hostile import (
    HELLO,
    PREFIX,
    TRANSPORTS,
    Neighbour,
    Targets,
    Tenant,
    dialled,
    farewell,
    find_targets,
    frame_bytes,
    new_session,
    put,
    resident_bytes,
    rows,
    tenant,
)

T = TypeVar("T")

TWO_HALVES = """
local_nodes = 2
[trust]
insecure_development = true
[placement]
max_share = 0.7
[node]
memory_bytes = "1GiB"
"""
QUESTION = "Name three colours and say why you like them."
ANSWER_TOKENS = 16
KEYS = {name: new_key() for name in ("calm", "neighbour", "newcomer")}
GROWTH_MAX_BYTES = 96 << 20
"""What a process may grow by over all attacks: buffers of links at their bounds, and KV cache in use."""
RANDOM_SEED = 20_240_607
AT_ONCE = 8
"""Strangers that dial in the same moment; what happens when there are too many has tests of its own."""
PROMPT = (1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47)
GREEDY_TOKENS = 6
ROOM_TOKENS = 3000
"""More than what kept conversations can give back."""
ROOM_SLACK_S = 15.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[LocalService]:
    keys = "\n".join(f'[[gateway.keys]]\nid = "{name}"\nsha256 = "{digest}"' for name, (_, digest) in KEYS.items())
    with service(tmp_path_factory.mktemp("hostile"), store, settings=TWO_HALVES + keys) as running:
        running.wait_until_servable()
        yield running


@pytest.fixture(scope="module")
def targets(fleet: LocalService) -> Targets:
    found = find_targets(fleet)
    assert len(found.hops) == 2
    return found


@pytest.fixture(scope="module")
def calm(fleet: LocalService, targets: Targets) -> Answer:
    """The undisturbed answer."""
    answer = ask(fleet.api_url, QUESTION, ANSWER_TOKENS, KEYS["calm"][0])
    assert answer.error is None
    assert len(answer.pieces) > ANSWER_TOKENS // 2
    return answer


@pytest.fixture(scope="module")
def before(fleet: LocalService, calm: Answer) -> dict[str, int]:
    return resident_bytes(fleet)


@pytest.fixture(scope="module")
def neighbour(fleet: LocalService, calm: Answer, before: dict[str, int]) -> Iterator[Neighbour]:
    """It streams from the first attack to the last."""
    with Neighbour(fleet.api_url, KEYS["neighbour"][0], QUESTION, ANSWER_TOKENS, calm) as streaming:
        yield streaming


@pytest.fixture
def undisturbed(fleet: LocalService, neighbour: Neighbour, before: dict[str, int]) -> Iterator[None]:
    """The neighbour streams during the test; afterwards everything is as it was."""
    yield
    neighbour.check()
    after = resident_bytes(fleet)
    assert after.keys() == before.keys(), "a process ended or was started"
    grown = {name: after[name] - size for name, size in before.items() if after[name] - size > GROWTH_MAX_BYTES}
    assert not grown
    logs = "".join(file.read_text(errors="replace") for file in fleet.state_dir.glob("logs/*"))
    assert "Traceback" not in logs
    assert "repairing after" not in logs


@pytest.fixture
def sockets() -> Path:
    """Where the user's processes meet: a stranger with a socket elsewhere would not even dial."""
    return socket_folder()


async def few_at_once(talks: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """What they return, in their order; `AT_ONCE` run at a time."""
    places = asyncio.Semaphore(AT_ONCE)

    async def in_turn(talk: Callable[[], Awaitable[T]]) -> T:
        async with places:
            return await talk()

    return await asyncio.gather(*(in_turn(talk) for talk in talks))


def victim_of(targets: Targets, name: str) -> PeerAddress:
    return targets.gateway if name == "gateway" else targets.hops[("first", "last").index(name)].address


# --- bytes --------------------------------------------------------------------------------------

HELLO_BYTES = encode(Frame(HELLO))
_BODY = msgspec.msgpack.encode
_RANDOM = random.Random(RANDOM_SEED)
GARBAGE = {
    "2 GB announced": (PREFIX.pack(2 << 30, 64) + b"x" * 100, "frame too large"),
    "4 GB - 1 announced": (b"\xff" * 64, "frame too large"),
    "a header of 1 MB": (PREFIX.pack(2 << 20, 1 << 20), "header too large"),
    "a header longer than its frame": (PREFIX.pack(20, 40) + b"x" * 40, "expected a header inside the frame"),
    "no header": (PREFIX.pack(8, 0), "expected a header inside the frame"),
    "a frame shorter than its prefix": (PREFIX.pack(3, 1) + b"x", "expected a header inside the frame"),
    "random bytes": (_RANDOM.randbytes(4096), "bad_frame"),
    "text": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "bad_frame"),
    "a header that is no msgpack": (frame_bytes(b"\xc1" * 20), "bad_frame"),
    "a header nested 60,000 deep": (frame_bytes(b"\x91" * 60_000), "bad_frame"),
    "an unknown kind": (frame_bytes(_BODY({"kind": "make_coffee"})), "unknown frame kind 'make_coffee'"),
    "a field of another type": (frame_bytes(_BODY({"kind": "ping", "nonce": "x"})), "bad ping header"),
    "a missing field": (frame_bytes(_BODY({"kind": "close_session"})), "bad close_session header"),
    "a number out of range": (frame_bytes(_BODY({"kind": "ping", "nonce": -1})), "Ping.nonce"),
    "a payload where none belongs": (frame_bytes(_BODY({"kind": "ping", "nonce": 1}), b"x"), "carries no payload"),
    "a session id that is a path": (
        frame_bytes(_BODY({"kind": "close_session", "session": "../../../etc/passwd"})),
        "CloseSession.session",
    ),
    "no hello": (encode(Frame(Ping(nonce=1)))[:0] + encode(Frame(CloseSession(session=new_session()))), "hello first"),
    "rows before hello": (encode(Frame(rows(new_session(), 0, 1), b"\0" * 4)), "hello first"),
    "two hellos": (HELLO_BYTES * 2, "expected one hello"),
    "a hello of the future": (
        encode(Frame(Hello(version_min=900, version_max=901))),
        "protocol_version this side speaks protocol versions 1 to 1, the peer 900 to 901",
    ),
}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("victim", ["first", "gateway"])
def test_garbage_ends_its_own_link_with_words(
    targets: Targets, undisturbed: None, sockets: Path, transport: str, victim: str
) -> None:
    address = victim_of(targets, victim)

    async def words_for(data: bytes) -> str:
        async with dialled(address, transport, sockets) as link:
            put(link, data)
            return await farewell(link)

    async def scenario() -> dict[str, str]:
        sent = {name: data for name, (data, _) in GARBAGE.items()}
        sent |= {f"{name}, after a hello": HELLO_BYTES + data for name, data in sent.items()}
        words = await few_at_once([partial(words_for, data) for data in sent.values()])
        return dict(zip(sent, words, strict=True))

    said = asyncio.run(scenario())
    for name, (_, expected) in GARBAGE.items():
        assert expected in said[name], name
        # After one hello, what was "no hello" is fine and "a hello of the future" is a second one.
        if "hello" not in name:
            assert expected in said[f"{name}, after a hello"], name


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("victim", ["last", "gateway"])
def test_torn_and_mutated_frames(
    targets: Targets, undisturbed: None, sockets: Path, transport: str, victim: str
) -> None:
    """Frames that stop half-way, and 100 that differ from good ones in a few bytes (seeded)."""
    address = victim_of(targets, victim)
    chance = random.Random(RANDOM_SEED)
    good = [
        encode(
            Frame(OpenStage(session=new_session(), epoch=1, model=targets.model, span=Span(0, 5), reserve_tokens=1))
        ),
        encode(Frame(rows(new_session(), 0, 4), b"\1\0\0\0" * 4)),
        encode(Frame(FetchChunk(digest=targets.model, index=0))),
        encode(Frame(Result(session=new_session(), epoch=1, position=0, count=1, logit_count=1, k=1), b"\0" * 8)),
    ]

    def mutated() -> bytes:
        frame = bytearray(chance.choice(good))
        for _ in range(chance.randint(1, 4)):
            frame[chance.randrange(len(frame))] = chance.randrange(256)
        return bytes(frame)

    async def greet_and_say(frame: bytes) -> None:
        async with dialled(address, transport, sockets) as link:
            put(link, HELLO_BYTES + frame)
            with contextlib.suppress(LinkClosed):
                await link.receive()

    async def scenario() -> None:
        for cut in (1, 7, 8, 9, len(HELLO_BYTES) - 1):
            async with dialled(address, transport, sockets) as link:
                put(link, HELLO_BYTES[:cut])
        await few_at_once([partial(greet_and_say, mutated()) for _ in range(100)])
        # One big frame that never ends: what was announced is legal, and holds only what came.
        async with dialled(address, transport, sockets) as link:
            put(link, HELLO_BYTES + PREFIX.pack(MAX_FRAME_BYTES, 100) + b"x" * 1000)
            assert isinstance((await link.receive()).header, Hello)

    asyncio.run(scenario())


# --- links --------------------------------------------------------------------------------------


def test_a_stranger_without_words_is_dropped_in_bounded_time(
    targets: Targets, undisturbed: None, sockets: Path
) -> None:
    async def silent(transport: str) -> float:
        began_s = time.monotonic()
        async with dialled(targets.first.address, transport, sockets) as link:
            await farewell(link)
        return time.monotonic() - began_s

    async def both() -> list[float]:
        return await asyncio.gather(*(silent(transport) for transport in TRANSPORTS))

    for lasted_s in asyncio.run(both()):
        assert HELLO_TIMEOUT_S - 1 < lasted_s < 2 * HELLO_TIMEOUT_S + 2


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_links_of_one_stranger_are_bounded(targets: Targets, undisturbed: None, sockets: Path, transport: str) -> None:
    async def scenario() -> list[str]:
        async with tenant(transport, sockets) as stranger:
            endpoint = stranger.peers._endpoint
            links = [await endpoint.connect(targets.first.address) for _ in range(3 * MAX_LINKS_PER_PEER)]
            refused = [await farewell(link) for link in links[MAX_LINKS_PER_PEER:]]  # type: ignore[arg-type]
            for link in links:
                await link.close()
            return refused

    assert all("too_many_links" in words for words in asyncio.run(scenario()))


def test_hundreds_of_strangers_at_once(targets: Targets, undisturbed: None, sockets: Path) -> None:
    """300 identities with a link each, 100 sockets that never prove who they are, 100 that send garbage for a proof."""
    path = socket_path(targets.first.address)
    assert path is not None

    async def scenario() -> int:
        async with contextlib.AsyncExitStack() as held:
            for number in range(100):
                reader, writer = await asyncio.open_unix_connection(path)
                held.callback(writer.close)
                if number % 2:
                    with contextlib.suppress(ConnectionError):
                        writer.write(b"\x16\x03\x01 certainly no proof")
                        await reader.read()
            await asyncio.sleep(HANDSHAKE_TIMEOUT_S + 0.5)  # silent handshakes hold MAX_HANDSHAKES places until then
            identities = [await LocalEndpoint.open(random.randbytes(32), sockets) for _ in range(300)]
            links = []
            for identity in identities:
                held.push_async_callback(identity.close)
                links.append(await identity.connect(targets.first.address))
                put(links[-1], HELLO_BYTES)
            greeted = [await link.receive() for link in links]
            for link in links:
                link.abort("enough")
            return sum(isinstance(frame.header, Hello) for frame in greeted)

    assert MAX_HANDSHAKES < 100
    assert asyncio.run(scenario()) == 300


def test_a_stranger_that_does_not_read_holds_nothing_up(targets: Targets, undisturbed: None, sockets: Path) -> None:
    """Pings and requests for chunks by the hundred, whose answers nobody takes."""

    async def scenario() -> None:
        async with dialled(targets.gateway, "local", sockets) as link:
            put(link, HELLO_BYTES)
            link._hold_reading()  # type: ignore[attr-defined]
            with contextlib.suppress(LinkClosed):
                for number in range(300):
                    await link.send(Frame(FetchChunk(digest=targets.model, index=0)))
                    await link.send(Frame(Ping(nonce=number)))
            await asyncio.sleep(1.0)

    asyncio.run(scenario())


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["first", "gateway"])
def test_chunks_that_are_not_there(targets: Targets, undisturbed: None, sockets: Path, victim: str) -> None:
    address = victim_of(targets, victim)

    async def scenario() -> None:
        async with tenant("local", sockets) as stranger:
            for digest, index in (
                ("00" * 32, 0),
                (targets.model, 1),
                (targets.model, (1 << 31) - 1),
            ):
                await stranger.say(address, FetchChunk(digest=Digest(digest), index=index))
                answer = await stranger.hear(Chunk)
                assert isinstance(answer.header, Chunk)
                assert not answer.header.found
                assert not answer.payload
            # More at once than are served: all are answered, those beyond the bound in the negative.
            for _ in range(500):
                await stranger.say(address, FetchChunk(digest=targets.model, index=0))
            answers = [(await stranger.hear(Chunk)).header for _ in range(500)]
            assert any(isinstance(header, Chunk) and header.found for header in answers)
            await stranger.say(address, Chunk(digest=targets.model, index=0, found=True), b"unasked")

    asyncio.run(scenario())


# --- sessions -----------------------------------------------------------------------------------


async def greedy(stranger: Tenant, targets: Targets, session: str) -> list[int]:
    """`GREEDY_TOKENS` tokens after the prompt, over the whole chain."""
    await stranger.feed(targets, session, 0, PROMPT)  # type: ignore[arg-type]
    tokens = [await stranger.token(session)]  # type: ignore[arg-type]
    while len(tokens) < GREEDY_TOKENS:
        await stranger.feed(targets, session, len(PROMPT) + len(tokens) - 1, tokens[-1:])  # type: ignore[arg-type]
        tokens.append(await stranger.token(session))  # type: ignore[arg-type]
    return tokens


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_strangers_frames_for_anothers_session_change_nothing(
    targets: Targets, undisturbed: None, sockets: Path, transport: str
) -> None:
    """Goal: whoever knows a session's id, and nothing else, can neither end, feed, fence nor stall it."""

    async def scenario() -> tuple[list[int], list[int]]:
        async with tenant(transport, sockets) as owner, tenant(transport, sockets) as thief:
            calm_session, session = new_session(), new_session()
            await owner.open_chain(targets, calm_session)
            expected = await greedy(owner, targets, calm_session)
            await owner.close_session(targets, calm_session)

            for hop in targets.hops:  # between nothing and the owner's flow: rows may not be held for later
                state = await owner.open(hop, targets, session)
                assert isinstance(state, StageState)
            await meddle(thief, targets, session)
            await owner.open_chain(targets, session, epoch=2)
            await meddle(thief, targets, session)
            await owner.feed(targets, session, 0, PROMPT, epoch=2)
            tokens = [await owner.token(session)]
            while len(tokens) < GREEDY_TOKENS:
                await meddle(thief, targets, session)
                await owner.feed(targets, session, len(PROMPT) + len(tokens) - 1, tokens[-1:], epoch=2)
                tokens.append(await owner.token(session))
            await owner.close_session(targets, session)
            return expected, tokens

    expected, tokens = asyncio.run(scenario())
    assert tokens == expected


async def meddle(thief: Tenant, targets: Targets, session: str) -> None:
    for hop in targets.hops:
        width = 4 if hop.span.first == 0 else 2 * targets.hidden_size
        for epoch in (0, 1, 2, 3, 1 << 50):
            for position in (0, len(PROMPT), len(PROMPT) + 1):
                header = rows(session, position, 2, epoch)  # type: ignore[arg-type]
                await thief.say(hop.address, header, b"\0" * 2 * width)
            flow = Flow(
                session=session,  # type: ignore[arg-type]
                epoch=epoch,
                previous=None,
                next=None,
                forward_from=0,
                results_from=0,
                rewind_to=0,
            )
            await thief.say(hop.address, flow)
            fault = Fault(session=session, epoch=epoch, code="leaving", message="x")  # type: ignore[arg-type]
            await thief.say(hop.address, fault)
        await thief.say(hop.address, CloseSession(session=session))  # type: ignore[arg-type]
        answer = await thief.open(hop, targets, session, epoch=1 << 51)  # type: ignore[arg-type]
        assert isinstance(answer, Refused)
        assert answer.code == "unknown_session"


def test_rows_that_do_not_fit_are_a_named_fault(targets: Targets, undisturbed: None, sockets: Path) -> None:
    """Its own sessions, misused: each misuse has a name, and the session is as it was before."""
    token = b"\1\0\0\0"
    wide = 2 * targets.hidden_size
    not_a_number = np.full(targets.hidden_size, np.nan, np.float16).tobytes()
    infinite = np.full(targets.hidden_size, np.inf, np.float16).tobytes()
    first = [
        ("a gap", (5, 1), token, "position_mismatch"),
        ("too few bytes", (0, 4), token, "engine_failed"),
        ("too many bytes", (0, 1), token * 4, "engine_failed"),
        ("bytes that no row has", (0, 2), token + b"x", "engine_failed"),
        ("no bytes", (0, 1), b"", "engine_failed"),
        ("a negative token", (0, 1), b"\xff" * 4, "engine_failed"),
        ("a token beyond the vocabulary", (0, 1), np.int32(targets.vocab_size).tobytes(), "engine_failed"),
        ("more than was reserved", (0, 65), token * 65, "position_mismatch"),
    ]
    last = [
        ("NaN", (0, 1), not_a_number, "numeric_fault"),
        ("infinity", (0, 1), infinite, "numeric_fault"),
        ("tokens where rows belong", (0, 1), token, "engine_failed"),
        ("half a row", (0, 1), b"\0" * (wide // 2), "engine_failed"),
        ("a gap", (7, 1), b"\0" * wide, "position_mismatch"),
    ]

    async def scenario() -> None:
        async with tenant("local", sockets) as stranger:
            for hop, cases in ((targets.first, first), (targets.last, last)):
                session = new_session()
                for epoch, (name, place, payload, code) in enumerate(cases, start=1):
                    state = await stranger.open(hop, targets, session, epoch=epoch)
                    assert isinstance(state, StageState), name
                    assert state.position == 0, name
                    flow = Flow(session=session, epoch=epoch, previous=None, next=None, forward_from=0, results_from=0)
                    await stranger.say(hop.address, flow)
                    await stranger.say(hop.address, rows(session, *place, epoch), payload)
                    answer = (await stranger.hear(Fault, Result, session=session)).header
                    assert isinstance(answer, Fault), name
                    assert answer.code == code, (name, answer)
                    assert answer.message, name
                await stranger.say(hop.address, CloseSession(session=session))
            nobodys = new_session()
            await stranger.say(targets.first.address, rows(nobodys, 0, 1), token)
            answer = (await stranger.hear(Fault, session=nobodys)).header
            assert isinstance(answer, Fault)
            assert answer.code == "unknown_session"

    asyncio.run(scenario())


def test_rows_out_of_order_or_twice_do_not_change_the_answer(
    targets: Targets, undisturbed: None, sockets: Path
) -> None:
    async def scenario() -> tuple[list[int], list[int]]:
        async with tenant("local", sockets) as stranger:
            calm_session, session = new_session(), new_session()
            await stranger.open_chain(targets, calm_session)
            expected = await greedy(stranger, targets, calm_session)
            await stranger.open_chain(targets, session)
            await stranger.feed(targets, session, 4, PROMPT[4:])  # too early
            fault = (await stranger.hear(Fault, session=session)).header
            assert isinstance(fault, Fault)
            assert fault.code == "position_mismatch"
            await stranger.feed(targets, session, 0, PROMPT[:6])
            await stranger.feed(targets, session, 0, PROMPT[:4])  # known already
            await stranger.feed(targets, session, 2, PROMPT[2:])  # overlaps
            tokens: list[int] = []
            while len(tokens) < 2:  # one for the six rows, one for the rest
                tokens.append(await stranger.token(session))
            tokens = tokens[1:]
            while len(tokens) < GREEDY_TOKENS:
                await stranger.feed(targets, session, len(PROMPT) + len(tokens) - 1, tokens[-1:])
                tokens.append(await stranger.token(session))
            for each in (calm_session, session):
                await stranger.close_session(targets, each)
            return expected, tokens

    expected, tokens = asyncio.run(scenario())
    assert tokens == expected


def test_rows_that_wait_are_bounded_in_number_and_bytes(targets: Targets, undisturbed: None, sockets: Path) -> None:
    """A session that never flows, and is sent far more than it may hold."""

    async def scenario() -> None:
        async with tenant("local", sockets) as stranger:
            session = new_session()
            state = await stranger.open(targets.first, targets, session)
            assert isinstance(state, StageState)
            for epoch in (1, 2, 1 << 50):
                for _ in range(12):  # 12 x 16 MB for each epoch, three times what may wait
                    await stranger.say(targets.first.address, rows(session, 0, 1, epoch), bytes(16 << 20))
                for position in range(0, 80 * 256, 256):
                    await stranger.say(targets.first.address, rows(session, position, 256, epoch), b"\0" * 1024)
            await stranger.say(targets.first.address, CloseSession(session=session))

    asyncio.run(scenario())


def test_frames_that_are_for_others_are_ignored(targets: Targets, undisturbed: None, sockets: Path) -> None:
    """Answers that nobody asked for, at a device and at the gateway."""
    session = new_session()
    frames = [
        Frame(Result(session=session, epoch=1, position=0, count=1, logit_count=1, k=1), b"\0" * 8),
        Frame(StageState(session=session, epoch=1, position=0, log_start=0, flowed_epoch=0)),
        Frame(Refused(session=session, epoch=1, code="kv_exhausted", message="no")),
        Frame(Fault(session=session, epoch=1, code="leaving", message="no")),
        Frame(OpenStage(session=session, epoch=1, model=targets.model, span=Span(0, 1), reserve_tokens=1)),
        Frame(CloseSession(session=session)),
    ]

    async def scenario() -> None:
        async with tenant("iroh", sockets) as stranger:
            for address in (targets.first.address, targets.gateway):
                for frame in frames * 20:
                    await stranger.peers.send(address, frame)
                assert await stranger.peers.probe(address.node, 5.0)

    asyncio.run(scenario())


# --- room ---------------------------------------------------------------------------------------


def test_a_flood_of_openings_is_answered_one_by_one(targets: Targets, undisturbed: None, sockets: Path) -> None:
    """5,000 sessions asked for in one breath: a few are opened, every other one is refused by name."""

    async def scenario() -> tuple[int, int]:
        async with tenant("local", sockets) as stranger:
            sessions = [new_session() for _ in range(5_000)]
            span = targets.first.span
            for session in sessions:
                opening = OpenStage(session=session, epoch=1, model=targets.model, span=span, reserve_tokens=1)
                await stranger.say(targets.first.address, opening)
            answers = [(await stranger.hear(StageState, Refused)).header for _ in sessions]
            for session in sessions:
                await stranger.say(targets.first.address, CloseSession(session=session))
            refused = [header for header in answers if isinstance(header, Refused)]
            assert all(header.code == "kv_exhausted" and header.message for header in refused)
            return len(answers) - len(refused), len(refused)

    opened, refused = asyncio.run(scenario())
    assert 0 < opened <= EngineSettings().slots_max
    assert refused >= 5_000 - EngineSettings().slots_max


def test_room_that_a_stranger_takes_and_does_not_use_comes_back(
    fleet: LocalService, targets: Targets, calm: Answer, undisturbed: None, sockets: Path
) -> None:
    """Every token of KV room of a device is reserved by one who then keeps silent, link open. A newcomer whose
    conversation needs new room is refused by name while that lasts, and served within `UNUSED_MAX_S` or little more."""

    def first_sentence(key: str, tokens: int) -> Answer:
        return ask(fleet.api_url, QUESTION, tokens, KEYS[key][0], stop=["."])

    async def scenario() -> None:
        expected = await asyncio.to_thread(first_sentence, "calm", 64)
        async with tenant("local", sockets) as stranger:
            for reserve_tokens in (4096, 512, 64):
                answer: StageState | Refused | None = None
                while not isinstance(answer, Refused):
                    answer = await stranger.open(targets.first, targets, new_session(), reserve_tokens)
                assert answer.code == "kv_exhausted"
            began_s = time.monotonic()
            errors = []
            while True:
                served = await asyncio.to_thread(first_sentence, "newcomer", ROOM_TOKENS)
                if served.error is None:
                    break
                errors.append(served.error)
                assert time.monotonic() - began_s < UNUSED_MAX_S + ROOM_SLACK_S, errors
            assert errors, "the device had room left"
            assert "room" in errors[0]
            assert served.text == expected.text
            assert stranger.peers.connected()

    asyncio.run(scenario())
