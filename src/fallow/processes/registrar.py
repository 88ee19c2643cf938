"""`fallow serve registrar`: admits devices by HTTPS, tells everybody of revocations and halts, keeps the lease fresh.

Where it listens is settled before it starts (`settle`), because invitations and members are told; a port that was free
once is kept. It needs the folder with the network's keys, and serves without the bus while that is away.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from fallow import wiring
from fallow.config import Config
from fallow.domain.clock import Clock
from fallow.domain.errors import ConfigError, FallowError, RegistrarUnavailable
from fallow.domain.network import Places
from fallow.fabric.accounts import push_account
from fallow.fabric.nats_bus import NatsBus
from fallow.gateway.server import HttpServer, ServerLimits, serve
from fallow.private_file import write_durably
from fallow.processes.addresses import lan_address
from fallow.processes.lifetime import Stop
from fallow.processes.renewal import keep_renewed
from fallow.trust.certificates import server_context
from fallow.trust.council.files import CouncilPaths
from fallow.trust.registrar.api import RegistrarApi
from fallow.trust.registrar.database import open_database
from fallow.trust.registrar.duties import RegistrarDuties
from fallow.trust.registrar.service import Registrar
from fallow.trust.registrar.state import (
    Paths,
    RegistrarState,
    open_state,
    paths_of,
    read_places,
    write_places,
    write_server_certificate,
)
from fallow.trust.registrar.word import ClaimsCredentials, OwnCredentials, RegistrarWord
from fallow.trust.registrar_client import RegistrarClient, met

BUS_RETRY_S: Final = 1.0
CLOSE_LIMIT_S: Final = 10.0
ANSWER_POLL_S: Final = 0.1
LIMITS: Final = ServerLimits(max_connections_per_address=64, keep_alive_s=2)
"""Strangers connect here: no one of them can take all places, and none keeps one for nothing."""

log = logging.getLogger(__name__)


def settle(config: Config, bus_url: str) -> Places:
    """Choose the port, once and for all, and write down where the network can be reached.

    `bus_url`: the bus as this machine reaches it. Raises `ConfigError`.
    """
    paths = paths_of(config.state_dir)
    port = config.registrar.port or _kept_port(paths) or _free_port(_host(config))
    if not config.registrar.port and port != _kept_port(paths):
        write_durably(paths.port, str(port).encode())
    registrar_urls = _reached(_host(config), f"https://127.0.0.1:{port}")
    places = Places(registrar_urls=registrar_urls, bus_urls=_reached(config.bus.host, bus_url))
    write_places(paths, places)
    return places


async def answering(config: Config, limit_s: float) -> None:
    """Wait until the registrar of this machine's network answers. Raises `RegistrarUnavailable` after `limit_s`."""
    state = open_state(config.state_dir)
    url = read_places(state.paths).registrar_urls[-1]  # how this machine reaches it comes last
    deadline_s = asyncio.get_running_loop().time() + limit_s
    async with RegistrarClient(met(state.network_json), [url]) as client:
        while True:
            try:
                await client.places()
                return
            except RegistrarUnavailable:
                if asyncio.get_running_loop().time() > deadline_s:
                    raise
                await asyncio.sleep(ANSWER_POLL_S)


async def run(config: Config, parent_pid: int | None = None) -> None:
    """Run until a signal. Raises `ConfigError`."""
    stop = Stop()
    stop.listen(parent_pid)
    clock = wiring.clock()
    state = open_state(config.state_dir)
    url = wiring.bus_url(config)
    settle(config, url)
    database = open_database(state.paths.database)
    registrar, word = Registrar(state, database, clock), RegistrarWord(state, database, clock)
    word.tell_places()
    repository = CouncilPaths(config.state_dir).open_repository(state.digest)
    duties = RegistrarDuties(registrar, word, repository, database, clock)
    api = RegistrarApi(registrar, word, repository, clock, changed=duties.wake)
    try:
        async with _served(api, state, config, clock) as server:
            log.info("the registrar of %s is at %s", state.network.name, server.url)
            duties.start()
            joining = asyncio.create_task(_join(url, state, word, duties, stop))
            await stop.polite.wait()
            await duties.close()
            joining.cancel()
            await asyncio.gather(joining, return_exceptions=True)
            await stop.unless_at_once(server.close(), CLOSE_LIMIT_S)
    finally:
        database.close()


@contextlib.asynccontextmanager
async def _served(api: RegistrarApi, state: RegistrarState, config: Config, clock: Clock) -> AsyncIterator[HttpServer]:
    """The interface on its port, with a certificate that is replaced while it runs."""
    certificate, key = write_server_certificate(state, clock.unix_s())
    tls = server_context(certificate, key)
    _remove(certificate, key)
    server = await serve(api.app(), _host(config), _port(config), LIMITS, tls)

    async def renew() -> None:
        certificate, key = await asyncio.to_thread(write_server_certificate, state, clock.unix_s())
        tls.load_cert_chain(certificate, key)
        _remove(certificate, key)

    renewing = asyncio.create_task(keep_renewed("The registrar's certificate", renew, clock, log.error))
    try:
        yield server
    finally:
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)
        await server.close()
        api.close()


async def _join(url: str, state: RegistrarState, word: RegistrarWord, duties: RegistrarDuties, stop: Stop) -> None:
    """Be on the bus, with the registrar's own passport, until cancelled."""
    bus: NatsBus | None = None
    account = Account(url, state, word)
    try:
        while bus is None and not stop.polite.is_set():
            try:
                bus = await NatsBus.connect(url, state.identity.node, OwnCredentials(word))
                await duties.attach(bus, account.push)
            except FallowError as error:
                log.warning("the bus cannot be told of revocations yet: %s", error.message)
                if bus is not None:  # it was there, and went before the duties had it
                    await bus.close()
                    bus = None
                await asyncio.sleep(BUS_RETRY_S)
        await stop.at_once.wait()
    finally:
        await account.close()
        if bus is not None:
            await bus.close()


class Account:
    """The way to the bus's server by which it is brought new revocations."""

    def __init__(self, url: str, state: RegistrarState, word: RegistrarWord) -> None:
        self._url = url
        self._state = state
        self._word = word
        self._bus: NatsBus | None = None

    async def push(self, account: str, account_jwt: str) -> None:
        """Raises `BusUnavailable`, `BusTimeout`, `TrustError`."""
        if self._bus is None:
            name = f"{self._state.identity.node}-claims"
            self._bus = await NatsBus.connect(self._url, name, ClaimsCredentials(self._word))
        try:
            await push_account(self._bus, account, account_jwt)
        except FallowError:
            await self.close()
            raise

    async def close(self) -> None:
        """Idempotent."""
        bus, self._bus = self._bus, None
        if bus is not None:
            await bus.close()


# --- where it is ------------------------------------------------------------------------------------


def _host(config: Config) -> str:
    return config.registrar.host or config.bus.host


def _port(config: Config) -> int:
    port = config.registrar.port or _kept_port(paths_of(config.state_dir))
    if not port:
        raise ConfigError("The registrar has no port yet: `fallow up` settles one.")
    return port


def _kept_port(paths: Paths) -> int:
    try:
        return int(paths.port.read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return 0


def _free_port(host: str) -> int:
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise ConfigError(f"The registrar cannot listen on {host!r}: {error}.") from error
        return int(probe.getsockname()[1])


def _reached(host: str, url: str) -> tuple[str, ...]:
    """How something that listens on `host`, and is at `url` on this machine, is reached by others, best first."""
    parts = urlsplit(url)
    if wiring.is_loopback(host) or not wiring.is_loopback(parts.hostname or ""):
        return (url,)  # a bus on another machine is reached there by everybody
    if host in {"0.0.0.0", "::"}:  # noqa: S104 (compared, not bound)
        return f"{parts.scheme}://{lan_address()}:{parts.port}", url
    return (f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{parts.port}",)


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
