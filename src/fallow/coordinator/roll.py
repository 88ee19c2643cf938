"""The roll: which devices count, by what they may do and by what the registrar says of them.

Rules
- A device counts while it says that it works, and its tier is not below the one that the council asks for. Others are
  shown in the status, and get neither sessions nor stages.
- The tier is the registrar's word, in the device's passport; a device that has shown none, or one that ran out or was
  revoked, is anonymous. A passport's signature is checked once, when it comes.

What a device's heartbeat claims is `checks.py`'s; what follows from the tier in placement, `policy/placement.py`'s.
"""

import logging
from collections.abc import Container
from typing import Final

import msgspec

from fallow.domain.charter import Standing
from fallow.domain.clock import Clock
from fallow.domain.credentials import PASSPORT_GRACE_S, Passport, Role
from fallow.domain.errors import PassportRefused
from fallow.domain.fleet import Heartbeat, Tier
from fallow.domain.ids import NodeId
from fallow.trust.contract import Lease, Passports

BELOW_TIER: Final = "below_tier"
"""In the place of a standing: it works, and its tier is too low to count."""

log = logging.getLogger(__name__)


class Roll:
    """The passports that devices of one cell have shown."""

    def __init__(self, cell: str, passports: Passports, lease: Lease, clock: Clock) -> None:
        self._cell = cell
        self._passports = passports
        self._lease = lease
        self._clock = clock
        self._shown: dict[NodeId, Passport] = {}

    @property
    def tier_min(self) -> Tier:
        """The lowest that counts."""
        charter = self._lease.charter
        return Tier.ANONYMOUS if charter is None else charter.policy.tier_min

    def enter(self, heartbeat: Heartbeat) -> Heartbeat:
        """A heartbeat with its device's standing as this cell sees it, and without the passport, which is kept here."""
        if heartbeat.passport:
            self._show(heartbeat.node, heartbeat.passport)
            heartbeat = msgspec.structs.replace(heartbeat, passport="")
        if heartbeat.standing == Standing.WORKING and self.tier(heartbeat.node) < self.tier_min:
            return msgspec.structs.replace(heartbeat, standing=BELOW_TIER)
        return heartbeat

    def tier(self, node: NodeId) -> Tier:
        """A device's tier now."""
        shown = self._shown.get(node)
        if shown is None or self._passports.revoked(node):
            return Tier.ANONYMOUS
        if self._clock.unix_s() >= shown.expires_unix_s + PASSPORT_GRACE_S:
            return Tier.ANONYMOUS
        return shown.tier

    def revoked(self, node: NodeId) -> bool:
        """Whether the registrar took a process's key back."""
        return self._passports.revoked(node)

    def counts(self, node: NodeId, heartbeat: Heartbeat | None) -> bool:
        """Whether a device may be given sessions. `heartbeat`: its last one as `enter` gave it, if it is here."""
        if heartbeat is not None and heartbeat.standing != Standing.WORKING:
            return False
        return self.tier(node) >= self.tier_min

    def forget_but(self, known: Container[NodeId]) -> None:
        """Forget devices that nobody remembers."""
        for node in [node for node in self._shown if node not in known]:
            del self._shown[node]

    def _show(self, node: NodeId, text: str) -> None:
        known = self._shown.get(node)
        if known is not None and known.text == text:
            return
        try:
            passport = self._passports.read(text, holder=node)
        except PassportRefused as error:
            log.warning("%s: the passport of node %s does not count: %s", error.code, node[:8], error)
            return
        if passport.role is not Role.NODE or passport.cell != self._cell:
            log.warning("the passport of node %s does not count: %s of %s", node[:8], passport.role, passport.cell)
            return
        self._shown[node] = passport
