"""What this machine knows of a network, for `fallow council …`: its repository or its registrar, and how to reach them.

Rules
- The machine that runs the registrar is asked for its folder; any other, for the network that its device joined. Flags
  go before both.
- What is to be put in force goes to the running registrar, which also tells the network; to its folder, when it does
  not run.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import typer

from fallow.cli.options import notes, settings
from fallow.cli.plain import one_line
from fallow.domain.errors import CharterUnavailable, ConfigError, RegistrarUnavailable
from fallow.domain.network import Network, Places
from fallow.trust.council.fetch import FolderFetcher, HttpFetcher, RepositoryFetcher
from fallow.trust.council.files import CouncilPaths, read_base
from fallow.trust.council.proposals import Base
from fallow.trust.council.publication import Publication
from fallow.trust.registrar.state import NETWORK_FILE, PLACES_FILE, digest_of, paths_of, read_network


class Known(msgspec.Struct, frozen=True):
    """A network's description."""

    network: Network
    content: bytes
    digest: str


class Place(msgspec.Struct, frozen=True):
    """Where a command works."""

    paths: CouncilPaths
    known: Known | None
    """The network's description, when this machine has it."""
    registrar_urls: tuple[str, ...]

    @property
    def network(self) -> str:
        """SHA-256 of the network's description; empty when this machine does not have it."""
        return self.known.digest if self.known is not None else ""

    @property
    def name(self) -> str:
        return self.known.network.name if self.known is not None else ""

    @property
    def has_repository(self) -> bool:
        return self.paths.open_repository().exists

    def fetcher(self) -> RepositoryFetcher:
        """The repository, from here. Raises `ConfigError` when this machine knows none."""
        if self.has_repository:
            return FolderFetcher(self.paths.repository)
        if self.known is None or not self.registrar_urls:
            raise ConfigError(
                "This machine knows no network. Run this where `fallow up` runs, on a machine that joined the network, "
                "or name the network with --network FILE (its network.json) and --registrar URL."
            )
        return HttpFetcher([f"{url}/tuf/" for url in self.registrar_urls], self.known.network.authority_pem)

    def base(self) -> Base:
        """What is in force, verified. Raises `CharterInvalid`, `CharterUnavailable`, `ConfigError`."""
        return read_base(self.fetcher())

    def publish(self, publication: Publication, now_unix_s: float) -> None:
        """Put it in force. Raises `CharterInvalid`, `RegistrarUnavailable`, `CharterUnavailable`."""
        if self._tell(lambda client: client.post_publication(msgspec.msgpack.encode(publication))):
            return
        with _named():
            self.paths.open_repository(self.network).publish(publication, now_unix_s)

    def post_halt(self, envelope: bytes) -> None:
        """Bring a halt to the registrar. Raises `RegistrarUnavailable`, `SignatureInvalid`, `ConfigError`."""
        if self._tell(lambda client: client.post_halt(envelope)):
            return
        with _named():
            self.paths.open_repository(self.network).add_halt(envelope)

    def _tell(self, what: Any) -> bool:
        """Whether the registrar took it; `False` when it does not run, and its folder is here to be used instead."""
        if self.known is not None and self.registrar_urls:
            try:
                asyncio.run(_with_client(self.known, self.registrar_urls, what))
            except RegistrarUnavailable as error:
                if not self.has_repository:
                    raise
                notes.print(f"{one_line(error.message)} Its folder is used; it tells the network when it works again.")
            else:
                return True
        elif self.registrar_urls and not self.has_repository:
            raise ConfigError("Name the network with --network FILE (its network.json).")
        return False


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """A disk that fails, by name: whoever halts must hear that this way did not work, and of the others."""
    try:
        yield
    except OSError as error:
        what = error.strerror or type(error).__name__
        raise CharterUnavailable(f"the registrar's folder on this machine cannot be used: {what}") from None


async def _with_client(known: Known, urls: tuple[str, ...], what: Any) -> None:
    from fallow.trust.registrar_client import Met, RegistrarClient  # it takes long to import

    async with RegistrarClient(Met(known.network, known.content, known.digest), urls) as client:
        await what(client)


def place_of(
    state_dir: Path | None, config: Path | None, network: Path | None = None, registrar: str | None = None
) -> Place:
    """From flags and folders. Raises `ConfigError` for a description that cannot be read."""
    loaded = settings(config, {"state_dir": state_dir}).config
    folders = (paths_of(loaded.state_dir).folder, loaded.device_dir)
    file = network or next((folder / NETWORK_FILE for folder in folders if (folder / NETWORK_FILE).is_file()), None)
    if file is not None and not file.is_file():
        raise ConfigError(f"There is no file {file}.")
    content = file.read_bytes() if file is not None else b""
    known = Known(read_network(content), content, digest_of(content)) if file is not None else None
    urls: tuple[str, ...] = (registrar.rstrip("/"),) if registrar else ()
    for folder in folders:
        urls = urls or _places(folder / PLACES_FILE).registrar_urls
    return Place(CouncilPaths(loaded.state_dir), known, tuple(url.rstrip("/") for url in urls))


def _places(file: Path) -> Places:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Places)
    except (OSError, msgspec.MsgspecError):
        return Places(registrar_urls=(), bus_urls=())


def confirmed(question: str, yes: bool) -> None:
    """Ask, unless `--yes` was given; whoever does not agree ends the command."""
    if not yes and not typer.confirm(question, default=False, err=True):
        notes.print("Nothing was done.")
        raise typer.Exit(1)
