"""Invitations: what a newcomer is given, as text to copy or a QR code to scan.

Rules
- `fallow1-` and base64url of a checksum and a MessagePack array. The checksum finds slips in copying and is no
  security: that lies in the secret, which the registrar knows only by its hash, and in the pinned digest of
  `network.json`.
- Whoever holds the text can use it, once, until it expires. The registrar's clock decides that, not the newcomer's.
- Reading one trusts nothing in it but its form.
"""

import base64
import binascii
import hashlib
import hmac
import io
import secrets
from typing import Annotated, Final

import msgspec

from fallow.domain.credentials import Role
from fallow.domain.errors import InvitationRefused

PREFIX: Final = "fallow1-"
SECRET_BYTES: Final = 32
ID_BYTES: Final = 16
URLS_MAX: Final = 8
TEXT_MAX_CHARS: Final = 4096
_CHECK_BYTES: Final = 4

Url = Annotated[str, msgspec.Meta(max_length=256, pattern=r"^https://[^\s/]+\Z")]


class Invitation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the text holds. Do not log it."""

    registrar_urls: Annotated[tuple[Url, ...], msgspec.Meta(min_length=1, max_length=URLS_MAX)]
    network: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    """SHA-256 of `network.json`."""
    id: Annotated[bytes, msgspec.Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
    secret: Annotated[bytes, msgspec.Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    role: Role
    """For the words that its user sees; the registrar goes by its own record."""
    expires_unix_s: int

    def __repr__(self) -> str:
        return f"Invitation({self.id.hex()[:8]}…, {self.role})"


def new_invitation(urls: tuple[str, ...], network: str, role: Role, expires_unix_s: float) -> Invitation:
    """An invitation with a fresh id and secret; `network` is the digest as hex."""
    id_, secret = secrets.token_bytes(ID_BYTES), secrets.token_bytes(SECRET_BYTES)
    return Invitation(urls[:URLS_MAX], bytes.fromhex(network), id_, secret, role, int(expires_unix_s))


def as_text(invitation: Invitation) -> str:
    """The text to hand over."""
    packed = msgspec.msgpack.encode(invitation)
    return PREFIX + base64.urlsafe_b64encode(_check(packed) + packed).rstrip(b"=").decode()


def from_text(text: str) -> Invitation:
    """Read an invitation. Raises `InvitationRefused` for anything else."""
    text = text.strip()
    if not text.startswith(PREFIX) or len(text) > TEXT_MAX_CHARS:
        raise InvitationRefused(f"An invitation begins with {PREFIX}; this begins with {text[:12]!r}.")
    encoded = text.removeprefix(PREFIX)
    try:
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        check, packed = raw[:_CHECK_BYTES], raw[_CHECK_BYTES:]
        if not hmac.compare_digest(check, _check(packed)):
            raise InvitationRefused("This invitation was not copied whole, or was changed: copy it again.")
        return msgspec.msgpack.decode(packed, type=Invitation)
    except (binascii.Error, ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise InvitationRefused(f"This invitation cannot be read: {error}. Copy it again.") from None


def secret_hash(secret: bytes) -> str:
    """What the registrar keeps of a secret. It is 32 random bytes, so that one plain hash is enough."""
    return hashlib.sha256(b"fallow invitation" + secret).hexdigest()


def secret_matches(secret: bytes, kept: str) -> bool:
    """Whether a secret is the one that was kept as a hash, in constant time."""
    return hmac.compare_digest(secret_hash(secret), kept)


def as_qr(text: str) -> str:
    """The text as a QR code for a terminal."""
    import segno

    drawing = io.StringIO()
    segno.make_qr(text, error="l").terminal(drawing, compact=True)
    return drawing.getvalue()


def _check(packed: bytes) -> bytes:
    return hashlib.sha256(PREFIX.encode() + packed).digest()[:_CHECK_BYTES]
