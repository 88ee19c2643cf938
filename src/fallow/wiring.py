"""The only place where adapters are chosen: which bus, which links, which engine, which clock.

Everything else asks for contracts. Swap an adapter here and nothing else changes.
"""

import ipaddress
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from msgspec.structs import replace

from fallow.config import Config
from fallow.domain.clock import Clock
from fallow.domain.errors import ConfigError
from fallow.domain.fleet import Subjects
from fallow.engine.contract import StageEngine
from fallow.fabric.contract import Bus, LeaseKey, LinkEndpoint, PresenceWatcher
from fallow.policy.bus_rights import LEASE_KEY, lease_bucket
from fallow.policy.relay import RelayUse
from fallow.system_clock import SystemClock, WakingClock
from fallow.trust.contract import CharterSource
from fallow.trust.keys import Identity, load_or_create
from fallow.trust.membership import Membership

LOOPBACK_LINKS: Final = "127.0.0.1:0"
OPEN_LINKS: Final = "0.0.0.0:0"
PORT_MAX: Final = 65535
RELAY_USES: Final = {"auto": RelayUse.WHEN_NEEDED, "only": RelayUse.ONLY, "never": RelayUse.NEVER}


def clock() -> Clock:
    """The machine's time."""
    return SystemClock()


def lease_clock() -> Clock:
    """Time for leases: it goes on while the machine sleeps."""
    return WakingClock()


def subjects(cell: str) -> Subjects:
    """The bus subjects of a cell."""
    return Subjects(cell)


def identity(folder: Path) -> Identity:
    """The key of the process whose state lies in `folder`; drawn at its first start. Raises `ConfigError`."""
    return load_or_create(folder / "identity")


def bus_url(config: Config) -> str:
    """Raises `ConfigError` when none is known."""
    if config.bus.url is None:
        raise ConfigError("There is no bus to join: give its url, as `fallow up` printed it, or set bus.url.")
    return config.bus.url


async def open_bus(config: Config, name: str) -> Bus:
    """The control bus of the development mode, as `name`. Raises `BusUnavailable`, `ConfigError`."""
    from fallow.fabric.nats_bus import NatsBus

    return await NatsBus.connect(bus_url(config), name)


async def join_bus(config: Config, member: Membership) -> Bus:
    """The control bus of a member's network. Raises `BusUnavailable`, `PassportRefused`, `TrustError`."""
    from fallow.fabric.nats_bus import NatsBus

    return await NatsBus.connect(bus_urls(config, member), member.who.node, member)


def bus_urls(config: Config, member: Membership) -> Callable[[], tuple[str, ...]]:
    """Where a member finds the bus, each time that it is asked: where its settings say, else where the registrar says.

    Raises `ConfigError` when neither does now.
    """

    def urls() -> tuple[str, ...]:
        return member.places.bus_urls if config.bus.url is None else (config.bus.url,)

    if not urls():
        raise ConfigError("The registrar does not say where the control bus is; set bus.url.")
    return urls


def charter_source(member: Membership, folder: Path) -> CharterSource:
    """The council's repository, as the registrar serves it; what was verified is kept in `folder`."""
    from fallow.trust.council.client import CharterClient
    from fallow.trust.council.fetch import HttpFetcher

    fetcher = HttpFetcher(lambda: [f"{url}/tuf/" for url in member.registrar_urls], member.network.authority_pem)
    return CharterClient(member.network.tuf_root, member.digest, folder, fetcher)


async def open_lease(bus: Bus, cell: str, ttl_s: float) -> LeaseKey:
    """The key by which a coordinator of the cell leads. Raises `LeaseUnsupported`, `BusTimeout`, `BusUnavailable`."""
    from fallow.fabric.nats_bus import NatsBus
    from fallow.fabric.nats_lease import NatsLease

    assert isinstance(bus, NatsBus)
    return await NatsLease.open(bus, lease_bucket(cell), LEASE_KEY, ttl_s)


def presence_watcher(config: Config) -> PresenceWatcher | None:
    """Who tells of broken bus connections in the development mode; without it heartbeats alone do."""
    from fallow.fabric.disconnects import NatsPresence

    return None if config.bus.system_url is None else NatsPresence(config.bus.system_url)


def presence_of(config: Config, member: Membership) -> PresenceWatcher | None:
    """The same in a network, for members who may know: coordinators."""
    from fallow.fabric.disconnects import NatsPresence
    from fallow.trust.membership_views import SystemCredentials

    if member.system_passport is None:
        return None
    return NatsPresence(bus_urls(config, member), SystemCredentials(member), member.network.account)


def link_address(config: Config, chosen: str | None, told: tuple[str, ...]) -> str:
    """`ip:port` to listen on for links: what was chosen, else loopback when the bus is there, else every interface.

    `told`: the urls at which the registrar says that the bus is; who joined by an invitation knows it from there alone.
    Open links stay where they are: a bus that leaves loopback counts at the next start, or in the next cell.
    """
    if chosen is not None:
        return chosen
    return LOOPBACK_LINKS if all(map(is_loopback, bus_hosts(config, told))) else OPEN_LINKS


def bus_hosts(config: Config, told: tuple[str, ...]) -> tuple[str, ...]:
    """Where the bus is, as `bus_urls` has it, and where `fallow up` has it listen.

    `fallow up --host 0.0.0.0` reaches its own bus on loopback, but others must reach its devices and its store.
    """
    urls = told if config.bus.url is None else (config.bus.url,)
    return (*(urlsplit(url).hostname or "" for url in urls), config.bus.host)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def open_links(
    config: Config, who: Identity, chosen: str | None, bus: Bus, cell: str, told: tuple[str, ...]
) -> LinkEndpoint:
    """The presence on the data fabric; `chosen` and `told` as `link_address` has them.

    Raises `ConfigError` for an address that cannot be listened on.
    """
    from fallow.fabric.endpoint import open_endpoint

    host, port = split_address(link_address(config, chosen, told))
    if config.trust.insecure_development and not is_loopback(host):
        raise ConfigError(f"The insecure development mode takes links on loopback only, not on {host!r}.")
    return await open_endpoint(
        who.seed,
        host=host,
        port=port,
        socket_dir=socket_folder() if config.links.local_sockets else None,
        relay=(bus, cell),
        relay_use=RELAY_USES[config.links.relay],
    )


def split_address(text: str) -> tuple[str, int]:
    """`ip:port` as its parts. Raises `ConfigError`."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > PORT_MAX:
        raise ConfigError(f"expected an address for links such as 0.0.0.0:7000, got {text!r}.")
    return host.strip("[]"), int(port)


def socket_folder() -> Path:
    """Where the user's processes meet on this machine; short, because socket paths are limited to 100 bytes."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "fallow"
    return Path(tempfile.gettempdir()) / f"fallow-{os.getuid() if hasattr(os, 'getuid') else 'user'}"


def engine(config: Config, kv_budget_bytes: int, threads: int, models: Path) -> StageEngine:
    """What computes stages, from files in the folder `models` and no others."""
    from fallow.engine.client import WorkerEngine
    from fallow.engine.settings import Confinement, EngineSettings

    settings = EngineSettings(kv_budget_bytes=kv_budget_bytes, threads=threads)
    if config.trust.insecure_development:
        settings = replace(settings, confinement=Confinement.NONE, canary_interval_s=0, rehash_share=0)
    return WorkerEngine(settings, [models])
