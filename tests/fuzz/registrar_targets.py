"""The registrar's part of what is fuzzed: requests, invitations, consents, answers, and what a member keeps."""

import base64
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import msgspec

from fallow.domain.credentials import Role
from fallow.domain.errors import FallowError
from fallow.domain.fleet import Tier
from fallow.domain.ids import NodeId
from fallow.domain.network import Network
from fallow.system_clock import SystemClock
from fallow.trust.envelope import Envelope, Kind, pre_authentication, seal
from fallow.trust.keys import identity_of
from fallow.trust.registrar import requests
from fallow.trust.registrar.consent import read_consent, sign_consent
from fallow.trust.registrar.database import open_database
from fallow.trust.registrar.invitations import PREFIX, _check, as_text, from_text, new_invitation
from fallow.trust.registrar.journal import parse_head
from fallow.trust.registrar.service import Registrar
from fallow.trust.registrar.state import found, read_network
from fallow.trust.registrar_client import _decoded, _failure

KEY = identity_of(b"\x07" * 32)
NETWORK = "ab" * 32
CONSENT = sign_consent(KEY, NETWORK, Role.NODE, "I lend this device.")
ACTIONS = (
    requests.Enrol(invitation="cd" * 16, secret=b"s" * 32, role=Role.NODE, name="desk", consent=CONSENT),
    requests.Renew(cell="home"),
    requests.Leave(),
    requests.Invite(role=Role.NODE, tier=Tier.KEYED, life_s=60.0, name="desk", cell="home"),
    requests.Withdraw(which="desk"),
    requests.Revoke(node="ab" * 32, why="lost"),
    requests.ReadJournal(after_seq=3),
)


@cache
def _registrar() -> Registrar:
    folder = Path(tempfile.mkdtemp(prefix="fallow-fuzz-"))
    state = found(folder, name="n", cell="home", tuf_root="{}", now_unix_s=1e9)
    return Registrar(state, open_database(state.paths.database), SystemClock())


def _signed(kind: Kind, body: bytes) -> bytes:
    return msgspec.msgpack.encode(Envelope(kind, body, KEY.node, KEY.sign(pre_authentication(kind, body))))


def request(data: bytes) -> None:
    """To a real registrar: as it came, and as a well signed body."""
    _each(lambda: _registrar().answer(data), lambda: _registrar().answer(_signed(Kind.REQUEST, data)))


def invitation(data: bytes) -> None:
    """As a text, and behind a right checksum."""
    packed = PREFIX + base64.urlsafe_b64encode(_check(data) + data).rstrip(b"=").decode()
    _each(lambda: from_text(data.decode("utf-8", "replace")), lambda: from_text(packed))


def kept(data: bytes) -> None:
    """A consent, a network's description, a journal's head."""
    text = data.decode("utf-8", "replace")
    _each(
        lambda: read_consent(_signed(Kind.CONSENT, data), KEY.node, NETWORK, Role.NODE),
        lambda: read_network(data),
        lambda: parse_head(text),
    )


def answer(data: bytes) -> None:
    """What something that calls itself the registrar answers."""
    _each(
        lambda: _decoded(data, requests.Answer),  # type: ignore[arg-type]
        lambda: _decoded(data, requests.Challenge),
        lambda: _raise(_failure(data, "https://127.0.0.1:1", 500)),
    )


def seeds() -> dict[str, tuple[Callable[[bytes], object], tuple[bytes, ...]]]:
    """Function and valid inputs, by name."""
    asked = [requests.Request(network=NETWORK, nonce="x", action=action) for action in ACTIONS]
    made = new_invitation(("https://127.0.0.1:1",), NETWORK, Role.NODE, 1e9)
    network = Network(
        format=1, name="n", cell="home", authority_pem="", account="A", registrar=NodeId(KEY.node), tuf_root="{}"
    )
    gone = requests.Gone(node=KEY.node, name="desk")
    bodies = tuple(msgspec.json.encode(each) for each in asked)
    return {
        "registrar_request": (request, (*bodies, seal(Kind.REQUEST, asked[0], KEY))),
        "invitation": (invitation, (as_text(made).encode(), msgspec.msgpack.encode(made))),
        "membership": (kept, (CONSENT, msgspec.json.encode(network), b"3:" + b"ab" * 32)),
        "registrar_answer": (answer, (msgspec.json.encode(gone), b'{"error":{"code":"bad_signature","message":"m"}}')),
    }


def _raise(error: FallowError) -> None:
    raise error


def _each(*readers: Callable[[], object]) -> None:
    """Every reader, whatever the ones before refuse."""
    refusal: FallowError | None = None
    for reader in readers:
        try:
            reader()
        except FallowError as error:
            refusal = error
    if refusal is not None:
        raise refusal
