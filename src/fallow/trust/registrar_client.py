"""Talking to a registrar: over HTTPS, with the network's own authority pinned, and every failure by name.

Rules
- The server must show a certificate for `REGISTRAR_NAME` that the network's authority signed, whatever address it was
  found at. The one exception is the first look at `network.json` by an invitation: that file proves itself by its
  digest, and nothing is sent before it did.
- Several urls are tried in turn, the one that answered last first. An answer that is a refusal is an answer: the other
  urls are of the same registrar, and are not asked to change it.
- Answers are read up to a size and within a time. No proxy, cookie or redirect is followed.
"""

import asyncio
import hashlib
import ssl
from collections.abc import Sequence
from typing import Any, Final, TypeVar

import httpx
import msgspec

from fallow.domain.errors import (
    CharterInvalid,
    CharterUnavailable,
    FallowError,
    InvitationRefused,
    MembershipEnded,
    PassportRefused,
    PublishedTooOften,
    RegistrarUnavailable,
    RequestRefused,
    SignatureInvalid,
)
from fallow.domain.network import REGISTRAR_NAME, Network, Places
from fallow.trust.certificates import client_context
from fallow.trust.envelope import Kind, seal
from fallow.trust.keys import Identity
from fallow.trust.registrar.invitations import Invitation
from fallow.trust.registrar.requests import (
    Admitted,
    Answer,
    Challenge,
    Enrol,
    Gone,
    Invite,
    Invited,
    JournalPage,
    Leave,
    ReadJournal,
    Renew,
    Request,
    Revoke,
    Withdraw,
    Withdrawn,
)
from fallow.trust.registrar.state import NETWORK_MAX_BYTES, digest_of, read_network

TIMEOUT_S: Final = 15.0
EXCHANGE_LIMIT_S: Final = 120.0
CONNECT_TIMEOUT_S: Final = 5.0
ANSWER_MAX_BYTES: Final = 8 << 20
URLS_MAX: Final = 16

_NAMED: Final[dict[str, type[FallowError]]] = {
    error.code: error
    for error in (
        SignatureInvalid,
        RequestRefused,
        MembershipEnded,
        InvitationRefused,
        PassportRefused,
        CharterInvalid,
        CharterUnavailable,
        PublishedTooOften,
        RegistrarUnavailable,
    )
}
T = TypeVar("T")
Asked = Enrol | Renew | Leave | Invite | Withdraw | Revoke | ReadJournal


class _Problem(msgspec.Struct, frozen=True):
    code: str
    message: str


class _Failure(msgspec.Struct, frozen=True):
    error: _Problem


class Met(msgspec.Struct, frozen=True):
    """A network's description that was checked against a pinned digest."""

    network: Network
    content: bytes
    """`network.json` as it came; its bytes are what the digest is of."""
    digest: str


class RegistrarClient:
    """One network's registrar. Used as an async context manager, or closed."""

    def __init__(self, met: Met, urls: Sequence[str], timeout_s: float = TIMEOUT_S) -> None:
        """Raises `ConfigError` for an authority that is no certificate."""
        self.met = met
        self.urls = list(dict.fromkeys(urls))[:URLS_MAX]
        self._http = _http(client_context(met.network.authority_pem), timeout_s)

    async def __aenter__(self) -> "RegistrarClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def places(self) -> Places:
        """Where the network can be reached now. Raises `RegistrarUnavailable`."""
        return _decoded(await self._call("GET", "/places"), Places)

    async def revocations(self) -> bytes:
        """The newest list of revocations, as an envelope. Raises `RegistrarUnavailable`."""
        return await self._call("GET", "/revocations")

    async def ask(self, who: Identity, action: Asked) -> Answer:
        """A signed request. Raises what the registrar refused it with, or `RegistrarUnavailable`."""
        challenge = _decoded(await self._call("GET", "/challenge"), Challenge)
        request = Request(network=self.met.digest, nonce=challenge.nonce, action=action)
        return _decoded(await self._call("POST", "/requests", seal(Kind.REQUEST, request, who)), Answer)  # type: ignore[arg-type]

    async def admission(self, who: Identity, action: Enrol | Renew) -> Admitted:
        """A passport. Raises as `ask` does."""
        return _expect(await self.ask(who, action), Admitted)

    async def invite(self, who: Identity, action: Invite) -> Invited:
        """An invitation, made from afar by an operator. Raises as `ask` does."""
        return _expect(await self.ask(who, action), Invited)

    async def withdraw(self, who: Identity, action: Withdraw) -> Withdrawn:
        """Make invitations void, from afar. Raises as `ask` does."""
        return _expect(await self.ask(who, action), Withdrawn)

    async def farewell(self, who: Identity, action: Leave | Revoke) -> Gone:
        """The end of a membership. Raises as `ask` does."""
        return _expect(await self.ask(who, action), Gone)

    async def journal(self, who: Identity, after_seq: int) -> JournalPage:
        """The journal's next entries. Raises as `ask` does."""
        return _expect(await self.ask(who, ReadJournal(after_seq=after_seq)), JournalPage)

    async def post_halt(self, envelope: bytes) -> None:
        """Bring a council member's halt. Raises `SignatureInvalid`, `RegistrarUnavailable`."""
        await self._call("POST", "/halts", envelope)

    async def post_publication(self, publication: bytes) -> None:
        """Bring a publication. Raises `CharterInvalid`, `RegistrarUnavailable`."""
        await self._call("POST", "/council/publish", publication)

    async def _call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        failure: RegistrarUnavailable | None = None
        for url in list(self.urls):
            try:
                answer = await _exchange(self._http, method, url + path, body)
            except RegistrarUnavailable as error:
                failure = failure or error
                continue
            self.urls = [url, *(each for each in self.urls if each != url)][:URLS_MAX]  # it may have moved meanwhile
            return answer
        raise failure or RegistrarUnavailable("No address of the network's registrar is known.")


async def meet(invitation: Invitation, timeout_s: float = TIMEOUT_S) -> Met:
    """The description of the network that an invitation pins, from the first of its urls that has it.

    Raises `InvitationRefused` when what is found there is of another network, `RegistrarUnavailable` when nothing is.
    """
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname = False
    anybody.verify_mode = ssl.CERT_NONE  # what comes is checked by its digest, and nothing is sent
    failures: list[FallowError] = []
    async with _http(anybody, timeout_s) as http:
        for url in invitation.registrar_urls:
            try:
                content = await _exchange(http, "GET", f"{url}/network.json", None, NETWORK_MAX_BYTES)
            except FallowError as error:
                failures.append(error)
                continue
            if hashlib.sha256(content).digest() == invitation.network:
                return met(content)
            failures.append(
                InvitationRefused(f"What answers at {url} is not the registrar of the network that invited you.")
            )
    other = [error for error in failures if isinstance(error, InvitationRefused)]
    raise (other or failures)[0]


def met(content: bytes) -> Met:
    """A description that is known to be the right one. Raises `ConfigError`."""
    return Met(read_network(content), content, digest_of(content))


def _http(context: ssl.SSLContext, timeout_s: float) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        verify=context,
        trust_env=False,
        follow_redirects=False,
        timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
        limits=httpx.Limits(max_connections=4, max_keepalive_connections=1),
    )


async def _exchange(
    http: httpx.AsyncClient, method: str, url: str, body: bytes | None, bytes_max: int = ANSWER_MAX_BYTES
) -> bytes:
    """The body of a good answer. Raises what a bad one names, or `RegistrarUnavailable`."""
    content = bytearray()
    try:
        async with asyncio.timeout(EXCHANGE_LIMIT_S):
            request = http.build_request(method, url, content=body, extensions={"sni_hostname": REGISTRAR_NAME})
            response = await http.send(request, stream=True)
            try:
                async for part in response.aiter_raw():
                    content += part
                    if len(content) > bytes_max:
                        raise RegistrarUnavailable(f"The answer of {url} is longer than {bytes_max} bytes.")
            finally:
                await response.aclose()
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise RegistrarUnavailable(
            f"The registrar at {url} cannot be reached: {error or type(error).__name__}."
        ) from None
    if response.status_code != 200:
        raise _failure(bytes(content), url, response.status_code)
    return bytes(content)


def _failure(content: bytes, url: str, status: int) -> FallowError:
    try:
        problem = msgspec.json.decode(content, type=_Failure).error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return RegistrarUnavailable(f"What answers at {url} is no registrar of this release (status {status}).")
    return _NAMED.get(problem.code, RegistrarUnavailable)(" ".join(problem.message.split())[:1000])


def _decoded(content: bytes, type_: type[T]) -> T:
    try:
        return msgspec.json.decode(content, type=type_)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RegistrarUnavailable(
            f"The registrar's answer cannot be read ({error}); is its release the same?"
        ) from None


def _expect(answer: Any, type_: type[T]) -> T:
    if not isinstance(answer, type_):
        raise RegistrarUnavailable(f"Expected {type_.__name__} of the registrar, got {type(answer).__name__}.")
    return answer
