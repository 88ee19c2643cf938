"""Hosts that are far from each other, on one machine: network namespaces, and a switch in user space that delays.

Rules
- Every host is a namespace with one TAP interface. One process holds the other ends of all of them: it is the switch.
- Each frame between two hosts is kept for half a round trip, whoever sends and receives, and is then handed on: every
  path is as long as every other, and no longer where there are more hosts.
- The delay is the same for all frames and can be changed at any time. Frames keep their order.
- At most `QUEUE_FRAMES_MAX` frames are kept; what comes when there are so many is lost, as at a full router.
- The switch ends when the process that made it does, and the interfaces with it.

Not here: rates, losses, jitter. Linux and root only (`namespaces.py`). A kernel with netem could do the delay itself,
and many have none. What the switch takes for a frame is in every figure: `round_trip_s` measures it.
"""

import fcntl
import multiprocessing
import os
import select
import socket
import statistics
import struct
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Self, TypeVar

from namespaces import enter, inside, ip, remove

T = TypeVar("T")

HOSTS_MAX = 99
QUEUE_FRAMES_MAX = 20_000
"""A path of 1 Gbit/s and 120 ms holds half as many of full size."""
FRAME_BYTES_MAX = 2048
FRAMES_PER_TURN = 64
"""So many frames are taken from a host before the next one has its turn."""
START_LIMIT_S = 10.0
CLOSED_PORT = 9
PROBES = 20
_TUN = "/dev/net/tun"
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


class DistantNetwork:
    """So many hosts, numbered from 0. A context manager: leaving ends the switch and removes the namespaces."""

    def __init__(self, hosts: int) -> None:
        assert hosts <= HOSTS_MAX
        self._names = [f"fallow-far-{os.getpid()}-{index}" for index in range(hosts)]
        self._switch: multiprocessing.process.BaseProcess | None = None
        self._control: Connection | None = None

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    @staticmethod
    def address(host: int) -> str:
        return f"10.78.0.{host + 1}"

    def inside(self, host: int, work: Callable[[], T]) -> T:
        """Run `work` in a host's namespace; the processes that it starts stay there."""
        return inside(self._names[host], work)

    def set_round_trip(self, round_trip_s: float) -> None:
        """From now on, between any two hosts."""
        assert self._control is not None
        self._control.send(round_trip_s / 2)

    def round_trip_s(self, here: int, there: int) -> float:
        """As measured: the median time until a host refuses a connection at a port where nobody listens."""
        return self.inside(here, lambda: statistics.median(_refused_s(self.address(there)) for _ in range(PROBES)))

    def _build(self) -> None:
        for name in self._names:
            ip("netns", "add", name)
        self._control, theirs = multiprocessing.Pipe()
        # Spawned: a copy of this process would hold this end of the pipe open, and never see it closed.
        self._switch = multiprocessing.get_context("spawn").Process(
            target=_switch, args=(self._names, theirs), daemon=True
        )
        self._switch.start()
        theirs.close()
        if not self._control.poll(START_LIMIT_S):
            raise RuntimeError(f"the switch did not start within {START_LIMIT_S:.0f} s")
        refused = self._control.recv()
        if refused is not None:
            raise RuntimeError(refused)
        for index, name in enumerate(self._names):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "address", f"02:00:00:00:00:{index:02x}")
            ip("-n", name, "address", "add", f"{self.address(index)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")

    def _remove(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._switch is not None:
            self._switch.join(START_LIMIT_S)
            self._switch.kill()
        remove(self._names)


def _switch(names: list[str], control: Connection) -> None:
    """The process between the hosts. Says `None`, or what was refused to it; hears of delays until the pipe closes."""
    try:
        taps = [_tap(name) for name in names]
    except OSError as error:
        control.send(f"{_TUN}: {error}")
        return
    control.send(None)
    hosts = {tap: index for index, tap in enumerate(taps)}
    delay_s = 0.0
    kept: deque[tuple[float, int, bytes]] = deque()
    """When a frame is due, the host that sent it, and the frame. In order, as the delay is the same for all."""
    while True:
        wait_s = max(0.0, kept[0][0] - time.monotonic()) if kept else None
        ready, _, _ = select.select([control, *taps], [], [], wait_s)
        for tap in ready:
            if tap is not control:
                _take(tap, hosts[tap], delay_s, kept)
        while kept and kept[0][0] <= time.monotonic():
            _, sender, frame = kept.popleft()
            _hand_on(frame, sender, taps)
        if control in ready:
            try:
                delay_s = control.recv()
            except EOFError:
                return


def _take(tap: int, host: int, delay_s: float, kept: deque[tuple[float, int, bytes]]) -> None:
    for _ in range(FRAMES_PER_TURN):
        try:
            frame = os.read(tap, FRAME_BYTES_MAX)
        except OSError:  # no more for now
            return
        if len(kept) < QUEUE_FRAMES_MAX:
            kept.append((time.monotonic() + delay_s, host, frame))


def _hand_on(frame: bytes, sender: int, taps: list[int]) -> None:
    """To the host that the frame is for, the last byte of whose hardware address is its number; or to all others."""
    to_all = frame[0] & 1
    for host, tap in enumerate(taps):
        if host != sender and (to_all or host == frame[5]):
            try:
                os.write(tap, frame)
            except OSError:  # a host that is not up, or takes no more: lost, as elsewhere
                continue


def _tap(name: str) -> int:
    """The descriptor behind `eth0` of a namespace, for one frame a read or write. The interface goes with it."""
    enter(name)
    tap = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", b"eth0", _IFF_TAP | _IFF_NO_PI))
    return tap


def _refused_s(address: str) -> float:
    began_s = time.perf_counter()
    try:
        socket.create_connection((address, CLOSED_PORT), timeout=START_LIMIT_S).close()
    except ConnectionRefusedError:
        return time.perf_counter() - began_s
    raise RuntimeError(f"somebody listens at {address} port {CLOSED_PORT}")
