"""Networks of our own for system tests: a hub and devices in network namespaces, joined by a bridge, cut at will.

Linux and root only; `needs_namespaces` skips a test elsewhere, with the reason. A thread that has entered a namespace
makes its sockets and processes there, so that ordinary test code runs unchanged inside `Laboratory.inside`.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import pytest

T = TypeVar("T")

HUB_ADDRESS = "10.77.0.1"
_CLONE_NEWNET = 0x40000000


def why_not() -> str | None:
    """Why no namespaces can be made here, or `None`."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if shutil.which("ip") is None:
        return "the command `ip` (iproute2) is not installed"
    if os.geteuid() != 0:
        return "making a network namespace needs root"
    name = f"fallow-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"no network namespace can be made: {made.stderr.strip()}"
    bridge = _try(["ip", "-n", name, "link", "add", "bridge0", "type", "bridge"])
    _try(["ip", "netns", "del", name])
    return None if bridge else "this kernel has no bridges"


def needs_namespaces() -> pytest.MarkDecorator:
    reason = why_not()
    return pytest.mark.skipif(reason is not None, reason=str(reason))


class Laboratory:
    """A bridge in a namespace of its own (the hub, at `HUB_ADDRESS`), and one namespace for each device."""

    def __init__(self, devices: int) -> None:
        self._hub = f"fallow-{os.getpid()}-hub"
        self._devices = [f"fallow-{os.getpid()}-{index}" for index in range(devices)]

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._remove()

    def inside(self, device: int | None, work: Callable[[], T]) -> T:
        """Run `work` in a device's namespace, or in the hub's for `None`, and hand its result on."""
        name = self._hub if device is None else self._devices[device]
        with ThreadPoolExecutor(1, initializer=_enter, initargs=(name,)) as pool:
            return pool.submit(work).result()

    def cut(self, device: int) -> None:
        """Nothing passes to or from a device any more, and nobody is told: its port leaves the bridge."""
        _ip("-n", self._hub, "link", "set", f"port{device}", "nomaster")

    def heal(self, device: int) -> None:
        _ip("-n", self._hub, "link", "set", f"port{device}", "master", "bridge0")

    def _build(self) -> None:
        _ip("netns", "add", self._hub)
        _ip("-n", self._hub, "link", "set", "lo", "up")
        _ip("-n", self._hub, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", self._hub, "address", "add", f"{HUB_ADDRESS}/24", "dev", "bridge0")
        _ip("-n", self._hub, "link", "set", "bridge0", "up")
        for index, name in enumerate(self._devices):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", self._hub, "link", "add", f"port{index}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", self._hub, "link", "set", f"port{index}", "master", "bridge0", "up")
            _ip("-n", name, "address", "add", f"10.77.0.{index + 10}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")

    def _remove(self) -> None:
        for name in [*self._devices, self._hub]:
            _try(["ip", "netns", "del", name])


def _enter(name: str) -> None:
    """Move the calling thread into a namespace."""
    with Path("/run/netns", name).open("rb") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _try(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
