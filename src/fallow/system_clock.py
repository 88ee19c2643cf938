"""The `Clock` of real processes: the operating system's time and the event loop's sleep."""

import asyncio
import time


class SystemClock:
    """Time as the machine tells it."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def unix_s(self) -> float:
        return time.time()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(max(0.0, duration_s))
