"""What nats-server is told at its start: in trusted mode, and in the password mode of development.

Rules
- Trusted (`BusTrust` given): operator mode. Whoever connects shows a JWT of an account that the operator signed, and
  proves to hold its key; TLS begins before a word is said; there is no password, no anonymous user and no default one.
- The server is given no key that signs: neither operator's nor account's, nor the authority's. Who takes the server
  over can read and drop what crosses it, and refuse or keep connections, but lets nobody in elsewhere.
- Accounts lie in the server's own folder. At its start it keeps what is there when that was issued in a later second
  than what the configuration brings, so that a restart with old words does not undo a revocation.
- Whatever is put between quotes is printable text: nats-server reads UTF-8 and few escapes, and JSON's `\\u` is none.
"""

import json
import re
from pathlib import Path
from typing import Final

import msgspec

from fallow.domain.errors import ConfigError
from fallow.fabric.contract import MAX_BUS_MESSAGE_BYTES

ACCOUNT: Final = "FALLOW"
"""In the password mode. In trusted mode, an account's name is its key."""
MAX_CONNECTIONS: Final = 65_536
CONTROL_LINE_MAX: Final = "16KB"
"""nats-server's own 4 KB would leave a coordinator's passport little room to grow."""
ACCOUNTS_MAX: Final = 16
FETCH_TIMEOUT_MS: Final = 100
"""For asking other servers about an account that this one does not know; there are none."""
TLS_TIMEOUT_S: Final = 5
"""For the handshake, and a second more for the JWT: of a device that is busy."""

_JWT: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_ACCOUNT: Final = re.compile(r"A[A-Z2-7]{55}")


class BusTrust(msgspec.Struct, frozen=True, kw_only=True):
    """Whom a server trusts, and how it shows who it is. Holds the key of its certificate: do not print it."""

    operator_jwt: str
    account: str
    """Public nkey (`A…`) of the fleet's account."""
    account_jwt: str
    system_account: str
    system_account_jwt: str
    certificate_pem: str
    """For `BUS_NAME`, signed by the network's authority."""
    key_pem: str

    def __repr__(self) -> str:
        return f"BusTrust({self.account[:8]}…)"


class Passwords(msgspec.Struct, frozen=True):
    """Of the two users in the password mode."""

    fleet: str
    system: str


class TrustFiles(msgspec.Struct, frozen=True):
    """Where `BusTrust`'s certificate and key lie, and where the server keeps accounts."""

    certificate: Path
    key: Path
    accounts: Path

    @classmethod
    def of(cls, folder: Path) -> "TrustFiles":
        """Of a server whose state is in `folder`."""
        return cls(folder / "bus.pem", folder / "bus.key", folder / "accounts")


def configuration(folder: Path, listen: str, identity: str) -> str:
    """The whole configuration of a server with its state in `folder`; `identity` is one of the two below. Raises
    `ConfigError` for a path that cannot be written into it."""
    return f"""# Written by Fallow; changes are lost when it is written again.
server_name: fallow
listen: {_quote(listen)}
ports_file_dir: {_quote(str(folder))}
log_file: {_quote(str(folder / "nats.log"))}
log_size_limit: 10MB
max_payload: {MAX_BUS_MESSAGE_BYTES}
max_pending: 64MB
max_connections: {MAX_CONNECTIONS}
max_control_line: {CONTROL_LINE_MAX}
write_deadline: "2s"
ping_interval: "1s"
ping_max: 2
jetstream {{
  store_dir: {_quote(str(folder / "jetstream"))}
  max_memory_store: 64MB
  max_file_store: 1GB
}}
{identity}"""


def password_mode(passwords: Passwords) -> str:
    """Two users with passwords, in the clear. For development."""
    return f"""accounts {{
  {ACCOUNT}: {{ jetstream: enabled, users: [ {{ user: fallow, password: {_quote(passwords.fleet)} }} ] }}
  SYS: {{ users: [ {{ user: system, password: {_quote(passwords.system)} }} ] }}
}}
system_account: SYS
"""


def trusted_mode(trust: BusTrust, files: TrustFiles) -> str:
    """Operator mode with TLS. Raises `ConfigError` for words that are no JWT or no account."""
    for text in (trust.operator_jwt, trust.account_jwt, trust.system_account_jwt):
        if not _JWT.fullmatch(text):
            raise ConfigError(f"expected a JWT for the control bus, got {text[:12]!r}")
    for account in (trust.account, trust.system_account):
        if not _ACCOUNT.fullmatch(account):
            raise ConfigError(f"expected the public nkey of an account, got {account[:12]!r}")
    return f"""operator: {_quote(trust.operator_jwt)}
system_account: {trust.system_account}
resolver: {{
  type: full
  dir: {_quote(str(files.accounts))}
  allow_delete: false
  limit: {ACCOUNTS_MAX}
  timeout: "{FETCH_TIMEOUT_MS}ms"
}}
resolver_preload: {{
  {trust.account}: {_quote(trust.account_jwt)}
  {trust.system_account}: {_quote(trust.system_account_jwt)}
}}
tls {{
  cert_file: {_quote(str(files.certificate))}
  key_file: {_quote(str(files.key))}
  handshake_first: true
  min_version: "1.3"
  timeout: {TLS_TIMEOUT_S}
}}
"""


def _quote(text: str) -> str:
    """A string of nats-server's configuration."""
    if not text.isprintable():
        raise ConfigError(f"nats-server's configuration cannot hold {text!r}: it has characters that do not print.")
    return json.dumps(text, ensure_ascii=False)
