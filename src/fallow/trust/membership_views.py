"""What others are given of a membership instead of the whole: its clock, and the key to the bus's system account."""

from fallow.domain.clock import Clock
from fallow.trust.membership import Membership


class SystemCredentials:
    """A coordinator's `BusCredentials` for the bus's system account: the same key, with the leave to hear who comes and
    goes."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    @property
    def passport(self) -> str:
        return self._membership.system_passport or ""

    @property
    def authority_pem(self) -> str:
        return self._membership.authority_pem

    def sign(self, nonce: bytes) -> bytes:
        return self._membership.sign(nonce)

    def refused(self) -> None:
        self._membership.refused()


class NetworkClock:
    """A `Clock` whose time of day is the registrar's: judges passports rightly on a device whose own is wrong."""

    def __init__(self, clock: Clock, membership: Membership) -> None:
        self._clock = clock
        self._membership = membership

    def monotonic_s(self) -> float:
        return self._clock.monotonic_s()

    def unix_s(self) -> float:
        return self._membership.unix_s()

    async def sleep(self, duration_s: float) -> None:
        await self._clock.sleep(duration_s)
