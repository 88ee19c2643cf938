"""Who may hold a link with us: those who show a passport of this network, made out to the key that the link shows.

Rules
- Nothing but the passport counts. A peer's word about its role is not asked for.
- Only devices and gateways hold links; coordinators, operators, auditors and readers have no business on them.
- It is asked when a link opens and when a peer shows a newer passport; whether somebody was revoked meanwhile, often.

How a passport is read is `trust/passports.py`'s; links are closed by `fabric/peers.py`.
"""

from collections.abc import Callable

from fallow.domain.credentials import Passport
from fallow.domain.errors import PassportRefused
from fallow.domain.ids import NodeId
from fallow.policy import rights
from fallow.trust.contract import Passports


class Doorkeeper:
    """`Admission` by passports."""

    def __init__(self, passport: Callable[[], str], passports: Passports, unix_s: Callable[[], float]) -> None:
        """`passport` gives our own newest one; `unix_s`, the time that passports are judged by."""
        self._passport = passport
        self._passports = passports
        self._unix_s = unix_s

    @property
    def passport(self) -> str:
        """Ours."""
        return self._passport()

    def admit(self, peer: NodeId, passport: str) -> Passport:
        """Raises `PassportRefused`."""
        if not passport:
            raise PassportRefused(f"expected a passport of this network from {peer[:8]}, and it showed none")
        read = self._passports.read(passport, holder=peer)
        if not rights.may_link(read.role):
            raise PassportRefused(f"expected a device or a gateway, and {peer[:8]} is {read.role}")
        return read

    def computes(self, passport: Passport) -> bool:
        return rights.may_compute(passport.role)

    def life_left_s(self, passport: Passport) -> float:
        return passport.expires_unix_s - self._unix_s()

    def revoked(self, peer: NodeId) -> bool:
        return self._passports.revoked(peer)
