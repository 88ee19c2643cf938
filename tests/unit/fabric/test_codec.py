"""The frame codec under arbitrary chunking, truncation and hostile bytes."""

import itertools
import math
import struct

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.errors import FrameError
from fallow.domain.frames import (
    MAX_FRAME_BYTES,
    MAX_HEADER_BYTES,
    Ahead,
    AnyHeader,
    Chunk,
    CloseSession,
    Fault,
    FetchChunk,
    Flow,
    Frame,
    Goodbye,
    Hello,
    OpenStage,
    PeerAddress,
    Phase,
    Ping,
    Pong,
    Refused,
    Result,
    Rows,
    StageState,
)
from fallow.domain.model import Span
from fallow.domain.sampling import Recipe
from fallow.fabric.codec import FrameDecoder, encode, encode_parts
from fallow.fabric.frame_checks import fields_without_check
from tests.unit.fabric.support import STEADY

SESSION = "0123456789abcdef" * 2
DIGEST = "0123456789abcdef" * 4

sessions = st.text("0123456789abcdef", min_size=32, max_size=32)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
epochs = st.integers(0, (1 << 53) - 1)
positions = st.integers(0, (1 << 31) - 300)
words = st.text(max_size=64)
addresses = st.builds(PeerAddress, digests, st.lists(words, max_size=16).map(tuple))
top_ks = st.none() | st.integers(1, 1024)
spans = st.integers(0, 4000).flatmap(lambda first: st.builds(Span, st.just(first), st.integers(first + 1, 4096)))
recipes = st.builds(
    Recipe,
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1),
    top_k=top_ks,
    min_p=st.floats(0, 1),
    seed=st.integers(0, (1 << 64) - 1),
    index=st.integers(0, 127),
)
aheads = st.builds(
    Ahead,
    first=addresses,
    first_session=sessions,
    recipe=recipes,
    drawn_from=positions,
    until=positions,
    ends=st.lists(positions, max_size=64).map(tuple),
)

without_payload = st.one_of(
    st.builds(
        Hello,
        version_min=st.integers(0, 9),
        version_max=st.integers(9, 99),
        capabilities=st.lists(words, max_size=9).map(tuple),
        role=words,
    ),
    st.builds(Ping, nonce=st.integers(0, (1 << 64) - 1)),
    st.builds(Pong, nonce=st.integers(0, (1 << 64) - 1)),
    st.builds(Goodbye, code=words, message=words),
    st.builds(OpenStage, session=sessions, epoch=epochs, model=digests, span=spans, reserve_tokens=positions),
    st.builds(StageState, session=sessions, epoch=epochs, position=positions, log_start=positions, flowed_epoch=epochs),
    st.builds(Refused, session=sessions, epoch=epochs, code=words, message=words),
    st.builds(
        Flow,
        session=sessions,
        epoch=epochs,
        previous=st.none() | digests,
        next=st.none() | addresses,
        forward_from=positions,
        results_from=positions,
        rewind_to=st.none() | positions,
        ahead=st.none() | aheads,
        ahead_from=st.none() | digests,
    ),
    st.builds(CloseSession, session=sessions),
    st.builds(
        Fault,
        session=sessions,
        epoch=epochs,
        code=words,
        message=words,
        suspect=st.none() | digests,
        void_from=st.none() | positions,
    ),
    st.builds(FetchChunk, digest=digests, index=positions),
)
with_payload = st.one_of(
    st.builds(
        Rows,
        session=sessions,
        epoch=epochs,
        position=positions,
        count=st.integers(1, 256),
        phase=st.sampled_from(Phase),
        logits_from=positions,
        top_k=top_ks,
    ),
    st.builds(
        Result,
        session=sessions,
        epoch=epochs,
        position=positions,
        count=st.just(256),
        logit_count=st.integers(0, 256),
        k=top_ks,
    ),
    st.builds(Chunk, digest=digests, index=positions, found=st.just(True)),
)
payloads = st.binary(max_size=300) | st.integers(16_000, 40_000).map(bytes)
frames = st.builds(Frame, without_payload) | st.builds(Frame, with_payload, payloads)


def _cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def _plain(frame: Frame) -> Frame:
    return Frame(frame.header, bytes(frame.payload))


def rows(**changes: object) -> Rows:
    base = {
        "session": SESSION,
        "epoch": 0,
        "position": 0,
        "count": 1,
        "phase": Phase.DECODE,
        "logits_from": 0,
        "top_k": None,
    }
    return Rows(**(base | changes))  # type: ignore[arg-type]


def told(recipe: Recipe, ends: tuple[int, ...] = ()) -> Flow:
    """A last stage's flow."""
    ahead = Ahead(first=PeerAddress(DIGEST, ()), first_session=SESSION, recipe=recipe, drawn_from=0, until=9, ends=ends)
    return Flow(session=SESSION, epoch=0, previous=None, next=None, forward_from=0, results_from=0, ahead=ahead)


def flow(following: PeerAddress) -> Flow:
    return Flow(session=SESSION, epoch=0, previous=None, next=following, forward_from=0, results_from=0)


@STEADY
@given(st.lists(frames, min_size=1, max_size=8), st.lists(st.integers(0, 1 << 20), max_size=12))
def test_frames_survive_any_chunking(sent: list[Frame], cuts: list[int]) -> None:
    decoder = FrameDecoder()
    came = [frame for piece in _cut(b"".join(map(encode, sent)), cuts) for frame in decoder.feed(piece)]
    assert [_plain(frame) for frame in came] == sent
    assert decoder.pending_bytes == 0
    decoder.finish()


@STEADY
@given(frames, st.data())
def test_a_truncated_frame_never_appears(frame: Frame, data: st.DataObject) -> None:
    encoded = encode(frame)
    kept = data.draw(st.integers(1, len(encoded) - 1))
    decoder = FrameDecoder()
    assert decoder.feed(encoded[:kept]) == []
    with pytest.raises(FrameError, match="inside a frame"):
        decoder.finish()


@settings(STEADY, max_examples=200)
@given(st.lists(st.binary(max_size=60), max_size=6))
def test_random_bytes_raise_nothing_but_frame_error(pieces: list[bytes]) -> None:
    decoder = FrameDecoder()
    try:
        for piece in pieces:
            decoder.feed(piece)
    except FrameError:
        with pytest.raises(FrameError):
            decoder.feed(b"")


@settings(STEADY, max_examples=200)
@given(frames, st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_frames_raise_nothing_but_frame_error(frame: Frame, damage: list[tuple[int, int]]) -> None:
    data = bytearray(encode(frame))
    for at, value in damage:
        data[at % min(len(data), 200)] = value
    try:
        FrameDecoder().feed(bytes(data))
    except FrameError as error:
        assert str(error)


@settings(STEADY, max_examples=200)
@given(st.binary(max_size=200))
def test_random_headers_raise_nothing_but_frame_error(header: bytes) -> None:
    with pytest.raises(FrameError):
        FrameDecoder().feed(struct.pack("<II", 8 + len(header), len(header)) + header)


def _raw(fields: dict[str, object], payload: bytes = b"") -> bytes:
    header = msgspec.msgpack.encode(fields)
    return struct.pack("<II", 8 + len(header) + len(payload), len(header)) + header + payload


def test_good_frames_before_garbage_are_delivered() -> None:
    decoder = FrameDecoder()
    good = Frame(Ping(nonce=1))
    assert decoder.feed(encode(good) + b"\xff" * 64) == [good]
    assert decoder.failure is not None
    with pytest.raises(FrameError, match="too large"):
        decoder.feed(encode(good))


def test_an_unknown_kind_is_refused_by_name_and_unknown_fields_are_not() -> None:
    with pytest.raises(FrameError, match="unknown frame kind 'teleport'"):
        FrameDecoder().feed(_raw({"kind": "teleport"}))
    assert FrameDecoder().feed(_raw({"kind": "ping", "nonce": 3, "colour": "red"})) == [Frame(Ping(nonce=3))]


def test_a_missing_field_is_named() -> None:
    with pytest.raises(FrameError, match=r"bad ping header.*nonce"):
        FrameDecoder().feed(_raw({"kind": "ping"}))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (rows(position=-1), "Rows.position: expected 0 to .* got -1"),
        (rows(count=0), "Rows.count: expected 1 to 256, got 0"),
        (rows(count=257), "Rows.count: .* got 257"),
        (rows(epoch=-1), "Rows.epoch"),
        (rows(top_k=0), "Rows.top_k: expected 1 to 1024, got 0"),
        (rows(top_k=1025), "Rows.top_k"),
        (rows(session=SESSION.upper()), "Rows.session: expected 32 lower-case hex"),
        (rows(session=SESSION + "\n"), "Rows.session"),
        (Hello(version_min=2, version_max=1), "Hello: expected version_min <= version_max"),
        (Hello(version_min=1, version_max=1, capabilities=("x",) * 65), "Hello.capabilities: expected at most 64"),
        (FetchChunk(digest="../../etc", index=0), "FetchChunk.digest"),
        (FetchChunk(digest=DIGEST, index=-1), "FetchChunk.index"),
        (
            OpenStage(session=SESSION, epoch=0, model=DIGEST, span=Span(3, 3), reserve_tokens=1),
            "OpenStage.span: expected 0 <= first < last",
        ),
        (OpenStage(session=SESSION, epoch=0, model=DIGEST, span=Span(0, 1), reserve_tokens=-1), "reserve_tokens"),
        (flow(PeerAddress(DIGEST, ("a:1",) * 17)), "Flow.next: expected at most 16 of"),
        (flow(PeerAddress(DIGEST, ("a" * 257,))), "Flow.next: expected at most 16 of at most 256"),
        (flow(PeerAddress("me", ())), "Flow.next: expected 64 lower-case hex"),
        (told(Recipe(temperature=math.nan)), "Flow.ahead: expected a temperature of 0 or more"),
        (told(Recipe(temperature=-0.5)), "Flow.ahead: expected a temperature of 0 or more"),
        (told(Recipe(top_p=1.5)), "Flow.ahead: expected a temperature of 0 or more, and shares"),
        (told(Recipe(min_p=-1.0)), "Flow.ahead: expected a temperature of 0 or more, and shares"),
        (told(Recipe(top_k=0)), "Flow.ahead: expected 1 to 1024"),
        (told(Recipe(), ends=(7,) * 65), "Flow.ahead: expected at most 64 tokens"),
        (told(Recipe(), ends=(-7,)), "Flow.ahead: expected at most 64 tokens"),
        (
            Result(session=SESSION, epoch=0, position=0, count=1, logit_count=2, k=1),
            "Result: expected logit_count <= count",
        ),
        (Fault(session=SESSION, epoch=0, code="x", message="", suspect="me"), "Fault.suspect"),
        (Goodbye(code="x", message="m" * 4097), "Goodbye.message"),
    ],
)
def test_ranges_and_formats_are_checked_at_the_edge(header: AnyHeader, words: str) -> None:
    with pytest.raises(FrameError, match=words):
        FrameDecoder().feed(encode(Frame(header)))


def test_payload_only_where_the_kind_has_one() -> None:
    with pytest.raises(FrameError, match="Ping carries no payload"):
        encode(Frame(Ping(nonce=1), b"x"))
    with pytest.raises(FrameError, match="Ping carries no payload, got 1"):
        FrameDecoder().feed(_raw({"kind": "ping", "nonce": 1}, b"x"))
    with pytest.raises(FrameError, match="when not found"):
        FrameDecoder().feed(encode(Frame(Chunk(digest=DIGEST, index=0, found=False), b"x")))


@pytest.mark.parametrize(
    ("total", "header_bytes"),
    [(MAX_FRAME_BYTES + 1, 10), (100, MAX_HEADER_BYTES + 1), (100, 93), (8, 0), (100, 0), (0, 0), (7, 1)],
)
def test_lying_lengths_are_refused_before_anything_is_buffered(total: int, header_bytes: int) -> None:
    decoder = FrameDecoder()
    with pytest.raises(FrameError):
        decoder.feed(struct.pack("<II", total, header_bytes))
    assert decoder.pending_bytes == 0


def test_limits_hold_when_encoding() -> None:
    with pytest.raises(FrameError, match="too large"):
        encode(Frame(rows(), bytes(MAX_FRAME_BYTES)))
    with pytest.raises(FrameError, match="too large"):
        encode(Frame(Goodbye(code="x", message="m" * MAX_HEADER_BYTES)))


def test_big_payloads_are_not_copied_and_small_ones_keep_no_read_alive() -> None:
    big = bytes(1 << 20)
    assert encode_parts(Frame(rows(), big))[1] is big
    data = encode(Frame(rows(), big))
    (frame,) = FrameDecoder().feed(data)
    assert isinstance(frame.payload, memoryview) and frame.payload.obj is data
    small = encode(Frame(rows(), b"abc"))
    (frame,) = FrameDecoder().feed(small)
    assert frame.payload == b"abc" and isinstance(frame.payload, bytes)
    *_, frame = FrameDecoder().feed(data + encode(Frame(rows(), bytes(20_000))))
    assert isinstance(frame.payload, bytes)


def test_every_field_has_a_check_of_its_own() -> None:
    assert fields_without_check() == set()


def test_typed_memoryviews_count_bytes_not_items() -> None:
    (frame,) = FrameDecoder().feed(encode(Frame(rows(), memoryview(bytes(64)).cast("i"))))
    assert frame.payload == bytes(64)
