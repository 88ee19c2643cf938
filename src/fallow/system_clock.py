"""The `Clock` of real processes: the operating system's time and the event loop's sleep."""

import asyncio
import time

_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", None)
"""Linux; elsewhere the monotonic clock is the best there is, and goes on during sleep on Windows only."""


class SystemClock:
    """Time as the machine tells it."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def unix_s(self) -> float:
        return time.time()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(max(0.0, duration_s))


class WakingClock(SystemClock):
    """Counts the time that the machine slept, where it can tell: a lease runs out while its holder is suspended."""

    def monotonic_s(self) -> float:
        return time.monotonic() if _BOOT_CLOCK is None else time.clock_gettime(_BOOT_CLOCK)
