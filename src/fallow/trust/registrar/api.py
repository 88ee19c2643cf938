"""The registrar's HTTPS interface: what anybody may fetch, and signed requests.

    GET  /network.json          the network's description; its digest is what an invitation pins
    GET  /places                where the network can be reached now
    GET  /revocations           an envelope `fallow/revocations`, the newest list
    GET  /challenge             a nonce for one request
    POST /requests              an envelope `fallow/request`; answered by JSON (`trust/registrar/requests.py`)
    GET  /tuf/…                 the council's repository, `halts.bin` among it; names that TUF uses and no others
    POST /halts                 an envelope `fallow/halt`
    POST /council/publish       a publication of the council or of a publisher; it carries its own proof
    GET  /health

Rules
- A body is read up to its kind's limit and within `BODY_TIMEOUT_S`. Reads, requests and publications have a `Pool`
  each: threads, a rate for each address, and room for so many at once, in all and of one address. Who comes beyond is
  told to come again, not queued; what strangers post keeps no device from its charter.
- A publication takes one of the threads that check them only when all of it has arrived.
- Every failure is JSON `{"error": {"code": …, "message": …}}` with a code of `domain/errors.py`: a disk that is full,
  and what we did not think of, too.
- Nothing is decided here. Blocking work is done on threads.
"""

import asyncio
import functools
import logging
import re
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, ParamSpec, TypeVar

import msgspec
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from fallow.domain.clock import Clock
from fallow.domain.errors import (
    CharterInvalid,
    CharterUnavailable,
    FallowError,
    InvitationRefused,
    NotWorking,
    PublishedTooOften,
    RegistrarUnavailable,
    RequestRefused,
    SignatureInvalid,
)
from fallow.policy.rate_limit import KeyLimits, KeyUsage, Refused, admit, fresh_usage, released
from fallow.policy.subscribers import subscriber_of
from fallow.trust.council.halts import HALT_MAX_BYTES
from fallow.trust.council.publication import PUBLICATION_MAX_BYTES, decode_publication
from fallow.trust.council.repository import Repository
from fallow.trust.registrar.requests import REQUEST_MAX_BYTES, Gone
from fallow.trust.registrar.service import Registrar
from fallow.trust.registrar.state import read_places
from fallow.trust.registrar.word import RegistrarWord

BODY_TIMEOUT_S: Final = 15.0
PUBLICATION_TIMEOUT_S: Final = 120.0
ADDRESSES_MAX: Final = 10_000

log = logging.getLogger(__name__)
T = TypeVar("T")
P = ParamSpec("P")

_TUF_NAME: Final = re.compile(
    r"halts\.bin|metadata/[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.json"
    r"|targets/[0-9a-f]{64}\.policy\.json"  # publishers' files are kept to be checked again; no device fetches them
)
_STATUS: Final[dict[type[FallowError], int]] = {
    SignatureInvalid: 401,
    RequestRefused: 403,
    InvitationRefused: 403,
    CharterInvalid: 422,
    PublishedTooOften: 429,
    NotWorking: 409,
    CharterUnavailable: 503,
    RegistrarUnavailable: 503,
}


class PoolLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What there is for one kind of requests."""

    rate: KeyLimits
    """Of one address (of IPv6, one /64)."""
    at_once: int
    at_once_per_address: int
    threads: int


class ApiLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The interface's bounds."""

    reads: PoolLimits = PoolLimits(
        rate=KeyLimits(requests_per_minute=30_000), at_once=512, at_once_per_address=64, threads=8
    )
    requests: PoolLimits = PoolLimits(
        rate=KeyLimits(requests_per_minute=600), at_once=256, at_once_per_address=32, threads=4
    )
    """Challenges, signed requests, and halts."""
    publications: PoolLimits = PoolLimits(
        rate=KeyLimits(requests_per_minute=60), at_once=8, at_once_per_address=2, threads=2
    )
    """Each may hold `PUBLICATION_MAX_BYTES` in memory."""


class TooMany(Exception):
    """An address asks faster than it may."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__()
        self.retry_after_s = retry_after_s


class RateBook:
    """What each address has left. The ones not heard of for longest are forgotten first."""

    def __init__(self, limits: KeyLimits) -> None:
        self._limits = limits
        self._usages: OrderedDict[str, KeyUsage] = OrderedDict()

    def take(self, address: str, now_s: float) -> None:
        """Count one request. Raises `TooMany`."""
        usage = self._usages.get(address) or fresh_usage(self._limits, now_s)
        outcome = admit(usage, self._limits, now_s)
        refused = isinstance(outcome, Refused)
        self._usages[address] = outcome.usage if refused else released(outcome.usage, self._limits, 0, now_s)
        self._usages.move_to_end(address)
        if len(self._usages) > ADDRESSES_MAX:
            self._usages.popitem(last=False)
        if isinstance(outcome, Refused):
            raise TooMany(outcome.retry_after_s)


class Pool:
    """Room and threads for one kind of requests."""

    def __init__(self, limits: PoolLimits) -> None:
        self._limits = limits
        self._book = RateBook(limits.rate)
        self._under_way: Counter[str] = Counter()
        self._count = 0
        self._threads = ThreadPoolExecutor(limits.threads, "registrar")

    @contextmanager
    def place(self, address: str, now_s: float) -> Iterator[None]:
        """Room for one request while it is under way. Raises `TooMany`, `RegistrarUnavailable`."""
        self._book.take(address, now_s)
        if self._under_way[address] >= self._limits.at_once_per_address:
            raise TooMany(1.0)
        if self._count >= self._limits.at_once:
            raise RegistrarUnavailable("The registrar is busy; try again in a moment.")
        self._count += 1
        self._under_way[address] += 1
        try:
            yield
        finally:
            self._count -= 1
            self._under_way[address] -= 1
            if not self._under_way[address]:
                del self._under_way[address]

    async def run(self, work: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
        """Do what blocks on one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(work, *given, **named))

    def close(self) -> None:
        """Start nothing more. What is under way ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class RegistrarApi:
    """The interface of one registrar and one repository. `changed` is called after what others must hear of."""

    def __init__(
        self,
        registrar: Registrar,
        word: RegistrarWord,
        repository: Repository,
        clock: Clock,
        changed: Callable[[], None] = lambda: None,
        limits: ApiLimits | None = None,
    ) -> None:
        limits = limits or ApiLimits()
        self._registrar = registrar
        self._word = word
        self._repository = repository
        self._clock = clock
        self._changed = changed
        self._reads = Pool(limits.reads)
        self._asks = Pool(limits.requests)
        self._publications = Pool(limits.publications)

    def close(self) -> None:
        """Answer nothing more. Idempotent."""
        for pool in (self._reads, self._asks, self._publications):
            pool.close()

    def app(self) -> Starlette:
        """The ASGI application."""
        read, ask, publish = self._reads, self._asks, self._publications
        routes = [
            Route("/network.json", self._guarded(read, self._network), methods=["GET"]),
            Route("/places", self._guarded(read, self._places), methods=["GET"]),
            Route("/revocations", self._guarded(read, self._revocations), methods=["GET"]),
            Route("/health", self._guarded(read, self._health), methods=["GET"]),
            Route("/tuf/{name:path}", self._guarded(read, self._file), methods=["GET"]),
            Route("/challenge", self._guarded(ask, self._challenge), methods=["GET"]),
            Route("/requests", self._guarded(ask, self._request), methods=["POST"]),
            Route("/halts", self._guarded(ask, self._halt), methods=["POST"]),
            Route("/council/publish", self._guarded(publish, self._publication), methods=["POST"]),
        ]

        async def no_such(_: Request, error: Exception) -> Response:
            status = error.status_code if isinstance(error, HTTPException) else 500
            return _problem(status, "not_found", "The registrar has nothing of that name, or not for that method.")

        return Starlette(routes=routes, exception_handlers={404: no_such, 405: no_such})

    # --- what there is --------------------------------------------------------------------------

    async def _network(self, _: Request) -> Response:
        return Response(self._registrar.state.network_json, media_type="application/json")

    async def _places(self, _: Request) -> Response:
        return _json(await self._reads.run(read_places, self._registrar.state.paths))

    async def _revocations(self, _: Request) -> Response:
        return _binary(await self._reads.run(self._word.revocations))

    async def _health(self, _: Request) -> Response:
        return _json({"network": self._registrar.state.digest})

    async def _file(self, request: Request) -> Response:
        name = request.path_params["name"]
        content = None
        if _TUF_NAME.fullmatch(name) and ".." not in name:
            content = await self._reads.run(self._repository.file, name)
        if content is None:
            return _problem(404, "not_found", "The council's repository has no such file.")
        return _binary(content)

    async def _challenge(self, _: Request) -> Response:
        return _json(self._registrar.challenge())

    # --- what is asked --------------------------------------------------------------------------

    async def _request(self, request: Request) -> Response:
        body = await _read_body(request, REQUEST_MAX_BYTES, BODY_TIMEOUT_S)
        answer = await self._asks.run(self._registrar.answer, body)
        if isinstance(answer, Gone):
            self._changed()
        return _json(answer)

    async def _halt(self, request: Request) -> Response:
        body = await _read_body(request, HALT_MAX_BYTES, BODY_TIMEOUT_S)
        halt = await self._asks.run(self._repository.add_halt, body)
        self._changed()
        return _json({"halted": halt is not None})

    async def _publication(self, request: Request) -> Response:
        body = await _read_body(request, PUBLICATION_MAX_BYTES, PUBLICATION_TIMEOUT_S)
        await self._publications.run(self._publish, body)
        self._changed()
        return _json({"published": True})

    def _publish(self, body: bytes) -> None:
        self._repository.publish_from_afar(decode_publication(body), self._clock.unix_s())

    # --- around each ----------------------------------------------------------------------------

    def _guarded(
        self, pool: Pool, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            whose = subscriber_of(request.client.host if request.client is not None else "")
            try:
                with pool.place(whose, self._clock.monotonic_s()):
                    return await handler(request)
            except TooMany as error:
                words = f"This address asks too often; try again in {error.retry_after_s:.0f} s."
                return _problem(429, RegistrarUnavailable.code, words, error.retry_after_s)
            except HTTPException as error:
                return _problem(error.status_code, "invalid_request", str(error.detail))
            except FallowError as error:
                return _problem(_STATUS.get(type(error), 403), error.code, error.message)
            except SQLAlchemyError:
                log.exception("the registrar's database failed")
                return _problem(503, RegistrarUnavailable.code, "The registrar's database cannot be used now.", 5.0)
            except OSError as error:
                log.exception("the registrar's disk failed")
                why = error.strerror or type(error).__name__
                words = f"The registrar's disk cannot be used now ({why}): what was asked may not have been kept."
                return _problem(503, RegistrarUnavailable.code, words, 5.0)
            except Exception:  # a defect of ours; without words the asker would doubt the address
                log.exception("the registrar failed at a request")
                return _problem(500, FallowError.code, "The registrar failed at this; its log says where.")

        return handle


async def _read_body(request: Request, bytes_max: int, timeout_s: float) -> bytes:
    """The whole body. Raises a 408 or 413."""
    declared = request.headers.get("content-length", "")
    body = bytearray()
    try:
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > bytes_max:
            raise HTTPException(413, f"Expected a body of up to {bytes_max} bytes.")
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > bytes_max:
                    raise HTTPException(413, f"Expected a body of up to {bytes_max} bytes.")
    except TimeoutError:
        raise HTTPException(408, f"The body did not arrive within {timeout_s:g} s.") from None
    except ClientDisconnect:
        raise HTTPException(400, "The body was cut short.") from None
    return bytes(body)


def _json(content: Any) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json", headers={"cache-control": "no-store"})


def _binary(content: bytes) -> Response:
    return Response(content, media_type="application/octet-stream", headers={"cache-control": "no-store"})


def _problem(status: int, code: str, message: str, retry_after_s: float | None = None) -> Response:
    headers = {"cache-control": "no-store"}
    if retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(retry_after_s)))
    body = msgspec.json.encode({"error": {"code": code, "message": message}})
    return Response(body, status, media_type="application/json", headers=headers)
