"""The `Clock` contract: the only way that a shell learns the time.

Rules: policies take times as arguments and never ask; shells ask a `Clock`. `monotonic_s` never goes back and is
the one to measure durations with; `unix_s` may jump and is for records that people read. Under the simulator both
advance only when every task waits.
"""

from typing import Protocol


class Clock(Protocol):
    """Time as a shell sees it."""

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary origin; never decreases."""
        ...

    def unix_s(self) -> float:
        """Seconds since 1970-01-01 UTC, as the device believes."""
        ...

    async def sleep(self, duration_s: float) -> None:
        """Return after `duration_s` seconds, or at once when it is not positive."""
        ...
