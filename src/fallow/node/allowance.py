"""What a session may still compute under its grant: a few integers and a deadline, compared for every call.

Rules
- Only gateways open sessions, each with a grant for just that, and only while this device may work.
- No signature and no wall clock here: a grant's end was turned into a deadline of the monotonic clock when it came.
- Rows that were computed under a grant stay computed, whatever comes between: other grants, a renewal, the end of the
  session and a new opening. Rows that are sent again out of the log count like those that are computed.
"""

import math
from collections import OrderedDict
from typing import Final

from fallow.domain.charter import Standing
from fallow.domain.clock import Clock
from fallow.domain.errors import GrantRefused, NotWorking
from fallow.domain.frames import OpenStage, RenewGrant
from fallow.domain.grants import Grant
from fallow.domain.ids import NodeId
from fallow.fabric.peers import Peers
from fallow.policy import rights
from fallow.policy.rights import Refused
from fallow.trust.contract import GrantBook, Lease

SESSIONS_MAX: Final = 4_096
"""Whatever the council allows."""
SPENT_MAX: Final = 16_384
"""Grants of ended sessions that are remembered. Of more, those that ended first are forgotten: a coordinator would have
to give so many within a grant's life for one to be used anew."""


class Allowance:
    """What is left of one grant."""

    __slots__ = ("expires_s", "grant", "rows_left", "tokens_max")

    def __init__(self, grant: Grant, expires_s: float) -> None:
        """`expires_s`: its end by the monotonic clock."""
        self.grant = grant
        self.tokens_max = grant.token_budget
        self.rows_left = rights.rows_max(grant)
        self.expires_s = expires_s

    def take(self, end: int, count: int, now_s: float) -> Refused | None:
        """Count rows that are about to be computed and end at position `end`; or why they may not be."""
        if end <= self.tokens_max and count <= self.rows_left and now_s < self.expires_s:
            self.rows_left -= count
            return None
        return rights.rows_refused(end, count, self.tokens_max, self.rows_left, self.expires_s - now_s)


class Spent:
    """Allowances that no session uses now, until their grants end as well."""

    def __init__(self) -> None:
        self._ended: OrderedDict[str, Allowance] = OrderedDict()

    def resumed(self, grant: Grant, expires_s: float, held: Allowance | None, now_s: float) -> Allowance:
        """The allowance of a grant that came: a new one, or what is left of it when it came before. `held`: what the
        session has now; another grant's is kept for its return."""
        if held is not None and held.grant.id == grant.id:
            return held
        if held is not None:
            self.ended(held, now_s)
        return self._ended.pop(grant.id, None) or Allowance(grant, expires_s)

    def ended(self, allowance: Allowance, now_s: float) -> None:
        """No session uses it any more."""
        if now_s >= allowance.expires_s or not math.isfinite(allowance.expires_s):
            return
        self._ended[allowance.grant.id] = allowance
        self._ended.move_to_end(allowance.grant.id)
        while len(self._ended) > SPENT_MAX or next(iter(self._ended.values())).expires_s <= now_s:
            self._ended.popitem(last=False)


class Allowances:
    """Who may open sessions on this device, and what they may compute."""

    def __init__(self, grants: GrantBook, lease: Lease, peers: Peers, clock: Clock) -> None:
        self._grants = grants
        self._lease = lease
        self._peers = peers
        self._clock = clock
        self._spent = Spent()

    @property
    def sessions_max(self) -> int:
        """How many sessions this device may hold, by the council's word."""
        charter = self._lease.charter
        return SESSIONS_MAX if charter is None else min(SESSIONS_MAX, charter.policy.limits.sessions_per_device_max)

    def open(self, peer: NodeId, opening: OpenStage, held: Allowance | None) -> Allowance:
        """What the grant of an opening allows; `held` is what its session has now.

        Raises `GrantRefused`, `NotWorking`.
        """
        if not rights.may_drive(self._peers.role(peer)):
            raise GrantRefused("Only gateways open sessions.")
        return self._allowance(self._grants.open(peer, opening), held)

    def renew(self, peer: NodeId, renewal: RenewGrant, current: Allowance) -> Allowance:
        """What a grant that follows allows. Raises `GrantRefused`, `NotWorking`."""
        return self._allowance(self._grants.renew(peer, renewal, current.grant), current)

    def _allowance(self, grant: Grant, held: Allowance | None) -> Allowance:
        now_s = self._clock.monotonic_s()
        return self._spent.resumed(grant, now_s + self._grants.life_left_s(grant), held, now_s)

    def take(self, allowance: Allowance, end: int, count: int) -> GrantRefused | NotWorking | None:
        """Count rows that are about to be computed; or why they may not be. Asked for every call of the engine."""
        standing = self._lease.standing
        if standing is not Standing.WORKING:
            return NotWorking(self._lease.why, standing)
        refused = allowance.take(end, count, self._clock.monotonic_s())
        if refused is None:
            return None
        return GrantRefused(f"The grant does not allow it ({refused.refusal}). {refused.words}")

    def ended(self, allowance: Allowance) -> None:
        """The session of an allowance has ended."""
        self._spent.ended(allowance, self._clock.monotonic_s())


def code_of(error: GrantRefused | NotWorking) -> str:
    """A refusal's code for peers: a standing says more than that there is one."""
    return error.standing if isinstance(error, NotWorking) else error.code
