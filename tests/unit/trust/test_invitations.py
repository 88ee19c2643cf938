"""Invitations as text: read back whole, and refused by name when they are anything else."""

import base64

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.credentials import Role
from fallow.domain.errors import InvitationRefused
from fallow.trust.registrar.invitations import (
    PREFIX,
    Invitation,
    as_qr,
    as_text,
    from_text,
    new_invitation,
    secret_hash,
    secret_matches,
)

URLS = ("https://192.168.1.7:40123", "https://[fe80::1]:40123")


def invitation() -> Invitation:
    return new_invitation(URLS, "ab" * 32, Role.NODE, 1_800_000_000.5)


def test_an_invitation_is_read_back() -> None:
    made = invitation()
    read = from_text(f"\n  {as_text(made)} ")
    assert read == made
    assert (read.registrar_urls, read.network.hex(), read.expires_unix_s) == (URLS, "ab" * 32, 1_800_000_000)


def test_two_invitations_share_neither_id_nor_secret() -> None:
    one, two = invitation(), invitation()
    assert one.id != two.id
    assert one.secret != two.secret


def test_the_secret_is_not_shown_by_accident() -> None:
    made = invitation()
    assert made.secret.hex() not in repr(made)
    assert base64.b64encode(made.secret).decode() not in repr(made)


@given(st.data())
def test_one_changed_character_is_found(data: st.DataObject) -> None:
    text = as_text(invitation())
    place = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters(codec="ascii", exclude_categories=["Cc", "Zs"]).filter(lambda c: c != text[place]))
    changed = text[:place] + other + text[place + 1 :]
    try:
        read = from_text(changed)
    except InvitationRefused:
        return
    assert read == from_text(text)  # the last character's unused bits: the same invitation


@given(st.integers(0, 200))
def test_a_text_that_was_cut_is_found(length: int) -> None:
    with pytest.raises(InvitationRefused):
        from_text(as_text(invitation())[:length])


@given(st.text(max_size=300))
def test_no_other_text_is_an_invitation(text: str) -> None:
    for candidate in (text, PREFIX + text):
        with pytest.raises(InvitationRefused):
            from_text(candidate)


@given(st.binary(max_size=300))
def test_no_other_bytes_behind_a_right_checksum_are_an_invitation(packed: bytes) -> None:
    """The checksum is public: what it covers is still parsed strictly."""
    from fallow.trust.registrar.invitations import _check

    text = PREFIX + base64.urlsafe_b64encode(_check(packed) + packed).rstrip(b"=").decode()
    with pytest.raises(InvitationRefused):
        from_text(text)


@pytest.mark.parametrize(
    "change",
    [
        {"registrar_urls": ()},
        {"registrar_urls": ("http://192.168.1.7:1",)},
        {"registrar_urls": ("https://a b",)},
        {"registrar_urls": ("https://a/path",)},
        {"registrar_urls": ("https://a\n",)},
        {"registrar_urls": ("https://a",) * 9},
        {"network": b"short"},
        {"id": b"short"},
        {"secret": b""},
    ],
)
def test_an_invitation_with_an_absurd_field_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvitationRefused):
        from_text(as_text(msgspec.structs.replace(invitation(), **change)))


def test_only_the_secret_itself_matches_what_was_kept() -> None:
    made = invitation()
    kept = secret_hash(made.secret)
    assert secret_matches(made.secret, kept)
    assert not secret_matches(invitation().secret, kept)
    assert not secret_matches(b"", kept)
    assert made.secret.hex() not in kept


def test_the_qr_code_fits_a_terminal() -> None:
    lines = as_qr(as_text(invitation())).splitlines()
    assert len(lines) < 50
    assert max(map(len, lines)) < 400  # with escape sequences
