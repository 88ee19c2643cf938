"""The KV cache: who may use how much of it, and where it lies. Numbers and memory; no sessions, no graphs.

Rules
- Per layer, keys and values are float32 `[slots, kv_heads, max_len, head_dim]`, each one anonymous mapping that takes
  memory only where it has been written. A session has the same slot in every layer.
- Admission is by reservation: what sessions may come to need never exceeds the budget, so a cache that was granted
  never runs out. A refusal is `KvExhausted` and changes nothing.
- Lowest free slot first, so that sessions that decode together lie together and one window covers them.
- Cells at and above a session's length may hold anything, NaN included: the kernel never reads them.
"""

import contextlib
import ctypes
import heapq
import mmap
import sys

import numpy as np
from numpy.typing import NDArray

from fallow.domain.errors import KvExhausted

SLACK_TOKENS = 64
"""Cells beyond the longest session: a padded call writes one, and 64 keep slots aligned to pages."""
MAP_NORESERVE = 0x4000
PAGE_BYTES = mmap.PAGESIZE


def slot_length(context_length: int, max_session_tokens: int) -> int:
    """Cells of a slot for sessions of at most `min(context_length, max_session_tokens)` tokens."""
    tokens = min(context_length, max_session_tokens)
    return -(-tokens // SLACK_TOKENS) * SLACK_TOKENS + SLACK_TOKENS


class KvBudget:
    """Bytes reserved against a fixed total, for all models of an engine."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.reserved_bytes = 0

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.reserved_bytes

    def reserve(self, size_bytes: int) -> None:
        """Raises `KvExhausted`, changing nothing."""
        if size_bytes > self.free_bytes:
            raise KvExhausted(
                f"the KV cache has {self.free_bytes} of {self.total_bytes} bytes left, not {size_bytes}; "
                "try another device or wait until a session ends"
            )
        self.reserved_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        self.reserved_bytes -= size_bytes
        assert self.reserved_bytes >= 0


class Slots:
    """Which slots are free; the lowest goes first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))

    def take(self) -> int:
        """Raises `KvExhausted` when every slot is taken."""
        if not self._free:
            raise KvExhausted(f"all {self.count} session slots of this model are taken; try another device")
        return heapq.heappop(self._free)

    def give(self, slot: int) -> None:
        heapq.heappush(self._free, slot)

    def exchange(self, one: int, other: int) -> None:
        """Two slots have swapped what they hold: if one of them was free, the other one is now."""
        moved = {one: other, other: one}
        self._free = [moved.get(slot, slot) for slot in self._free]
        heapq.heapify(self._free)


class LayerCache:
    """Keys and values of one layer, `[slots, kv_heads, max_len, head_dim]` float32 each."""

    def __init__(self, slots: int, kv_heads: int, max_len: int, head_dim: int) -> None:
        shape = (slots, kv_heads, max_len, head_dim)
        self._slot_bytes = 4 * kv_heads * max_len * head_dim
        self._mappings = [_lazy_mapping(slots * self._slot_bytes) for _ in range(2)]
        self.keys, self.values = (np.frombuffer(mapping, np.float32).reshape(shape) for mapping in self._mappings)

    def release(self, slot: int) -> None:
        """Give a slot's memory back to the system; it reads as zeros, or as it was, afterwards."""
        start = -(-slot * self._slot_bytes // PAGE_BYTES) * PAGE_BYTES
        end = (slot + 1) * self._slot_bytes // PAGE_BYTES * PAGE_BYTES
        if end > start and sys.platform != "win32":
            for mapping in self._mappings:
                mapping.madvise(mmap.MADV_DONTNEED, start, end - start)

    def swap(self, one: int, one_length: int, other: int, other_length: int) -> None:
        """Exchange what two slots hold, up to their lengths in tokens."""
        for cache in self.arrays():
            kept = cache[one, :, :one_length].copy()
            cache[one, :, :other_length] = cache[other, :, :other_length]
            cache[other, :, :one_length] = kept

    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return self.keys, self.values


def _lazy_mapping(size_bytes: int) -> mmap.mmap:
    """Anonymous memory that is committed page by page, small pages only, and not counted before."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size_bytes)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if sys.platform == "linux":
        flags |= MAP_NORESERVE
    mapping = mmap.mmap(-1, size_bytes, flags=flags)
    with contextlib.suppress(AttributeError, OSError):  # huge pages would commit 2 MiB for one token
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return mapping


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library can: packing a model's weights frees as much again."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
