"""Local peers prove their ids: honest pairs succeed under any chunking, everybody else is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.errors import LinkClosed
from fallow.fabric.local_handshake import MAGIC, Handshake, Identity, Role
from tests.unit.fabric.support import STEADY

ALICE, BOB, EVE = (Identity.from_seed(bytes([number] * 32)) for number in (1, 2, 3))


def sides(expected: Identity | None = BOB) -> tuple[Handshake, Handshake]:
    return Handshake(ALICE, Role.DIALLER, expected.node if expected else None), Handshake(BOB, Role.LISTENER, None)


def pieces(data: bytes, sizes: list[int]) -> list[bytes]:
    cut = []
    for size in sizes:
        cut.append(data[:size])
        data = data[size:]
    return [*cut, data]


@STEADY
@given(st.lists(st.integers(0, 90), max_size=5), st.lists(st.integers(0, 90), max_size=5), st.binary(max_size=50))
def test_an_honest_pair_knows_each_other_and_keeps_what_follows(
    ours: list[int], theirs: list[int], rest: bytes
) -> None:
    dialler, listener = sides()
    reply = b"".join(listener.feed(piece) for piece in pieces(dialler.first(), ours))
    assert dialler.peer is None and listener.peer is None
    proof = b"".join(dialler.feed(piece) for piece in pieces(reply + rest, theirs))
    assert dialler.peer == BOB.node and dialler.rest == rest and listener.first() == b""
    assert b"".join(listener.feed(piece) for piece in pieces(proof + rest, ours)) == b""
    assert listener.peer == ALICE.node and listener.rest == rest


@STEADY
@given(st.data())
def test_any_changed_bit_is_refused(data: st.DataObject) -> None:
    dialler, listener = sides()
    message = bytearray(listener.feed(dialler.first()))
    at = data.draw(st.integers(0, len(message) - 1))
    message[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(LinkClosed):
        dialler.feed(bytes(message))
    assert dialler.peer is None


def test_a_proof_of_another_connection_is_refused() -> None:
    dialler, listener = sides()
    proof = dialler.feed(listener.feed(dialler.first()))
    replayed, again = sides()
    again.feed(replayed.first())
    with pytest.raises(LinkClosed, match="could not prove"):
        again.feed(proof)


def test_a_reflected_proof_is_refused() -> None:
    listener = Handshake(BOB, Role.LISTENER, None)
    mirror = Handshake(BOB, Role.DIALLER, None)
    answer = listener.feed(mirror.first())
    with pytest.raises(LinkClosed, match="could not prove"):
        listener.feed(answer[-64:])


def test_the_wrong_peer_is_named() -> None:
    dialler, listener = sides(expected=EVE)
    with pytest.raises(LinkClosed, match=f"expected {EVE.node[:8]}, found {BOB.node[:8]}"):
        dialler.feed(listener.feed(dialler.first()))


@STEADY
@given(st.binary(min_size=1, max_size=300))
def test_garbage_is_refused_or_waited_on_and_never_believed(garbage: bytes) -> None:
    listener = Handshake(BOB, Role.LISTENER, None)
    if MAGIC.startswith(garbage[: len(MAGIC)]):
        assert listener.feed(garbage) == b""
    else:
        with pytest.raises(LinkClosed, match="something else"):
            listener.feed(garbage)
    assert listener.peer is None
