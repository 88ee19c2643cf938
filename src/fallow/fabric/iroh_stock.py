"""Reading and writing an iroh stream through the binding as it is: what is used when `iroh_fast.py` is off."""

import asyncio
from collections.abc import Callable
from typing import Any


class StockReader:
    """Always has one read outstanding; `on_data(b"")` is the end of the stream. Pausable.

    A cancelled read loses bytes, so reads are only cancelled when the link is over.
    """

    def __init__(
        self, stream: Any, size: int, on_data: Callable[[bytes], None], on_error: Callable[[Exception], None]
    ) -> None:
        self._stream = stream
        self._size = size
        self._on_data = on_data
        self._on_error = on_error
        self._may_read = asyncio.Event()
        self._may_read.set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def pause(self) -> None:
        self._may_read.clear()

    def resume(self) -> None:
        self._may_read.set()

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        data = b"more"
        while data:
            await self._may_read.wait()
            try:
                data = await self._stream.read(self._size)
            except Exception as error:
                self._on_error(error)
                return
            self._on_data(data)


class StockWriter:
    """One write at a time; `on_done` follows each."""

    def __init__(self, stream: Any, on_done: Callable[[], None], on_error: Callable[[Exception], None]) -> None:
        self._stream = stream
        self._on_done = on_done
        self._on_error = on_error
        self._task: asyncio.Task[None] | None = None

    def write(self, data: bytes) -> bool:
        self._task = asyncio.get_running_loop().create_task(self._run(data))
        return False

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self, data: bytes) -> None:
        try:
            await self._stream.write_all(data)
        except Exception as error:
            self._on_error(error)
            return
        self._on_done()
