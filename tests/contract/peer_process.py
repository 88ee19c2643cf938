"""A peer in a process of its own, for tests that kill and freeze it: `python peer_process.py SEED_HEX SOCKET_DIR|-`.

Prints its endpoints as JSON, then one line per frame that it gets and per peer that it loses; answers every frame.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

from fallow.domain.frames import Frame
from fallow.domain.ids import NodeId
from fallow.fabric.endpoint import open_endpoint
from fallow.fabric.peers import Peers
from fallow.trust.open_doors import OpenAdmission


class SystemClock:
    def monotonic_s(self) -> float:
        return time.monotonic()

    def unix_s(self) -> float:
        return time.time()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)


async def main() -> None:
    seed, folder = bytes.fromhex(sys.argv[1]), sys.argv[2]
    endpoint = await open_endpoint(seed, socket_dir=None if folder == "-" else Path(folder))

    def on_frame(peer: NodeId, frame: Frame) -> None:
        print("frame", flush=True)
        peers.post(peer, frame)

    peers = Peers(
        endpoint,
        SystemClock(),
        role="node",
        admission=OpenAdmission(),
        on_frame=on_frame,
        on_lost=lambda *_: print("lost", flush=True),
    )
    await peers.start()
    print(json.dumps(endpoint.address.endpoints), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    await peers.close()
    await endpoint.close()


if __name__ == "__main__":
    asyncio.run(main())
