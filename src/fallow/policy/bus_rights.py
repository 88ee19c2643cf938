"""What each role may say and hear on the bus. The server holds everybody to it, by the passport.

Rules
- Where a subject names its sender, only that sender may publish on it. Orders, and the word of who leads and who is
  gone, are coordinators'. What the registrar and the council say is signed as well: the bus only spares readers noise.
- Nobody but coordinators hears all devices, and nobody hears a stranger's answers: the inbox has the owner's name.
- Who is asked may answer, once, where the question says, and needs no leave to publish there. That this is an inbox is
  the answering side's rule (`fabric/nats_bus.py`).
- Coordinators may read, write and make the one JetStream bucket by which their cell's leader holds its lease
  (`fabric/nats_lease.py`), and nothing else of JetStream. They may not remove it.
"""

import re
from collections.abc import Collection

import msgspec

from fallow.domain.cells import digests
from fallow.domain.credentials import Role
from fallow.domain.errors import RequestRefused
from fallow.domain.fleet import Subjects
from fallow.domain.ids import NodeId

SUBSCRIPTIONS_MAX = 256
"""Of one process that is no coordinator."""
LEASE_KEY = "leader"

_CELL = re.compile(r"[A-Za-z0-9_-]{1,32}")
_NODE = re.compile(r"[0-9a-f]{64}")


class BusRights(msgspec.Struct, frozen=True, kw_only=True):
    """Subjects, with NATS's wildcards."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    may_answer: bool = False
    """Whether it may answer messages that came to it."""
    subscriptions_max: int | None = SUBSCRIPTIONS_MAX


def inbox(node: NodeId) -> str:
    """Where answers to a party come: the prefix of its inboxes."""
    return f"_INBOX.{node}"


def lease_bucket(cell: str) -> str:
    """The bucket of a cell's lease."""
    return f"fallow_{cell}"


def rights_of(role: Role, node: NodeId, cell: str) -> BusRights:
    """The rights of a party. Raises `RequestRefused` for a cell or key that is no plain word."""
    if not _CELL.fullmatch(cell):
        raise RequestRefused(f"expected a cell's name of letters, digits, _ and -, got {cell[:80]!r}")
    if not _NODE.fullmatch(node):
        raise RequestRefused(f"expected a public key of 64 hexadecimal digits, got {node[:80]!r}")
    subjects = Subjects(cell)
    match role:
        case Role.NODE:
            return _node(node, subjects)
        case Role.GATEWAY:
            return _gateway(node, subjects)
        case Role.COORDINATOR:
            return _coordinator(node, subjects, cell)
        case Role.REGISTRAR:
            said = (subjects.revocations, subjects.halt, subjects.charter, subjects.hello)
            return BusRights(publish=said, subscribe=(subjects.halt, subjects.hello, f"{inbox(node)}.>"))
        case Role.OPERATOR:
            return BusRights(publish=(*_questions(subjects), subjects.halt), subscribe=_told(node, subjects))
        case Role.AUDITOR | Role.READER:
            return BusRights(publish=_questions(subjects), subscribe=_told(node, subjects))


def presence_rights(node: NodeId, account: str) -> BusRights:
    """In the system account: hear who of `account` comes and goes. For coordinators."""
    return BusRights(
        publish=(f"$SYS.REQ.ACCOUNT.{account}.CONNZ",),
        subscribe=(f"$SYS.ACCOUNT.{account}.CONNECT", f"$SYS.ACCOUNT.{account}.DISCONNECT", f"{inbox(node)}.>"),
    )


def claims_rights(node: NodeId, accounts: Collection[str]) -> BusRights:
    """In the system account: give the server an account's new JWT, and look at the ones it has. For the registrar."""
    return BusRights(
        publish=("$SYS.REQ.CLAIMS.UPDATE", *(f"$SYS.REQ.ACCOUNT.{each}.CLAIMS.LOOKUP" for each in accounts)),
        subscribe=(f"{inbox(node)}.>",),
    )


def _told(node: NodeId, subjects: Subjects) -> tuple[str, ...]:
    """What everybody in a cell hears, beside answers to their own questions."""
    return subjects.leader, subjects.revocations, subjects.halt, subjects.charter, f"{inbox(node)}.>"


def _questions(subjects: Subjects) -> tuple[str, ...]:
    return subjects.status, subjects.catalogue


def _node(node: NodeId, subjects: Subjects) -> BusRights:
    return BusRights(
        publish=(subjects.heartbeat(node), subjects.leaving(node), subjects.relay("*", node), Subjects("*").ping),
        subscribe=(
            subjects.command(node),
            subjects.hello,
            subjects.relay(node),
            digests(),
            *_told(node, subjects),
        ),
        may_answer=True,
    )


def _gateway(node: NodeId, subjects: Subjects) -> BusRights:
    return BusRights(
        publish=(
            subjects.gateway(node),
            subjects.store(node),
            subjects.route(node),
            subjects.relay("*", node),
            *_questions(subjects),
        ),
        subscribe=(subjects.gone, subjects.hello, subjects.relay(node), *_told(node, subjects)),
        may_answer=True,  # whoever dials its store over the sealed relay
    )


def _coordinator(node: NodeId, subjects: Subjects, cell: str) -> BusRights:
    bucket = lease_bucket(cell)
    lease = f"$KV.{bucket}.{LEASE_KEY}"
    return BusRights(
        publish=(
            subjects.command("*"),
            subjects.hello,
            subjects.leader,
            subjects.gone,
            subjects.coordinator(node),
            subjects.digest,
            Subjects("*").ask,
            lease,
            *(f"$JS.API.STREAM.{what}.KV_{bucket}" for what in ("INFO", "CREATE", "MSG.GET")),
        ),
        subscribe=(
            subjects.heartbeat(),
            subjects.leaving(),
            subjects.store(),
            subjects.gateway(),
            subjects.coordinator(),
            subjects.route(),
            *_questions(subjects),
            subjects.hello,
            subjects.ask,
            subjects.ping,
            digests(),
            lease,
            *_told(node, subjects),
        ),
        may_answer=True,
        subscriptions_max=None,
    )
