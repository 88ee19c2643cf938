"""NATS's JWTs, version 2: who runs the bus (operator), whose traffic it is (account), and who may join (user).

Rules
- The format is nats-io/jwt's: `base64url(header).base64url(claims).base64url(signature)` without padding, the header
  fixed, the signature Ed25519 over the first two parts, keys written as nkeys.
- The id (`jti`) is a SHA-512/256 of all the claims. nats-io/jwt leaves the permissions and revocations out of it, and
  nats-server takes an account's update with an id that it knows for no update: two within a second would be one.
- An operator signs accounts, an account signs users. A user that its account did not sign with its own key is nobody.
- Reading is strict and checks the signature before it parses any claim. Everything unexpected is `PassportRefused`.
- Not here: clocks and revocations (`passports.py`), and what a role may do (`policy/bus_rights.py`).
"""

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Annotated, Final, Generic, TypeVar

import msgspec
import nkeys
from cryptography.hazmat.primitives import hashes

from fallow.domain.credentials import PASSPORT_LIFE_S
from fallow.domain.errors import PassportRefused, SignatureInvalid
from fallow.domain.ids import NodeId
from fallow.policy.bus_rights import BusRights
from fallow.trust.keys import Identity, nkey_of, node_of_nkey, public_key, user_nkey, verify

VERSION: Final = 2
USER_BYTES_MAX: Final = 12 * 1024
"""Of a user's JWT. nats-server takes it within one line (`max_control_line`)."""
NAME_CHARS_MAX: Final = 100
MESSAGE_BYTES_MAX: Final = 1 << 20
ANSWER_LIFE_S: Final = 60
"""For how long after a question its answer may be sent."""
JETSTREAM_BYTES_MAX: Final = 64 << 20
STREAMS_MAX: Final = 64

_HEADER: Final = "eyJ0eXAiOiJKV1QiLCJhbGciOiJlZDI1NTE5LW5rZXkifQ"
"""`{"typ":"JWT","alg":"ed25519-nkey"}`. No other is read, so that nobody can choose the algorithm."""
_UNLIMITED: Final = -1
_PART: Final = re.compile(r"[A-Za-z0-9_-]+")

Seconds = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Body = TypeVar("Body")


class Claims(msgspec.Struct, Generic[Body], frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What every NATS JWT says."""

    jti: str = ""
    iat: Seconds
    """When it was made, in unix seconds."""
    iss: str
    """Public nkey of who signed."""
    sub: str
    """Public nkey of whom it is about."""
    name: str = ""
    """For people."""
    exp: Seconds | None = None
    nats: Body


class Permission(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Subjects that are allowed and forbidden; forbidding wins. Empty: everything."""

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()


class Answers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Leave to answer what came on one's subscriptions."""

    max: int
    """Answers to one question."""
    ttl: int
    """In nanoseconds."""


class UserBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A user's part: what it may do on the bus."""

    pub: Permission
    sub: Permission
    resp: Answers | None = None
    subs: int
    """Subscriptions at once; -1 as many as it likes."""
    data: int
    payload: int
    """Bytes of one message."""
    allowed_connection_types: tuple[str, ...]
    type: str
    version: int
    tags: tuple[str, ...]


class _AccountBody(msgspec.Struct, frozen=True, kw_only=True):
    limits: dict[str, int | bool]
    revocations: dict[str, int]
    default_permissions: dict[str, Permission]
    type: str = "account"
    version: int = VERSION


class _OperatorBody(msgspec.Struct, frozen=True, kw_only=True):
    system_account: str
    type: str = "operator"
    version: int = VERSION


# --- writing --------------------------------------------------------------------------------------


def account_nkey(node: NodeId) -> str:
    """A public key as the name of an account: `A…`."""
    return nkey_of(public_key(node).public_bytes_raw(), nkeys.PREFIX_BYTE_ACCOUNT)


def operator_nkey(node: NodeId) -> str:
    """A public key as the name of an operator: `O…`."""
    return nkey_of(public_key(node).public_bytes_raw(), nkeys.PREFIX_BYTE_OPERATOR)


def operator_jwt(operator: Identity, *, system: NodeId, name: str, issued_unix_s: float) -> str:
    """The operator's word about itself: which account the server's own events belong to."""
    me = operator_nkey(operator.node)
    body = _OperatorBody(system_account=account_nkey(system))
    return _sign(Claims(iat=int(issued_unix_s), iss=me, sub=me, name=name, nats=body), operator)


def account_jwt(
    operator: Identity, account: NodeId, *, name: str, issued_unix_s: float, revoked: Mapping[NodeId, float]
) -> str:
    """The account in which a fleet talks. Its users are cut by whoever appears in `revoked`, with the unix second up to
    which their JWTs are void.

    `issued_unix_s` must be a whole second later with every one: a server that starts takes the one that was issued
    last, and of two from the same second either.
    """
    limits = _limits() | {"mem_storage": 0, "disk_storage": JETSTREAM_BYTES_MAX, "streams": STREAMS_MAX, "consumer": 1}
    return _account(operator, account, name, issued_unix_s, limits, revoked)


def system_account_jwt(
    operator: Identity, account: NodeId, *, name: str, issued_unix_s: float, revoked: Mapping[NodeId, float]
) -> str:
    """The account of the server's own events and questions, under the rules of `account_jwt`."""
    return _account(operator, account, name, issued_unix_s, _limits(), revoked)


def user_jwt(
    account: Identity,
    *,
    node: NodeId,
    name: str,
    issued_unix_s: float,
    life_s: float,
    rights: BusRights,
    tags: tuple[str, ...] = (),
) -> str:
    """A user of `account`, whose key must be given: users of others' signing keys are not read here."""
    answers = Answers(max=1, ttl=ANSWER_LIFE_S * 1_000_000_000) if rights.may_answer else None
    body = UserBody(
        # An empty list would mean "everything".
        pub=Permission(allow=rights.publish) if rights.publish else Permission(deny=(">",)),
        sub=Permission(allow=rights.subscribe) if rights.subscribe else Permission(deny=(">",)),
        resp=answers,
        subs=rights.subscriptions_max or _UNLIMITED,
        data=_UNLIMITED,
        payload=MESSAGE_BYTES_MAX,
        allowed_connection_types=("STANDARD",),
        type="user",
        version=VERSION,
        tags=tags,
    )
    claims = Claims(
        iat=int(issued_unix_s),
        exp=int(issued_unix_s + life_s),
        iss=account_nkey(account.node),
        sub=user_nkey(node),
        name=name,
        nats=body,
    )
    return _sign(claims, account)


def _limits() -> dict[str, int | bool]:
    return {"subs": -1, "data": -1, "payload": MESSAGE_BYTES_MAX, "conn": -1, "leaf": 0, "disallow_bearer": True}


def _account(
    operator: Identity,
    account: NodeId,
    name: str,
    issued_unix_s: float,
    limits: dict[str, int | bool],
    revoked: Mapping[NodeId, float],
) -> str:
    nothing = Permission(deny=(">",))
    body = _AccountBody(
        limits=limits,
        revocations={user_nkey(node): int(unix_s) for node, unix_s in sorted(revoked.items())},
        default_permissions={"pub": nothing, "sub": nothing},  # of users that name none
    )
    issuer = operator_nkey(operator.node)
    claims = Claims(iat=int(issued_unix_s), iss=issuer, sub=account_nkey(account), name=name, nats=body)
    return _sign(claims, operator)


def _sign(claims: Claims[Body], signer: Identity) -> str:
    digest = hashes.Hash(hashes.SHA512_256())
    digest.update(msgspec.json.encode(claims))
    jti = base64.b32encode(digest.finalize()).rstrip(b"=").decode()
    signed = f"{_HEADER}.{_encode(msgspec.json.encode(msgspec.structs.replace(claims, jti=jti)))}"
    return f"{signed}.{_encode(signer.sign(signed.encode()))}"


def _encode(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


# --- reading --------------------------------------------------------------------------------------


def read_user(text: str, account: str) -> tuple[Claims[UserBody], NodeId]:
    """The claims of a user's JWT that `account` (`A…`) signed with its own key, and the user's key.

    Nothing is said of the time. Raises `PassportRefused`.
    """
    if not text:
        raise PassportRefused("expected a passport, got none")
    if len(text) > USER_BYTES_MAX:
        raise PassportRefused(f"expected a passport of up to {USER_BYTES_MAX} bytes, got {len(text)}")
    header, dot, rest = text.partition(".")
    body, second_dot, signature = rest.partition(".")
    if not (dot and second_dot) or header != _HEADER:
        raise PassportRefused("expected a passport, got a text of another form")
    try:
        signer = node_of_nkey(account, nkeys.PREFIX_BYTE_ACCOUNT)
        verify(signer, _decode(signature), f"{header}.{body}".encode())
        claims = msgspec.json.decode(_decode(body), type=Claims[UserBody])
        node = node_of_nkey(claims.sub)
    except SignatureInvalid:
        raise PassportRefused(f"expected a passport signed by {account[:8]}…, got one that is not") from None
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise PassportRefused(f"a well signed passport that cannot be read: {error}") from None
    if claims.iss != account or claims.nats.type != "user" or claims.nats.version != VERSION:
        raise PassportRefused("expected a passport of this network's account, got another document of it")
    if claims.exp is None or not 0 < claims.exp - claims.iat <= PASSPORT_LIFE_S:
        raise PassportRefused(f"expected a passport good for up to {PASSPORT_LIFE_S:.0f} s, got one for longer")
    if len(claims.name) > NAME_CHARS_MAX:
        raise PassportRefused(f"expected a name of up to {NAME_CHARS_MAX} characters, got {len(claims.name)}")
    return claims, node


def _decode(part: str) -> bytes:
    """Canonical base64url only: one document has one text."""
    if not _PART.fullmatch(part):
        raise PassportRefused("expected a passport, got a text with other characters")
    try:
        decoded = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except (binascii.Error, ValueError):
        raise PassportRefused("expected a passport, got a text that is cut short") from None
    if _encode(decoded) != part:
        raise PassportRefused("expected a passport, got a text with stray bits")
    return decoded


def peek(text: str) -> tuple[Claims[UserBody], NodeId] | None:
    """What one's own passport says, unchecked; `None` when it cannot be read. Never to be believed of a stranger's."""
    try:
        claims = msgspec.json.decode(_decode(text.split(".")[1]), type=Claims[UserBody])
        return claims, node_of_nkey(claims.sub)
    except (IndexError, PassportRefused, SignatureInvalid, msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
