"""Where messages go on the control bus. Subjects are built here and nowhere else.

Rules
- Where a subject names a device or a process, it is the one that sends, so that the bus can hold everybody to their own
  name; an order names who receives.
- Who may use which of them is `policy/bus_rights.py`'s.
"""

from fallow.domain.cells import digests
from fallow.domain.ids import NodeId


class Subjects:
    """Bus subjects of one cell. Where a subject names a device or a process, it is the one that sends (the last but one
    word), so that the bus can hold everybody to their own name; `*` listens to all of a kind."""

    def __init__(self, cell: str) -> None:
        self._cell = cell
        self._root = f"fallow.{cell}"

    def heartbeat(self, node: NodeId | str = "*") -> str:
        return f"{self._root}.node.{node}.heartbeat"

    def leaving(self, node: NodeId | str = "*") -> str:
        return f"{self._root}.node.{node}.leaving"

    def command(self, node: NodeId | str) -> str:
        """Orders to one device: the only subject that names who receives."""
        return f"{self._root}.node.{node}.command"

    @property
    def hello(self) -> str:
        """A coordinator has started: nodes, stores and gateways report at once. The message is empty."""
        return f"{self._root}.hello"

    @property
    def leader(self) -> str:
        """`LeaderChanged`, when a coordinator begins to lead."""
        return f"{self._root}.leader"

    def coordinator(self, id: str = "*") -> str:  # noqa: A002
        """`CoordinatorReport`s."""
        return f"{self._root}.coordinator.{id}.report"

    @property
    def gone(self) -> str:
        return f"{self._root}.gone"

    def route(self, gateway: NodeId | str = "*") -> str:
        """`RouteRequest`s of a gateway."""
        return f"{self._root}.gateway.{gateway}.route"

    def gateway(self, gateway: NodeId | str = "*") -> str:
        """`GatewayReport`s."""
        return f"{self._root}.gateway.{gateway}.report"

    def store(self, store: NodeId | str = "*") -> str:
        """`StoreAnnounced`, by the gateway that serves it."""
        return f"{self._root}.gateway.{store}.store"

    @property
    def catalogue(self) -> str:
        return f"{self._root}.catalogue"

    @property
    def status(self) -> str:
        return f"{self._root}.status"

    def relay(self, receiver: NodeId | str, sender: NodeId | str = "*") -> str:
        """Sealed frames from one device to another. The sender is the last word, and the bus holds it to that."""
        return f"{self._root}.relay.{receiver}.{sender}"

    # --- trust ---

    @property
    def revocations(self) -> str:
        """Envelopes of a `RevocationList`, by the registrar."""
        return f"{self._root}.revocations"

    @property
    def halt(self) -> str:
        """Envelopes of a `Halt`."""
        return f"{self._root}.halt"

    @property
    def charter(self) -> str:
        """The council's repository has changed, or a halt has ended: look now. The message is empty."""
        return f"{self._root}.charter"

    # --- between cells ---

    @property
    def digest(self) -> str:
        """This cell's `CellDigest`s."""
        return digests(self._cell)

    @property
    def ask(self) -> str:
        """`CellQuestion`s to this cell's coordinator."""
        return f"fallow.cells.{self._cell}.ask"

    @property
    def ping(self) -> str:
        """Answered by this cell's coordinator at once: devices look for the nearest cell. The message is empty."""
        return f"fallow.cells.{self._cell}.ping"


def sender_of(subject: str) -> str:
    """Who sent a message on a subject that names its sender: the last word but one."""
    return subject.rsplit(".", 2)[-2]
