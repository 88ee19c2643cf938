"""Decode rows of one session, many in one call: a rebuilt cache at little more than a prompt's price, bit for bit.

A generated token was computed alone in its sequence (`Phase.DECODE`), and a cache that is rebuilt must be computed the
same way. The matrix products give the same bits for any number of rows; only attention does not. But attention over a
*batch* of sessions, one row each, does. So one session poses as a batch: its cache is mapped `IMAGES` times, one image
after the other, all on the same memory, and row i runs in image i at position `length + i`. The kernel goes through
its batch in order on one thread, appending each row's key and value before it attends; so row i finds what rows 0 to
i - 1 of the same call have just written. `replay_check.py` checks exactly that on a tiny graph, since it is the
kernel's habit and not its promise; where it does not hold (several threads, no `memfd`), rows are computed one by one.

Images are shorter than the slots that they stand for: mapping them takes time by the page. A `Room` serves all calls
of a rebuild, one after the other, and goes when the engine turns to something else: the system counts its memory once
for every image.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fallow.domain.errors import EngineError
from fallow.engine.kv import SLACK_TOKENS

IMAGES = 64
"""Rows of one call. More gain nothing: from here on a row's matrix products cost what they cost in a prompt."""

CAPACITY_MIN = 256
"""Tokens. A power of two, so that images begin with a page, like longer ones."""

TOUCHED_MAX = 1024
"""Tokens of a room whose memory is asked for at once: the system then maps it into an image by sixteen pages, not by
one. Longer ones grow as they are filled."""

_PROT_NONE, _PROT_READ_WRITE = 0, 3
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
_FAILED = ctypes.c_void_p(-1).value

Cache = NDArray[np.float32]


class Room:
    """Images of one slot of several caches: `images[name]` is `[IMAGES, kv_heads, capacity, head_dim]` float32."""

    def __init__(self, caches: Mapping[str, Cache], capacity: int) -> None:
        """For `caches` `[slots, kv_heads, max_len, head_dim]` and so many tokens, rounded up to a power of two: the
        runtime keeps a plan of its memory for every shape that it has seen.

        Raises `EngineError` when the system has no memory or address space for it.
        """
        longest = next(iter(caches.values())).shape[2]
        self.capacity = min(max(CAPACITY_MIN, 1 << (capacity - 1).bit_length()), longest)
        self.images: dict[str, Cache] = {}
        self._caches = caches
        self._mapped: list[tuple[int, int]] = []
        try:
            self._map()
        except OSError as error:
            self.close()
            raise EngineError(f"no memory for rebuilding a cache: {error.strerror}") from error

    def load(self, slot: int, length: int) -> None:
        """Copy the first `length` tokens of a slot in."""
        for name, cache in self._caches.items():
            self.images[name][0, :, :length] = cache[slot, :, :length]

    def keep(self, slot: int, start: int, end: int) -> None:
        """Copy the tokens from `start` up to `end` back into the slot."""
        for name, cache in self._caches.items():
            cache[slot, :, start:end] = self.images[name][0, :, start:end]

    def close(self) -> None:
        """Unmap everything. Nothing may use `images` any more. Idempotent."""
        self.images = {}
        mapped, self._mapped = self._mapped, []
        for base, size_bytes in mapped:
            _libc().munmap(base, size_bytes)

    def _map(self) -> None:
        heads, head_dim = next(iter(self._caches.values())).shape[1::2]
        shape = (IMAGES, heads, self.capacity, head_dim)
        image_bytes = 4 * heads * self.capacity * head_dim
        descriptor = os.memfd_create("fallow-replay", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, image_bytes * len(self._caches))
            for index, name in enumerate(self._caches):
                base = _map_images(descriptor, index * image_bytes, image_bytes)
                self._mapped.append((base, image_bytes * IMAGES))
                flat = np.ctypeslib.as_array((ctypes.c_float * int(np.prod(shape))).from_address(base))
                self.images[name] = flat.reshape(shape)
                if self.capacity <= TOUCHED_MAX:
                    self.images[name][0] = 0.0
        finally:
            os.close(descriptor)


def can_map(kv_heads: int, head_dim: int, threads: int) -> bool:
    """Whether images of such caches can lie one after the other, and the kernel works on one thread."""
    return sys.platform == "linux" and threads == 1 and (4 * kv_heads * SLACK_TOKENS * head_dim) % mmap.PAGESIZE == 0


def _map_images(descriptor: int, offset: int, size_bytes: int) -> int:
    """Address of `IMAGES` neighbouring mappings of the same part of a file. Raises `OSError`."""
    libc = _libc()
    flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
    base = libc.mmap(None, size_bytes * IMAGES, _PROT_NONE, flags, -1, 0)
    if base == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    for at in range(base, base + size_bytes * IMAGES, size_bytes):
        if libc.mmap(at, size_bytes, _PROT_READ_WRITE, _MAP_SHARED | _MAP_FIXED, descriptor, offset) != at:
            error = ctypes.get_errno()
            libc.munmap(base, size_bytes * IMAGES)
            raise OSError(error, os.strerror(error))
    return int(base)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
