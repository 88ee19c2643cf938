"""What `fallow status` says of neighbour cells and of a fleet too large for one message."""

from io import StringIO

from rich.console import Console

from fallow.cli.status import tables
from fallow.domain.cells import CellDigest, CellSize, ModelDigest, NeighbourCell
from fallow.domain.fleet import FleetStatus, Heartbeat, QuarantinedDevice
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import Digest, NodeId


def said(fleet: FleetStatus) -> str:
    console = Console(width=160, record=True, file=StringIO())
    console.print(tables(fleet))
    return console.export_text()


def neighbour(cell: str, *models: ModelDigest, rtt_s: float | None = None, sessions_sent: int = 0) -> NeighbourCell:
    digest = CellDigest(cell=cell, boot="b", sequence=1, devices=12, devices_max=400, models=models)
    return NeighbourCell(digest=digest, silent_s=0.5, rtt_s=rtt_s, sessions_sent=sessions_sent)


def test_a_cell_of_the_wrong_size_says_what_will_happen_or_what_to_do() -> None:
    small = said(fleet(CellSize(devices_min=40, devices_max=400, dissolves_into="os[b]lo")))
    assert "fewer than 40 devices for long, and dissolves into os[b]lo" in small
    go = tuple(NodeId(f"{index:064x}") for index in range(10))
    large = " ".join(said(fleet(CellSize(devices_min=40, devices_max=400, outgrown=True, should_go=go))).split())
    assert "outgrown itself: more than 400 devices" in large and "start a coordinator of another cell" in large
    assert "10 devices belong there" in large and "and 2 more" in large
    assert said(fleet(CellSize(devices_min=40, devices_max=400))) == said(fleet(None))


def fleet(size: CellSize | None) -> FleetStatus:
    return FleetStatus(nodes=(), silent_s={}, models=(), size=size)


def test_a_neighbour_that_dissolves_says_so() -> None:
    digest = CellDigest(cell="rome", boot="1", sequence=1, devices=3, devices_max=400, dissolves_into="pisa")
    known = (NeighbourCell(digest=digest, silent_s=0.5),)
    text = said(FleetStatus(nodes=(), silent_s={}, models=(), neighbours=known))
    assert "Cell rome: 3 devices, serves 0 models, dissolves into pisa" in text


def test_a_line_for_each_neighbour_cell() -> None:
    served = ModelDigest(model=Digest("a" * 64), servable=True, load=0.42)
    missing = ModelDigest(model=Digest("b" * 64), servable=False)
    known = (neighbour("berlin", served, missing, rtt_s=0.0123, sessions_sent=3), neighbour("oslo", missing))
    text = said(FleetStatus(nodes=(), silent_s={}, models=(), neighbours=known))
    assert "Cell berlin: 12 devices, 12 ms away, serves 1 model, busiest model at 42%, 3 sessions sent there" in text
    assert "Cell oslo: 12 devices, serves 0 models\n" in text


def test_devices_that_are_left_out_are_counted() -> None:
    node = NodeId("1" * 64)
    beat = Heartbeat(
        node=node,
        name="desk",
        sequence=1,
        address=PeerAddress(node=node, endpoints=()),
        memory_bytes=1,
        kv_budget_bytes=0,
        kv_free_bytes=0,
    )
    assert "and 19500 more devices" in said(FleetStatus(nodes=(beat,), silent_s={}, models=(), nodes_left_out=19_500))


def test_a_line_for_each_device_in_quarantine() -> None:
    out = QuarantinedDevice(node=NodeId("1" * 64), left_s=1500.0, why="it found itself damaged")
    text = said(FleetStatus(nodes=(), silent_s={}, models=(), quarantined=(out,)))
    assert "In quarantine for 25 min: 11111111 (11111111), because it found itself damaged" in text
