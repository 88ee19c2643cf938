"""Devices that refuse orders because they have heard of a higher epoch, and when a leader steps down for them.

Rules
- One device's word moves nobody: it may lie. A leader steps down for an epoch that `WITNESSES_MIN` devices have heard
  of or exceed; where a single device is here, for that one's.
- At most once in the time of a lease, whatever is said meanwhile.
- An epoch that our key's revision cannot explain is not believed (`leadership.EPOCH_JUMP_MAX`), and named in the log.
- Who refuses gets no orders for `DEAF_S`, or until our epoch is as high: what it should hold is placed on others.
- A claim that nobody else has made so far is asked after among others, at most once in the time of a lease: after a bus
  has lost its store, all devices have heard of higher epochs, but few may be due for an order.

It sends nothing; `placer.py` tells it of refusals.
"""

import logging
from collections.abc import Collection
from typing import Final, NamedTuple

from fallow.coordinator.leadership import Authority
from fallow.domain.clock import Clock
from fallow.domain.errors import BusMessageError
from fallow.domain.ids import NodeId

WITNESSES_MIN: Final = 2
DEAF_S: Final = 30.0

log = logging.getLogger(__name__)


class _Claim(NamedTuple):
    epoch: int
    at_s: float


class Witnesses:
    """One claim for each device that is here; a loss, age and our own epoch end it."""

    def __init__(self, authority: Authority, clock: Clock) -> None:
        self._authority = authority
        self._clock = clock
        self._claims: dict[NodeId, _Claim] = {}
        self._stepped_s: float | None = None
        self._sounded_s: float | None = None

    def refused(self, node: NodeId, epoch: int, present: Collection[NodeId]) -> bool:
        """A device refused our order because it has heard of `epoch`. Steps down if that is borne out; returns
        whether others should be asked first."""
        if node not in present:
            return False
        now_s = self._clock.monotonic_s()
        self._claims[node] = _Claim(epoch, now_s)
        epoch_max = self._authority.epoch_max
        if epoch > epoch_max:
            log.warning(
                "%s: node %s claims epoch %d, more than the %d that the lease allows; it gets no orders for %g s",
                BusMessageError.code, node[:8], epoch, epoch_max, DEAF_S,
            )  # fmt: skip
            return False
        believed = self._borne_out(present)
        if believed is None:
            log.warning("node %s alone has heard of epoch %d; it gets no orders for %g s", node[:8], epoch, DEAF_S)
            if self._lately(self._sounded_s, now_s):
                return False
            self._sounded_s = now_s
            return True
        if self._lately(self._stepped_s, now_s):
            return False
        self._stepped_s = now_s
        log.warning("devices have heard of epoch %d, this coordinator's is lower", believed)
        self._authority.outranked(believed)
        return False

    def deaf(self) -> frozenset[NodeId]:
        """The devices that would refuse an order now."""
        self.prune()
        ours = self._authority.leading
        return frozenset(node for node, claim in self._claims.items() if ours is None or claim.epoch > ours)

    def forget(self, node: NodeId) -> None:
        """The device is gone."""
        self._claims.pop(node, None)

    def prune(self) -> None:
        oldest_s = self._clock.monotonic_s() - DEAF_S
        self._claims = {node: claim for node, claim in self._claims.items() if claim.at_s > oldest_s}

    def _lately(self, at_s: float | None, now_s: float) -> bool:
        return at_s is not None and now_s - at_s < self._authority.ttl_s

    def _borne_out(self, present: Collection[NodeId]) -> int | None:
        """The highest epoch above ours that enough devices claim at least."""
        ours, epoch_max = self._authority.leading, self._authority.epoch_max
        deaf = self.deaf()
        claims = sorted((self._claims[node].epoch for node in deaf if node in present), reverse=True)
        believable = [epoch for epoch in claims if epoch <= epoch_max and (ours is None or epoch > ours)]
        needed = min(WITNESSES_MIN, len(present))
        return believable[needed - 1] if len(believable) >= needed else None
