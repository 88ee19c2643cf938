"""The relay's handshake and seal: honest pairs understand each other, everything else is a named refusal."""

import os

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.errors import SealBroken
from fallow.domain.ids import NodeId
from fallow.fabric import sealing
from fallow.fabric.local_handshake import Identity
from fallow.fabric.sealing import (
    HEAD_BYTES,
    LINK_ID_BYTES,
    RECORD_OVERHEAD_BYTES,
    SIGNATURE_BYTES,
    Dialler,
    Kind,
    Listener,
    Seals,
    busy,
    parse_head,
)
from tests.unit.fabric.support import STEADY

ALICE, BOB, EVE = (Identity.from_seed(bytes([number] * 32)) for number in (1, 2, 3))
CELL = "home"


def dialled() -> tuple[Dialler, Listener]:
    dialler = Dialler(ALICE, BOB.node, CELL)
    return dialler, Listener(BOB, CELL, ALICE.node, dialler.dial)


def shaken() -> tuple[Seals, Seals]:
    """The two ends of a finished handshake."""
    dialler, listener = dialled()
    confirm, near = dialler.answered(listener.answer)
    return near, listener.confirmed(confirm)


def flipped(message: bytes, bit: int) -> bytes:
    changed = bytearray(message)
    changed[bit // 8 % len(message)] ^= 1 << bit % 8
    return bytes(changed)


@STEADY
@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=3000)), max_size=20))
def test_an_honest_pair_reads_each_other(records: list[tuple[bool, bytes]]) -> None:
    near, far = shaken()
    assert (near.peer, far.peer, near.link_id) == (BOB.node, ALICE.node, far.link_id)
    for outward, plain in records:
        sender, receiver = (near, far) if outward else (far, near)
        message = sender.sealer.seal(plain)
        assert len(message) == len(plain) + RECORD_OVERHEAD_BYTES
        assert receiver.opener.open(message) == plain


def test_every_link_has_keys_of_its_own_in_each_direction() -> None:
    plain = bytes(64)
    sealed = [end.sealer.seal(plain)[-80:] for _ in range(3) for end in shaken()]
    assert len(set(sealed)) == len(sealed)


# --- the handshake ------------------------------------------------------------------------------


@STEADY
@given(st.integers(0, 10_000))
def test_any_changed_bit_of_the_handshake_is_refused(bit: int) -> None:
    dialler, listener = dialled()
    with pytest.raises(SealBroken):
        Listener(BOB, CELL, ALICE.node, flipped(dialler.dial, bit))
    with pytest.raises(SealBroken):
        dialler.answered(flipped(listener.answer, bit))
    confirm, _ = dialler.answered(listener.answer)
    with pytest.raises(SealBroken):
        listener.confirmed(flipped(confirm, bit))


@settings(STEADY, max_examples=30)
@given(st.binary(max_size=400), st.integers(0, 300))
def test_cut_or_lengthened_or_random_messages_are_named_refusals(noise: bytes, size: int) -> None:
    dialler, listener = dialled()
    confirm, near = dialler.answered(listener.answer)
    for message in (dialler.dial, listener.answer, confirm, near.sealer.seal(b"x" * 40)):
        for hostile in (message[: min(size, len(message) - 1)], message + noise + b"!", noise):
            for read in (
                parse_head if len(hostile) < HEAD_BYTES else shaken()[1].opener.open,
                lambda data: Listener(BOB, CELL, ALICE.node, data),
                dialler.answered,
                listener.confirmed,
            ):
                with pytest.raises(SealBroken):
                    read(hostile)


def test_a_recorded_handshake_cannot_be_played_again() -> None:
    dialler, listener = dialled()
    confirm, near = dialler.answered(listener.answer)
    first = near.sealer.seal(b"once")
    again = Listener(BOB, CELL, ALICE.node, dialler.dial)  # a recorded DIAL is answered, with another key
    assert again.answer != listener.answer
    with pytest.raises(SealBroken, match="could not prove"):
        again.confirmed(confirm)
    with pytest.raises(SealBroken):
        Dialler(ALICE, BOB.node, CELL).answered(listener.answer)  # another link
    repeated = Dialler(ALICE, BOB.node, CELL)
    repeated.link_id, repeated.dial = dialler.link_id, repeated.dial.replace(repeated.link_id, dialler.link_id)
    with pytest.raises(SealBroken, match="could not prove"):
        repeated.answered(listener.answer)  # the same link id, even
    with pytest.raises(SealBroken):
        shaken()[1].opener.open(first)


def test_nobody_else_can_answer_or_dial_in_anothers_name() -> None:
    dialler, _ = dialled()
    with pytest.raises(SealBroken, match="not this device"):
        Listener(EVE, CELL, ALICE.node, dialler.dial)
    with pytest.raises(SealBroken, match="in the name of"):
        Listener(BOB, CELL, EVE.node, dialler.dial)
    # Eve was dialled by Alice for her own sake, and passes what she gets on to Bob and back.
    to_eve = Dialler(ALICE, EVE.node, CELL)
    eve = Listener(EVE, CELL, ALICE.node, to_eve.dial)
    bob = Listener(BOB, CELL, EVE.node, Dialler(EVE, BOB.node, CELL).dial)
    with pytest.raises(SealBroken):
        to_eve.answered(bob.answer)
    with pytest.raises(SealBroken):
        dialler.answered(eve.answer)
    # Eve answers with a well-formed answer, signed by herself.
    forged = Listener(BOB, CELL, ALICE.node, dialler.dial)
    body = forged.answer[:-SIGNATURE_BYTES]
    signature = EVE.sign(sealing._context(CELL) + dialler.dial + body)
    with pytest.raises(SealBroken, match="could not prove"):
        dialler.answered(body + signature)


def test_messages_are_not_reflected_nor_taken_for_one_another() -> None:
    dialler, listener = dialled()
    confirm, near = dialler.answered(listener.answer)
    for own in (dialler.dial, confirm):
        with pytest.raises(SealBroken):
            dialler.answered(own)
    with pytest.raises(SealBroken, match="in the name of"):
        Listener(ALICE, CELL, BOB.node, dialler.dial)
    with pytest.raises(SealBroken):
        listener.confirmed(listener.answer)
    with pytest.raises(SealBroken):
        near.opener.open(near.sealer.seal(b"mine"))


def test_what_is_signed_cannot_be_a_text_that_a_nats_server_has_signed() -> None:
    """The device's key also answers NATS's nonce, a text that a captured server chooses."""
    signed: list[bytes] = []

    class Recorder(Identity):
        def sign(self, message: bytes) -> bytes:
            signed.append(message)
            return super().sign(message)

    alice, bob = (Recorder(Ed25519PrivateKey.from_private_bytes(bytes([number] * 32))) for number in (1, 2))
    dialler = Dialler(alice, bob.node, CELL)
    listener = Listener(bob, CELL, alice.node, dialler.dial)
    listener.confirmed(dialler.answered(listener.answer)[0])
    assert len(signed) == 3 and len(set(map(len, signed))) == 3, "nor is one of them another's beginning"
    for statement in signed:
        with pytest.raises(UnicodeDecodeError):
            statement.decode()


def test_a_handshake_holds_in_its_cell_only() -> None:
    dialler, _ = dialled()
    with pytest.raises(SealBroken, match="could not prove"):
        Listener(BOB, "work", ALICE.node, dialler.dial)


def test_a_listener_without_room_says_so() -> None:
    dialler, _ = dialled()
    with pytest.raises(SealBroken, match="takes no more links"):
        dialler.answered(busy(dialler.link_id))


@pytest.mark.parametrize("weak", [bytes(32), b"\x01" + bytes(31), b"\xff" * 32])
def test_keys_that_share_no_secret_are_refused_or_harmless(weak: bytes) -> None:
    honest = Dialler(ALICE, BOB.node, CELL).dial
    body = honest[: -SIGNATURE_BYTES - 32] + weak
    dial = body + ALICE.sign(sealing._context(CELL) + body)
    try:
        Listener(BOB, CELL, ALICE.node, dial)
    except SealBroken as error:
        assert "sealed" in str(error)
    else:
        assert weak == b"\xff" * 32  # a curve point like any other


@pytest.mark.parametrize("name", ["", "zz" * 32, "AB" * 32, "ab" * 31, "ab" * 33, "é" * 64])
def test_ids_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(SealBroken, match="device id"):
        Dialler(ALICE, NodeId(name), CELL)
    with pytest.raises(SealBroken, match="device id"):
        Listener(BOB, CELL, NodeId(name), Dialler(ALICE, BOB.node, CELL).dial)


def test_a_stolen_device_key_opens_no_recorded_link() -> None:
    """Forward secrecy: seeds and every byte of an exchange do not open it; a thief can only start new ones."""
    dialler, listener = dialled()
    confirm, near = dialler.answered(listener.answer)
    sealed = near.sealer.seal(b"secret")
    thief = Listener(Identity(Ed25519PrivateKey.from_private_bytes(b"\x02" * 32)), CELL, ALICE.node, dialler.dial)
    with pytest.raises(SealBroken):
        thief.confirmed(confirm)
    thief._transcript = listener._transcript  # as if the recorded answer had been the thief's
    with pytest.raises(SealBroken, match="does not open"):
        thief.confirmed(confirm)
    assert b"secret" not in sealed


# --- records ------------------------------------------------------------------------------------


@STEADY
@given(st.lists(st.integers(0, 7), min_size=1, max_size=12))
def test_only_the_next_record_opens(order: list[int]) -> None:
    near, far = shaken()
    records = [near.sealer.seal(b"%d" % i) for i in range(8)]
    for expected, which in enumerate(order):
        if which == expected:
            assert far.opener.open(records[which]) == b"%d" % which
            continue
        with pytest.raises(SealBroken, match="lost or held back" if which > expected else "came again"):
            far.opener.open(records[which])
        break


@STEADY
@given(st.binary(max_size=500), st.integers(0, 10_000))
def test_any_changed_bit_of_a_record_is_noticed(plain: bytes, bit: int) -> None:
    near, far = shaken()
    message = near.sealer.seal(plain)
    with pytest.raises(SealBroken):
        far.opener.open(flipped(message, bit))
    assert far.opener.open(message) == plain


def test_a_record_of_another_link_is_refused_under_either_name() -> None:
    near, far = shaken()
    other, _ = shaken()
    foreign = other.sealer.seal(b"foreign")
    with pytest.raises(SealBroken, match="another message"):
        far.opener.open(foreign)
    with pytest.raises(SealBroken, match="altered"):
        far.opener.open(foreign.replace(other.link_id, near.link_id))


def test_a_key_is_used_up_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "RECORDS_MAX", 3)
    near, _ = shaken()
    for _ in range(3):
        near.sealer.seal(b"")
    with pytest.raises(SealBroken, match="carried 3 records"):
        near.sealer.seal(b"")


def test_heads_say_version_kind_and_link() -> None:
    link_id = os.urandom(LINK_ID_BYTES)
    head = parse_head(busy(link_id))
    assert (head.kind, head.link_id) == (Kind.BUSY, link_id)
    with pytest.raises(SealBroken, match="version 1, got 2"):
        parse_head(b"\x02" + busy(link_id)[1:])
    with pytest.raises(SealBroken, match="unknown kind"):
        parse_head(b"\x01\x09" + link_id)
