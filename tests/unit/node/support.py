"""Peers on the in-memory fabric for the node's parts, on virtual time."""

from pathlib import Path

from fallow.domain.frames import Chunk, FetchChunk, Frame, PeerAddress
from fallow.domain.ids import NodeId
from fallow.fabric.memory import MemoryFabric
from fallow.fabric.peers import Peers
from fallow.models.store import Store
from fallow.node.fetch import ChunkServer, Fetcher
from fallow.simulator.virtual_time import LoopClock
from fallow.trust.open_doors import OpenAdmission


def node_id(index: int) -> NodeId:
    return NodeId(f"{index:064x}")


class Source:
    """A peer with a store. `damage` alters what it sends; `None` from it means silence."""

    def __init__(self, fabric: MemoryFabric, index: int, folder: Path) -> None:
        self.id = node_id(index)
        self.store = Store(folder / f"source-{index}")
        self.asked: list[tuple[str, int]] = []
        self.peers = Peers(
            fabric.endpoint(self.id),
            LoopClock(),
            role="store",
            admission=OpenAdmission(),
            on_frame=self._on_frame,
            on_lost=lambda *_: None,
        )
        self._server = ChunkServer(self.store, self.peers)

    @property
    def address(self) -> PeerAddress:
        return PeerAddress(self.id, ())

    def _on_frame(self, peer: NodeId, frame: Frame) -> None:
        assert isinstance(frame.header, FetchChunk)
        self.asked.append((frame.header.digest, frame.header.index))
        self.answer(peer, frame.header)

    def answer(self, peer: NodeId, header: FetchChunk) -> None:
        self._server.handle(peer, header)


class SilentSource(Source):
    def answer(self, peer: NodeId, header: FetchChunk) -> None:
        pass


class LyingSource(Source):
    def answer(self, peer: NodeId, header: FetchChunk) -> None:
        chunk = self.store.read_chunk(header.digest, header.index) or b"?"
        damaged = bytes([chunk[0] ^ 1]) + chunk[1:]
        self.peers.post(peer, Frame(Chunk(digest=header.digest, index=header.index, found=True), damaged))


class Receiver:
    """The fetching side."""

    def __init__(self, fabric: MemoryFabric, folder: Path) -> None:
        self.id = node_id(0)
        self.store = Store(folder / "receiver")
        self.peers = Peers(
            fabric.endpoint(self.id),
            LoopClock(),
            role="node",
            admission=OpenAdmission(),
            on_frame=self._on_frame,
            on_lost=self._on_lost,
        )
        self.fetcher = Fetcher(self.store, self.peers)

    def _on_frame(self, peer: NodeId, frame: Frame) -> None:
        assert isinstance(frame.header, Chunk)
        self.fetcher.on_chunk(peer, frame.header, frame.payload)

    def _on_lost(self, peer: NodeId, reason: str) -> None:
        self.fetcher.peer_lost(peer, reason)
