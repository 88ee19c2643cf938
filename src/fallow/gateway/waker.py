"""Wakes the one task that drives a chain. Handlers run on the same loop, so nothing is missed in between."""

import asyncio


class Waker:
    """A sleep that ends when something happens. For one sleeper."""

    def __init__(self) -> None:
        self._wake: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Something has happened."""
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def sleep(self, timeout_s: float | None = None) -> None:
        """Wait for the next frame or trouble."""
        self._wake = asyncio.get_running_loop().create_future()
        try:
            if timeout_s is None:
                await self._wake
            else:
                await asyncio.wait((self._wake,), timeout=timeout_s)
        finally:
            self._wake = None
