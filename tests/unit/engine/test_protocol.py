"""Frames between agent and worker: whole again however they were cut, and refused when they cannot be."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.errors import EngineError, FrameError
from fallow.domain.frames import Phase
from fallow.engine import protocol
from fallow.engine.contract import Stepped

MESSAGES = [
    (protocol.Run(1, "a" * 32, 0, 2, Phase.PREFILL, 0, 64), b"\x00" * 8),
    (protocol.Free(2, "b" * 32), b""),
    (protocol.Rewind(3, "c" * 32, 7), b""),
    (protocol.Run(4, "d" * 32, 5, 1, Phase.DECODE, 0, None), b"payload"),
]


def encoded(messages):
    return b"".join(bytes(part) for header, payload in messages for part in protocol.encode(header, payload))


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(1, 60), max_size=40))
def test_frames_survive_any_cutting(chosen, sizes):
    messages = [MESSAGES[number] for number in chosen]
    data, frames, got, at = encoded(messages), protocol.Frames(protocol.REQUESTS), [], 0
    for size in [*sizes, len(data)]:
        got += [(header, bytes(payload)) for header, payload in frames.feed(data[at : at + size])]
        at += size
    assert got == messages


@given(st.binary(min_size=8, max_size=200))
def test_random_bytes_are_a_frame_error_or_wait_for_more(data):
    with contextlib.suppress(FrameError):
        list(protocol.Frames(protocol.REQUESTS).feed(data))


@pytest.mark.parametrize("header", [b"", b"\xc1", b"\x93\xa3run\x01\x02", b"\x92\xa4nope\x01", b"\x90"])
def test_headers_that_cannot_be_are_refused(header):
    with pytest.raises(FrameError):
        list(protocol.Frames(protocol.REQUESTS).feed(protocol.PREFIX.pack(len(header), 0) + header))


@pytest.mark.parametrize("token", [-1, 1 << 31, (1 << 64) - 1, 1.5, "7", b"7", [7]])
def test_a_drawn_token_that_no_row_can_carry_is_refused(token):
    header = msgspec.msgpack.encode(["computed", 1, 1, 5, 0.0, token])
    with pytest.raises(FrameError):
        list(protocol.Frames(protocol.REPLIES).feed(protocol.PREFIX.pack(len(header), 0) + header))


@pytest.mark.parametrize("drawn", [None, 0, 7, (1 << 31) - 1])
def test_what_a_step_led_to_arrives_as_it_was(drawn):
    stepped = Stepped(payload=b"rows", logit_count=1, k=5, compute_s=0.5, drawn=drawn)
    data = b"".join(protocol.encode(protocol.computed_of(3, stepped), stepped.payload))
    [(computed, payload)] = protocol.Frames(protocol.REPLIES).feed(data)
    assert computed.ticket == 3
    assert protocol.stepped_of(computed, bytes(payload)) == stepped


def test_absurd_lengths_are_refused_before_anything_is_held():
    for sizes in ((1 << 31, 0), (4, 1 << 31)):
        with pytest.raises(FrameError):
            list(protocol.Frames(protocol.REQUESTS).feed(protocol.PREFIX.pack(*sizes)))


def test_a_payload_beyond_the_bound_is_refused_by_the_sender():
    with pytest.raises(EngineError):
        protocol.encode(MESSAGES[0][0], bytes(protocol.MAX_PAYLOAD_BYTES + 1))
