"""Envelopes: only the signer's own words, of the kind that is expected."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.charter import Halt
from fallow.domain.errors import SignatureInvalid
from fallow.trust.envelope import ENVELOPE_MAX_BYTES, Kind, pre_authentication, seal, unseal
from fallow.trust.keys import identity_of, nkey_of, node_of_nkey, user_nkey

SIGNER = identity_of(b"\x01" * 32)
HALT = Halt(network="n", epoch=3, why="a drill", issued_unix_s=1.0)


def test_the_pre_authentication_encoding_is_that_of_the_dsse_specification() -> None:
    # The example of the specification, protocol.md.
    assert pre_authentication("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_what_was_sealed_is_read_with_its_signer() -> None:
    assert unseal(Kind.HALT, Halt, seal(Kind.HALT, HALT, SIGNER)) == (HALT, SIGNER.node)


def test_a_document_does_not_pass_for_one_of_another_kind() -> None:
    with pytest.raises(SignatureInvalid, match="fallow/order"):
        unseal(Kind.ORDER, Halt, seal(Kind.HALT, HALT, SIGNER))


@given(st.data())
def test_no_changed_byte_goes_unnoticed(data: st.DataObject) -> None:
    sealed = bytearray(seal(Kind.HALT, HALT, SIGNER))
    place = data.draw(st.integers(0, len(sealed) - 1))
    sealed[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SignatureInvalid):
        unseal(Kind.HALT, Halt, bytes(sealed))


@given(st.binary(max_size=400))
def test_garbage_is_refused_by_name(garbage: bytes) -> None:
    with pytest.raises(SignatureInvalid):
        unseal(Kind.GRANT, Halt, garbage)


def test_too_large_a_document_is_not_even_read() -> None:
    with pytest.raises(SignatureInvalid, match="up to"):
        unseal(Kind.HALT, Halt, b"\x94" + b"0" * ENVELOPE_MAX_BYTES)


def test_well_signed_nonsense_is_refused() -> None:
    class Other(msgspec.Struct):
        why: int

    with pytest.raises(SignatureInvalid, match="cannot be read"):
        unseal(Kind.HALT, Halt, seal(Kind.HALT, Other(3), SIGNER))


def test_nkeys_are_the_same_keys() -> None:
    nkey = user_nkey(SIGNER.node)
    assert nkey.startswith("U")
    assert len(nkey) == 56
    assert node_of_nkey(nkey) == SIGNER.node
    for wrong in (nkey[:-1] + ("A" if nkey[-1] != "A" else "B"), nkey_of(bytes.fromhex(SIGNER.node), 0), "", "U" * 56):
        with pytest.raises(SignatureInvalid):
            node_of_nkey(wrong)
