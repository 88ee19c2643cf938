"""Tells when a process loses its bus connection, from the NATS server's own events.

A kernel closes a killed process's sockets at once, so the server knows of a crash within milliseconds.

Rules
- Connections are told apart by the server's client id, which is never used twice: the late event of an old connection
  does not report a client that is connected again under the same name.
- Only the account that Fallow's parts use is watched. With passports, a client goes by the key that it proved to hold.
  With passwords it goes by the name that it picked, so that a report is a hint to probe, not a verdict.
- Who was cut because its passport ended is not lost: it joins again with the next one, or falls silent.
- A server that was restarted counts its clients anew, so what was known of the earlier ones is dropped. Everybody
  reconnects; who does not is left to heartbeats.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable
from typing import Final

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from fallow.domain.errors import BusUnavailable, SignatureInvalid
from fallow.fabric.broker_config import ACCOUNT
from fallow.fabric.contract import BusCredentials
from fallow.fabric.nats_client import Urls, leave, open_client
from fallow.trust.keys import node_of_nkey

CONNZ_TIMEOUT_S: Final = 2.0
CONNECTIONS_PAGE: Final = 128
"""Connections of one answer, so that it stays below the size of a message: the server adds their passports."""
PAGES_MAX: Final = 512
GONE_IDS_MAX: Final = 4096
"""Ids remembered as gone, so that an older snapshot does not revive them."""
EXPIRED: Final = "Authentication Expired"
"""nats-server's word for a passport that ended."""

log = logging.getLogger(__name__)


class _Client(msgspec.Struct):
    id: int
    name: str = ""
    user: str = ""


class _Event(msgspec.Struct):
    client: _Client
    reason: str = ""


class _Connection(msgspec.Struct):
    cid: int
    name: str = ""
    authorized_user: str = ""


class _Connections(msgspec.Struct):
    connections: list[_Connection] = []


class _Snapshot(msgspec.Struct):
    data: _Connections = msgspec.field(default_factory=_Connections)


class NatsPresence:
    """The `PresenceWatcher` over NATS."""

    def __init__(self, urls: Urls, credentials: BusCredentials | None = None, account: str = ACCOUNT) -> None:
        """Watch `account`: in trusted mode its key (`A…`), with credentials of the system account
        (`trust/passports.py: issue_presence`); else with the system account's password in the url."""
        self._urls = urls
        self._credentials = credentials
        self._account = account
        self._client: Client | None = None
        self._on_disconnect: Callable[[str, str], None] | None = None
        self._names: dict[int, str] = {}
        self._count: Counter[str] = Counter()
        """Connections of each name, so that thousands of losses do not each look through everybody."""
        self._gone: deque[int] = deque(maxlen=GONE_IDS_MAX)
        self._connection = 0
        """Which of our own connections `_names` is of."""

    async def start(self, on_disconnect: Callable[[str, str], None]) -> None:
        self._on_disconnect = on_disconnect
        client = self._client = await open_client(self._urls, "presence", self._credentials)
        try:
            await client.subscribe(f"$SYS.ACCOUNT.{self._account}.CONNECT", cb=self._connected)
            await client.subscribe(f"$SYS.ACCOUNT.{self._account}.DISCONNECT", cb=self._disconnected)
            # The question travels behind the subscriptions.
            await self._look_around(client)
        except nats.errors.Error as error:
            await self.close()
            raise BusUnavailable(f"cannot watch the control bus's connections: {error}") from None

    async def _look_around(self, client: Client) -> None:
        """Learn who was connected before we listened."""
        for page in range(PAGES_MAX):
            query = msgspec.json.encode(
                {"limit": CONNECTIONS_PAGE, "offset": page * CONNECTIONS_PAGE, "auth": self._credentials is not None}
            )
            reply = await client.request(f"$SYS.REQ.ACCOUNT.{self._account}.CONNZ", query, timeout=CONNZ_TIMEOUT_S)
            found = msgspec.json.decode(reply.data, type=_Snapshot).data.connections
            for connection in found:
                if connection.cid not in self._gone:
                    self._note(connection.cid, self._name(connection.name, connection.authorized_user))
            if len(found) < CONNECTIONS_PAGE:
                return

    def _name(self, picked: str, user: str) -> str:
        """What a client goes by; empty for one that is nobody."""
        if self._credentials is None:
            return picked
        try:
            return node_of_nkey(user)
        except SignatureInvalid:
            return ""

    def _note(self, client_id: int, name: str) -> None:
        if client_id not in self._names:
            self._names[client_id] = name
            self._count[name] += 1

    async def _begin_anew(self) -> None:
        """After a break of our own connection."""
        client = self._client
        if client is None or client.stats["reconnects"] == self._connection:
            return
        self._connection = client.stats["reconnects"]
        self._names.clear()
        self._count.clear()
        self._gone.clear()
        try:
            await self._look_around(client)
        except nats.errors.Error as error:
            log.warning("who is connected to the control bus could not be asked: %s", error)

    async def close(self) -> None:
        client, self._client = self._client, None
        self._on_disconnect = None
        if client is not None:
            await leave(client)

    async def _connected(self, message: Msg) -> None:
        await self._begin_anew()
        event = msgspec.json.decode(message.data, type=_Event)
        self._note(event.client.id, self._name(event.client.name, event.client.user))

    async def _disconnected(self, message: Msg) -> None:
        await self._begin_anew()
        event = msgspec.json.decode(message.data, type=_Event)
        known = self._names.pop(event.client.id, None)
        if known is not None:
            self._count[known] -= 1
            if not self._count[known]:
                del self._count[known]
        self._gone.append(event.client.id)
        name = self._name(event.client.name, event.client.user)
        if not name or name in self._count or event.reason == EXPIRED or self._on_disconnect is None:
            return
        try:
            self._on_disconnect(name, event.reason)
        except Exception:
            log.exception("handling the disconnection of %s failed", name)
