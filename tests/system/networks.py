"""Networks of our own for system tests: a hub and devices in network namespaces, joined by a bridge, cut at will.

Linux and root only; `needs_namespaces` skips a test elsewhere, with the reason. What runs in `Laboratory.inside` makes
its sockets and processes there (`benchmarks/namespaces.py`).
"""

import os
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

import pytest

from benchmarks.namespaces import inside, ip, remove, why_not

T = TypeVar("T")

HUB_ADDRESS = "10.77.0.1"


def needs_namespaces() -> pytest.MarkDecorator:
    reason = why_not(lambda: Laboratory(0))
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
        return inside(name, work)

    def cut(self, device: int) -> None:
        """Nothing passes to or from a device any more, and nobody is told: its port leaves the bridge."""
        ip("-n", self._hub, "link", "set", f"port{device}", "nomaster")

    def heal(self, device: int) -> None:
        ip("-n", self._hub, "link", "set", f"port{device}", "master", "bridge0")

    def _build(self) -> None:
        ip("netns", "add", self._hub)
        ip("-n", self._hub, "link", "set", "lo", "up")
        ip("-n", self._hub, "link", "add", "bridge0", "type", "bridge")
        ip("-n", self._hub, "address", "add", f"{HUB_ADDRESS}/24", "dev", "bridge0")
        ip("-n", self._hub, "link", "set", "bridge0", "up")
        for index, name in enumerate(self._devices):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", self._hub, "link", "add", f"port{index}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", self._hub, "link", "set", f"port{index}", "master", "bridge0", "up")
            ip("-n", name, "address", "add", f"10.77.0.{index + 10}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")

    def _remove(self) -> None:
        remove([*self._devices, self._hub])
