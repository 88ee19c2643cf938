"""Real processes that are killed, frozen or leave: `Peers` notices in time, on every transport.

The promise is 2 s for silence and at once for what the kernel or the peer tells. The policy's own bound is tested with
exact times in `tests/unit/fabric/test_liveness.py`; here two seconds are added for a crowded machine.
"""

import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fallow.domain.errors import LinkClosed
from fallow.domain.frames import PeerAddress
from fallow.fabric.endpoint import open_endpoint
from fallow.fabric.local_handshake import Identity
from fallow.fabric.peers import Peers
from fallow.trust.open_doors import OpenAdmission
from tests.contract.peer_process import SystemClock
from tests.unit.fabric.support import eventually, rows

NOTICE_S = 4.0
SEED, CHILD_SEED = b"\x41" * 32, b"\x42" * 32
CHILD = Identity.from_seed(CHILD_SEED).node

pytestmark = pytest.mark.parametrize("transport", ["local", "iroh"])


class Scene:
    """This process's peers, a child process, and what happened."""

    def __init__(self, folder: str, transport: str) -> None:
        self.folder = f"{folder}/s" if transport == "local" else "-"
        self.frames = 0
        self.lost: list[tuple[float, str]] = []

    async def open(self) -> None:
        self.endpoint = await open_endpoint(SEED, socket_dir=None if self.folder == "-" else Path(self.folder))
        self.peers = Peers(
            self.endpoint,
            SystemClock(),
            role="gateway",
            admission=OpenAdmission(),
            on_frame=lambda *_: setattr(self, "frames", self.frames + 1),
            on_lost=lambda _, reason: self.lost.append((time.monotonic(), reason)),
        )
        await self.peers.start()
        self.child = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__).with_name("peer_process.py")),
            CHILD_SEED.hex(),
            self.folder,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        self.address = PeerAddress(CHILD, tuple(json.loads(await self.line())))

    async def line(self) -> str:
        assert self.child.stdout is not None
        return (await asyncio.wait_for(self.child.stdout.readline(), 20)).decode()

    async def exchange(self) -> None:
        before = self.frames
        await self.peers.send(self.address, rows(1))
        await eventually(lambda: self.frames == before + 1)

    async def close(self) -> None:
        if self.child.returncode is None:
            self.child.send_signal(signal.SIGCONT)
            self.child.kill()
            await self.child.wait()
        await self.peers.close()
        await self.endpoint.close()


@asynccontextmanager
async def scene(transport: str) -> AsyncIterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="fl") as folder:
        made = Scene(folder, transport)
        await made.open()
        try:
            yield made
        finally:
            await made.close()


def test_a_killed_peer_is_noticed(transport: str) -> None:
    async def main() -> None:
        async with scene(transport) as s:
            await s.exchange()
            s.child.kill()
            killed_s = time.monotonic()
            await eventually(lambda: bool(s.lost), within_s=NOTICE_S)
            if transport == "local":
                assert s.lost[0][0] - killed_s < 1.0, "the kernel tells at once"
                with pytest.raises(LinkClosed, match="gone"):  # and at once again; iroh's dial takes its timeout
                    await s.peers.send(s.address, rows(2))
            assert len(s.lost) == 1 and s.peers.connected() == frozenset()

    asyncio.run(main())


def test_a_frozen_peer_is_noticed_and_can_be_met_again(transport: str) -> None:
    async def main() -> None:
        async with scene(transport) as s:
            await s.exchange()
            s.child.send_signal(signal.SIGSTOP)
            await eventually(lambda: bool(s.lost), within_s=NOTICE_S)
            assert "silent" in s.lost[0][1] and len(s.lost) == 1
            s.child.send_signal(signal.SIGCONT)
            while (await s.line()) != "lost\n":
                pass  # it noticed as well, once it ran again
            await s.exchange()
            assert s.peers.connected() == {CHILD} and len(s.lost) == 1

    asyncio.run(main())


def test_a_probe_finds_out_faster(transport: str) -> None:
    async def main() -> None:
        async with scene(transport) as s:
            await s.exchange()
            assert await s.peers.probe(CHILD, 5)
            s.child.send_signal(signal.SIGSTOP)
            await asyncio.sleep(0.1)  # let what it sent before arrive
            assert not await s.peers.probe(CHILD, 0.3)
            assert len(s.lost) == 1

    asyncio.run(main())


def test_a_peer_that_leaves_says_so(transport: str) -> None:
    async def main() -> None:
        async with scene(transport) as s:
            await s.exchange()
            assert s.child.stdin is not None
            s.child.stdin.write(b"\n")
            await eventually(lambda: bool(s.lost), within_s=NOTICE_S)
            assert s.lost[0][1].endswith("leaving")
            assert await asyncio.wait_for(s.child.wait(), 20) == 0

    asyncio.run(main())
