"""Lease keys in memory, the twin of `nats_lease.py`.

Rules: a value vanishes `ttl_s` after it was written, by the running loop's time. Revisions rise over all keys of a
store. While the hub is stopped, or the client's connection is gone, nothing is read or written.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from fallow.domain.errors import BusUnavailable
from fallow.fabric.contract import LeaseEntry
from fallow.fabric.memory_bus import MemoryBus, MemoryHub

ROUND_TRIP_S: Final = 0.001


class MemoryLeases:
    """What a bucket is to its clients."""

    def __init__(self, hub: MemoryHub, ttl_s: float) -> None:
        self.hub = hub
        self._ttl_s = ttl_s
        self._revision = 0
        self._entries: dict[str, tuple[LeaseEntry, float]] = {}
        self._watchers: list[tuple[str, MemoryLease, Callable[[], None]]] = []

    def key(self, bus: MemoryBus, key: str) -> "MemoryLease":
        """A client's view of a key."""
        return MemoryLease(self, bus, key)

    # --- for keys ---

    def read(self, key: str) -> LeaseEntry | None:
        entry, written_s = self._entries.get(key, (None, 0.0))
        return entry if asyncio.get_running_loop().time() - written_s < self._ttl_s else None

    def write(self, key: str, value: bytes, after: int) -> int | None:
        now = self.read(key)
        self._tell(key)
        if (now.revision if now is not None else 0) != after:
            return None
        self._revision += 1
        self._entries[key] = (LeaseEntry(self._revision, value), asyncio.get_running_loop().time())
        return self._revision

    def watch(self, key: str, client: "MemoryLease", on_write: Callable[[], None]) -> "MemoryLeaseWatch":
        watcher = (key, client, on_write)
        self._watchers.append(watcher)
        return MemoryLeaseWatch(lambda: self._watchers.remove(watcher) if watcher in self._watchers else None)

    def _tell(self, key: str) -> None:
        for watched, client, on_write in self._watchers:
            if watched == key and client.connection is not None:
                asyncio.get_running_loop().call_soon(on_write)


class MemoryLease:
    """The in-memory `LeaseKey`."""

    def __init__(self, leases: MemoryLeases, bus: MemoryBus, key: str) -> None:
        self._leases = leases
        self._bus = bus
        self._key = key

    @property
    def connection(self) -> int | None:
        hub = self._leases.hub
        return hub.starts if hub.running and self._bus.is_open else None

    async def read(self) -> LeaseEntry | None:
        await self._travel()
        return self._leases.read(self._key)

    async def write(self, value: bytes, after: int) -> int | None:
        await self._travel()
        return self._leases.write(self._key, value, after)

    async def watch(self, on_write: Callable[[], None]) -> "MemoryLeaseWatch":
        return self._leases.watch(self._key, self, on_write)

    async def _travel(self) -> None:
        before = self.connection
        await asyncio.sleep(ROUND_TRIP_S)
        if before is None or self.connection != before:
            raise BusUnavailable("the control bus is not connected; it is being retried")


class MemoryLeaseWatch:
    """A live watch."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop

    async def cancel(self) -> None:
        self._stop()
