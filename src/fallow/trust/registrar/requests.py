"""What is asked of a registrar and answered: the documents inside its HTTPS interface.

Rules
- A request is an envelope `fallow/request`, signed by who asks. It names the network and a nonce that this registrar
  gave out within the last `NONCE_LIFE_S` by its own clock; the asker's clock is never asked.
- The nonce proves itself (a MAC over its time), so that handing one out stores nothing; it is remembered once used.
- Answers are JSON and come over TLS with the network's certificate, which is what makes them believable.
"""

import hashlib
import hmac
import secrets
from typing import Annotated, Final

import msgspec

from fallow.domain.credentials import Role
from fallow.domain.errors import RequestRefused
from fallow.domain.fleet import Tier
from fallow.domain.network import Places
from fallow.trust.registrar.journal import Entry

REQUEST_MAX_BYTES: Final = 64 * 1024
CONSENT_MAX_BYTES: Final = 12_000
"""As base64 it still fits an entry of the journal, and the longest words that we show do so in any script."""
NONCE_LIFE_S: Final = 60.0
NAME_MAX_CHARS: Final = 64
NAME_PATTERN: Final = rf"^[^\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]{{1,{NAME_MAX_CHARS}}}\Z"
"""No control characters and no changes of writing direction: names are shown in people's terminals."""

CELL_PATTERN: Final = r"^[A-Za-z0-9_-]{1,32}\Z"

Cell = Annotated[str, msgspec.Meta(pattern=CELL_PATTERN)]
Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
Why = Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Challenge(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to `GET /challenge`."""

    nonce: str
    life_s: float


class Enrol(msgspec.Struct, frozen=True, kw_only=True, tag="enrol", forbid_unknown_fields=True):
    """Admit the signer by an invitation. Answered by `Admitted`."""

    invitation: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
    secret: Annotated[bytes, msgspec.Meta(max_length=64)]
    role: Role
    name: Name
    consent: Annotated[bytes, msgspec.Meta(max_length=CONSENT_MAX_BYTES)] | None = None
    """An envelope `fallow/consent`; devices need one."""


class Renew(msgspec.Struct, frozen=True, kw_only=True, tag="renew", forbid_unknown_fields=True):
    """A new passport for a member. Answered by `Admitted`."""

    cell: Cell | None = None
    """The cell that a device is nearest to; `None`: where it is."""


class Leave(msgspec.Struct, frozen=True, kw_only=True, tag="leave", forbid_unknown_fields=True):
    """The signer leaves for good. Answered by `Gone`."""


class Invite(msgspec.Struct, frozen=True, kw_only=True, tag="invite", forbid_unknown_fields=True):
    """Make an invitation. Answered by `Invited`."""

    role: Role
    tier: Tier
    life_s: Annotated[float, msgspec.Meta(gt=0)]
    name: Name | None = None
    cell: Cell | None = None
    """`None`: the network's own."""


class Withdraw(msgspec.Struct, frozen=True, kw_only=True, tag="withdraw", forbid_unknown_fields=True):
    """Make invitations void that nobody used yet. Answered by `Withdrawn`."""

    which: Name
    """An invitation's id, or 8 or more of its first digits, or the name that invitations were made for."""


class Revoke(msgspec.Struct, frozen=True, kw_only=True, tag="revoke", forbid_unknown_fields=True):
    """Shut a key out for good. Answered by `Gone`."""

    node: Hex
    why: Why


class ReadJournal(msgspec.Struct, frozen=True, kw_only=True, tag="read_journal", forbid_unknown_fields=True):
    """The journal's next entries. Answered by `JournalPage`."""

    after_seq: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is signed."""

    network: Hex
    """SHA-256 of `network.json`: a request to one network is none to another."""
    nonce: Annotated[str, msgspec.Meta(max_length=128)]
    action: Enrol | Renew | Leave | Invite | Withdraw | Revoke | ReadJournal


class Admitted(msgspec.Struct, frozen=True, kw_only=True, tag="admitted"):
    """The signer is a member."""

    passport: str
    issued_unix_s: float
    """By the registrar's clock, as is the next. A member counts the difference on a clock that does not jump."""
    expires_unix_s: float
    places: Places
    list_sequence: int
    """Of the present list of revocations: older lists say nothing newer of the places."""
    journal_head: str
    """`seq:hash`; members keep it, so that the journal cannot be written anew unseen."""
    system_passport: str | None = None
    """For coordinators: opens the bus's system account, whose events tell of broken connections."""


class Invited(msgspec.Struct, frozen=True, kw_only=True, tag="invited"):
    """An invitation was made."""

    text: str
    expires_unix_s: float


class Withdrawn(msgspec.Struct, frozen=True, kw_only=True, tag="withdrawn"):
    """Those invitations admit nobody any more."""

    invitations: tuple[str, ...]


class Gone(msgspec.Struct, frozen=True, kw_only=True, tag="gone"):
    """A member was revoked, or has left."""

    node: str
    name: str


class JournalPage(msgspec.Struct, frozen=True, kw_only=True, tag="journal_page"):
    """Entries in order, and the head of the whole journal."""

    entries: tuple[Entry, ...]
    head: str


Answer = Admitted | Invited | Withdrawn | Gone | JournalPage


def new_nonce(key: bytes, now_unix_s: float) -> str:
    """A nonce that this registrar will know again: random bytes, its time of expiry, and a MAC of both."""
    body = f"{secrets.token_hex(16)}.{int((now_unix_s + NONCE_LIFE_S) * 1000)}"
    return f"{body}.{_mac(key, body)}"


def nonce_expiry(key: bytes, nonce: str, now_unix_s: float) -> float:
    """When a nonce of ours expires. Raises `RequestRefused` when it is not ours, or has expired."""
    body, _, mac = nonce.rpartition(".")
    if not hmac.compare_digest(mac.encode(), _mac(key, body).encode()):
        raise RequestRefused("The request's challenge was not given out by this registrar.")
    expires_unix_s = int(body.rpartition(".")[2]) / 1000
    if not now_unix_s < expires_unix_s <= now_unix_s + NONCE_LIFE_S:
        raise RequestRefused(f"The request's challenge is older than {NONCE_LIFE_S:g} s; ask for another.")
    return expires_unix_s


def _mac(key: bytes, body: str) -> str:
    return hmac.new(key, b"fallow challenge " + body.encode(), hashlib.sha256).hexdigest()
