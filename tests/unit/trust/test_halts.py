"""Halts: sealed, read, carried as text, and kept on disk."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fallow.domain.errors import SignatureInvalid
from fallow.policy.council import HALT_EPOCHS_AHEAD
from fallow.trust.council.halts import HaltBook, decode_halts, halt_of_text, halt_text, read_halt, seal_halt
from fallow.trust.envelope import Kind, seal
from fallow.trust.keys import Identity, identity_of

ALICE, BOB, EVE = (identity_of(name.ljust(32, b".")) for name in (b"alice", b"bob", b"eve"))
NETWORK = "5a" * 32
COUNCIL = {"key id of alice": ALICE.node, "key id of bob": BOB.node}


def halt(member: Identity = ALICE, epoch: int = 1, why: str = "a drill", network: str = NETWORK) -> bytes:
    return seal_halt(member, network, epoch, why, 1.8e9)


@given(st.text(min_size=1, max_size=1000), st.integers(0, 1 << 53))
def test_a_halt_is_read_as_it_was_sealed_by_any_way(why: str, epoch: int) -> None:
    envelope = halt(epoch=epoch, why=why.encode("utf-8", "replace").decode())
    text = halt_text(envelope)
    carried = halt_of_text("\n".join(text[i : i + 60] + " " for i in range(0, len(text), 60)))
    read, signer = read_halt(carried, NETWORK)
    assert (read.epoch, signer) == (epoch, ALICE.node)


@given(st.integers(0, 10_000), st.integers(1, 255))
@example(206, 32)  # the signer's name in capitals
def test_a_changed_byte_makes_it_none(position: int, difference: int) -> None:
    envelope = bytearray(halt())
    envelope[position % len(envelope)] ^= difference
    with pytest.raises(SignatureInvalid):
        read_halt(bytes(envelope), NETWORK)


@given(st.text(max_size=300))
def test_what_is_no_text_of_a_halt_is_refused_by_name(text: str) -> None:
    with pytest.raises(SignatureInvalid):
        read_halt(halt_of_text(text), NETWORK)


def test_a_halt_of_another_network_or_kind_is_none() -> None:
    with pytest.raises(SignatureInvalid, match="another network"):
        read_halt(halt(network="00" * 32), NETWORK)
    document, _ = read_halt(halt(), NETWORK)
    with pytest.raises(SignatureInvalid, match="fallow/halt"):
        read_halt(seal(Kind.GRANT, document, ALICE), NETWORK)


def test_a_book_is_sticky(tmp_path: Path) -> None:
    """What a member halted is halted after a restart, and no time ends it."""
    book = HaltBook(tmp_path / "halts", NETWORK)
    assert book.add(halt(), COUNCIL, 1) is not None
    again = HaltBook(tmp_path / "halts", NETWORK)
    assert [each.why for _, each in again.holding(COUNCIL.values(), 1)] == ["a drill"]
    assert again.envelopes() == (halt(),)


def test_a_book_keeps_what_holds_once_for_each_signer(tmp_path: Path) -> None:
    book = HaltBook(tmp_path / "halts", NETWORK)
    assert book.add(halt(EVE), COUNCIL, 1) is None
    assert book.add(halt(epoch=1), COUNCIL, 2) is None
    assert book.add(halt(epoch=2), COUNCIL, 2) is not None
    assert book.add(halt(epoch=2, why="again"), COUNCIL, 2) is None
    for epoch in range(3, 60):
        assert book.add(halt(epoch=epoch), COUNCIL, 2) is not None
    assert book.add(halt(BOB, epoch=2), COUNCIL, 2) is not None
    assert len(book.envelopes()) == 2


def test_a_book_forgets_only_what_holds_no_more(tmp_path: Path) -> None:
    book = HaltBook(tmp_path / "halts", NETWORK)
    book.add(halt(epoch=5), COUNCIL, 1)
    book.add(halt(BOB, epoch=9), COUNCIL, 1)
    assert book.prune(COUNCIL, 5) == ()
    assert [each.epoch for each in book.prune(COUNCIL, 6)] == [5]
    assert [each.epoch for each in book.prune({"key id of alice": ALICE.node}, 6)] == [9]
    assert HaltBook(tmp_path / "halts", NETWORK).envelopes() == ()


def test_a_damaged_book_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "halts").write_bytes(b"\xc1 not a list")
    with pytest.raises(SignatureInvalid):
        HaltBook(tmp_path / "halts", NETWORK)


@given(st.binary(max_size=400))
def test_a_file_of_halts_is_read_or_refused_by_name(data: bytes) -> None:
    with contextlib.suppress(SignatureInvalid):
        assert decode_halts(data, NETWORK) == ()


def test_a_halt_that_another_wrote_is_seen_and_not_lost(tmp_path: Path) -> None:
    """`fallow council obey` writes beside a running process, whose next change must keep what it wrote."""
    running, command = (HaltBook(tmp_path / "halts", NETWORK) for _ in range(2))
    assert command.add(halt(), COUNCIL, 1) is not None
    assert running.prune(COUNCIL, 1) == ()
    assert [each.why for _, each in running.holding(COUNCIL.values(), 1)] == ["a drill"]
    assert command.add(halt(epoch=2), COUNCIL, 1) is not None
    assert running.add(halt(BOB), COUNCIL, 1) is not None
    assert len(HaltBook(tmp_path / "halts", NETWORK).envelopes()) == 2


def test_a_book_takes_no_epoch_from_far_ahead(tmp_path: Path) -> None:
    book = HaltBook(tmp_path / "halts", NETWORK)
    assert book.add(halt(epoch=2 + HALT_EPOCHS_AHEAD), COUNCIL, 1) is None
    assert book.add(halt(epoch=1 + HALT_EPOCHS_AHEAD), COUNCIL, 1) is not None
