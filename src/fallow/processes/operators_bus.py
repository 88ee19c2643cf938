"""The files with which an operator runs the control bus as a nats-server of their own.

Rules
- The server gets what the one that `fallow up` starts gets (`fabric/broker_config.py`): no key that signs, no password,
  nobody anonymous. Its certificate's key is in a file that only its owner may read, and so is the rest.
- `configure` writes everything, `renew` the certificate and its key alone. Both need the folder with the network's
  keys; the server's machine does not. Neither starts, stops or signals a server.
- A file that is replaced stays its owner's: the server may run as another user, who must go on reading it. Only root
  can give files away; somebody else is told so before anything is written.
- Paths in the configuration are absolute: a server must not find other files because it was started elsewhere.
"""

import os
from pathlib import Path
from typing import Final

from fallow import wiring
from fallow.config import Config
from fallow.domain.errors import ConfigError
from fallow.fabric.broker_config import BusTrust, TrustFiles, configuration, trusted_mode
from fallow.private_file import Owner, write_durably
from fallow.processes.founding import ensure_network
from fallow.processes.supervisor import Tell
from fallow.trust.registrar.database import open_database
from fallow.trust.registrar.state import RegistrarState, open_state
from fallow.trust.registrar.word import RegistrarWord

CONFIGURATION: Final = "nats.conf"


def configure(config: Config, folder: Path, listen: str, at: Path, tell: Tell) -> Path:
    """Write everything that a server needs to `folder`; where its configuration lies. Founds the network when there is
    none.

    `listen`: `host:port`. `at`: where the folder will lie on the server's machine. Raises `ConfigError`.
    """
    if not wiring.split_address(listen)[1]:
        raise ConfigError(f"A server of your own listens on a port that others can be told, not on {listen!r}.")
    if not at.is_absolute():
        raise ConfigError(f"The folder on the server's machine is named by its whole path, not {str(at)!r}.")
    _require_owner(folder)
    trust = _bus_trust(ensure_network(config, tell))
    text = configuration(at, listen, trusted_mode(trust, TrustFiles.of(at)))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write_certificate(folder, trust)
    path = folder / CONFIGURATION
    _replace(path, text)
    return path


def renew(config: Config, folder: Path) -> None:
    """Replace the certificate that `configure` wrote to `folder`, and its key. Raises `ConfigError`."""
    _require_owner(folder)
    if not (folder / CONFIGURATION).is_file():
        raise ConfigError(f"There is no {CONFIGURATION} in {folder}: write one with `fallow bus configure` first.")
    _write_certificate(folder, _bus_trust(open_state(config.state_dir)))


def _bus_trust(state: RegistrarState) -> BusTrust:
    database = open_database(state.paths.database)
    try:
        return RegistrarWord(state, database, wiring.clock()).bus_trust()
    finally:
        database.close()


def _require_owner(folder: Path) -> None:
    """Raises `ConfigError` when files in the folder are another user's, and this one cannot leave them so."""
    if os.name != "posix" or os.geteuid() == 0:
        return
    files = TrustFiles.of(folder)
    try:
        there = [path.stat().st_uid for path in (files.certificate, files.key, folder / CONFIGURATION) if path.exists()]
    except PermissionError as error:
        raise ConfigError(f"You may not look into {folder}: run this as its owner, or as root.") from error
    if any(owner != os.geteuid() for owner in there):
        raise ConfigError(f"Files in {folder} are another user's, who could not read what you write: run this as root.")


def _write_certificate(folder: Path, trust: BusTrust) -> None:
    files = TrustFiles.of(folder)
    _replace(files.certificate, trust.certificate_pem)
    _replace(files.key, trust.key_pem)


def _replace(path: Path, text: str) -> None:
    """Write a file, which stays its owner's where there was one."""
    write_durably(path, text.encode(), owner=_owner(path))


def _owner(path: Path) -> Owner | None:
    """Whose the file is, where that is not us: of the name itself, wherever a link of that name leads."""
    try:
        before = path.lstat()
    except FileNotFoundError:
        return None
    if os.name != "posix" or before.st_uid == os.geteuid():
        return None
    return Owner(before.st_uid, before.st_gid)
