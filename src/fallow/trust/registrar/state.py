"""What a registrar keeps on its disk: the keys that make a network, its description, and where things lie.

Rules
- One folder, mode 0700; every private key in a file of its own, mode 0600. Whoever can read the folder *is* the
  network's operator: it holds the keys that admit and revoke. It holds no key of the council, and cannot sign a model
  or a policy.
- A network is founded once. `network.json` is written last: without it nothing was founded, and founding again goes on
  with the keys that are there. It never changes after, because invitations and members pin its digest.
- Addresses are not part of it; they are in `places.json`, written at every start by who knows them.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Final

import msgspec

from fallow.domain.errors import ConfigError
from fallow.domain.network import REGISTRAR_NAME, Network, Places
from fallow.private_file import write_durably
from fallow.trust.certificates import (
    Certificate,
    load_authority,
    load_or_create_authority,
    server_certificate,
    write_private,
)
from fallow.trust.jwt import account_nkey
from fallow.trust.keys import Identity, load, load_or_create
from fallow.trust.registrar.requests import CELL_PATTERN, NAME_PATTERN

NETWORK_FORMAT: Final = 1
NETWORK_MAX_BYTES: Final = 256 * 1024
NETWORK_FILE: Final = "network.json"
PLACES_FILE: Final = "places.json"
DATABASE_URL_FILE: Final = "database-url"
NO_PLACES: Final = Places(registrar_urls=(), bus_urls=())


class Paths(msgspec.Struct, frozen=True):
    """Where things lie in a registrar's folder."""

    folder: Path

    @property
    def database(self) -> Path | str:
        """A file of SQLite, unless the file `database-url` names another database by its SQLAlchemy url."""
        try:
            return (self.folder / DATABASE_URL_FILE).read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:
            return self.folder / "registrar.db"

    @property
    def network(self) -> Path:
        return self.folder / NETWORK_FILE

    @property
    def places(self) -> Path:
        return self.folder / PLACES_FILE

    @property
    def repository(self) -> Path:
        """The council's repository (TUF), served to everybody."""
        return self.folder / "repository"

    @property
    def online_keys(self) -> Path:
        """The registrar's keys for that repository's snapshot and timestamp."""
        return self.folder / "online"

    @property
    def port(self) -> Path:
        """The port that was found free at the first start."""
        return self.folder / "port"


class RegistrarState(msgspec.Struct, frozen=True, kw_only=True):
    """A founded network, from the side that holds its keys. Do not print it."""

    paths: Paths
    identity: Identity
    operator: Identity
    account: Identity
    system: Identity
    authority: Certificate
    network: Network
    network_json: bytes
    digest: str
    """SHA-256 of `network_json`, as hex: the network's name among machines."""

    def __repr__(self) -> str:
        return f"RegistrarState({self.network.name}, {self.digest[:8]}…)"


def paths_of(state_dir: Path) -> Paths:
    """Of the registrar whose network's state lies in `state_dir`."""
    return Paths(state_dir / "registrar")


def is_founded(state_dir: Path) -> bool:
    """Whether there is a network."""
    return paths_of(state_dir).network.is_file()


def found(state_dir: Path, *, name: str, cell: str, tuf_root: str, now_unix_s: float) -> RegistrarState:
    """Found a network, or open the one that is there (whatever it is called).

    `tuf_root`: the council's first `root.json`. Raises `ConfigError` for files that are damaged or open to others, and
    for names that nobody could read.
    """
    if is_founded(state_dir):
        return open_state(state_dir)
    _check_names(name, cell)
    paths = paths_of(state_dir)
    paths.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    paths.folder.chmod(0o700)
    keys = {key: load_or_create(paths.folder / key) for key in ("identity", "operator", "account", "system")}
    authority = load_or_create_authority(paths.folder, name, now_unix_s)
    network = Network(
        format=NETWORK_FORMAT,
        name=name,
        cell=cell,
        authority_pem=authority.certificate_pem,
        account=account_nkey(keys["account"].node),
        registrar=keys["identity"].node,
        tuf_root=tuf_root,
    )
    write_durably(paths.network, msgspec.json.format(msgspec.json.encode(network), indent=2))
    return open_state(state_dir)


def open_state(state_dir: Path) -> RegistrarState:
    """The network whose keys lie there. Raises `ConfigError` when there is none, or it is damaged."""
    paths = paths_of(state_dir)
    try:
        content = paths.network.read_bytes()
        keys = {key: load(paths.folder / key) for key in ("identity", "operator", "account", "system")}
    except FileNotFoundError as error:
        raise ConfigError(
            f"There is no network of yours in {state_dir} ({Path(str(error.filename)).name} is missing). "
            "`fallow up` founds one; on another machine, use --state-dir."
        ) from None
    network = read_network(content)
    authority = load_authority(paths.folder)
    same = (network.registrar, network.account, network.authority_pem) == (
        keys["identity"].node,
        account_nkey(keys["account"].node),
        authority.certificate_pem,
    )
    if not same:
        raise ConfigError(f"The keys in {paths.folder} are not those of its {NETWORK_FILE}: restore them together.")
    return RegistrarState(
        paths=paths, network=network, network_json=content, digest=digest_of(content), authority=authority, **keys
    )


def read_network(content: bytes) -> Network:
    """A network's description from its bytes. Raises `ConfigError` for anything else."""
    if len(content) > NETWORK_MAX_BYTES:
        raise ConfigError(f"A network's description has at most {NETWORK_MAX_BYTES} bytes, not {len(content)}.")
    try:
        network = msgspec.json.decode(content, type=Network)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"The network's description cannot be read: {error}.") from None
    if network.format != NETWORK_FORMAT:
        raise ConfigError(
            f"The network's description has format {network.format}, and this release reads {NETWORK_FORMAT}: "
            "use the release of Fallow that the network runs."
        )
    _check_names(network.name, network.cell)
    return network


def _check_names(name: str, cell: str) -> None:
    """Both stand in the words that an owner agrees to: a name must not add a paragraph. Raises `ConfigError`."""
    for what, text, pattern in (("network", name, NAME_PATTERN), ("cell", cell, CELL_PATTERN)):
        if not re.search(pattern, text):
            raise ConfigError(f"A {what} cannot be called {text[:80]!r}: expected a name like those of its members.")


def digest_of(network_json: bytes) -> str:
    """What invitations and members pin."""
    return hashlib.sha256(network_json).hexdigest()


def write_places(paths: Paths, places: Places) -> None:
    """Say where the network can be reached now; newcomers and members are told this."""
    write_durably(paths.places, msgspec.json.encode(places))


def read_places(paths: Paths) -> Places:
    """Where the network can be reached, as far as it was said."""
    try:
        return msgspec.json.decode(paths.places.read_bytes(), type=Places)
    except (OSError, msgspec.MsgspecError):
        return NO_PLACES


def write_server_certificate(state: RegistrarState, now_unix_s: float) -> tuple[Path, Path]:
    """A new certificate for this process's HTTPS: certificate and key, which may go once they are loaded."""
    made = server_certificate(state.authority, REGISTRAR_NAME, now_unix_s)
    certificate, key = (state.paths.folder / f"tls-{os.getpid()}.{kind}" for kind in ("pem", "key"))
    write_private(certificate, made.certificate_pem)
    write_private(key, made.key_pem)
    return certificate, key
