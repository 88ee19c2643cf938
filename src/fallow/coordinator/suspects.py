"""Devices out of service on suspicion: what was reported of whom, and who is in quarantine until when.

Rules
- Gateways report with the requests by which they replace a device (`RouteRequest.accused`): what they refused
  themselves, and what a device of the chain refused. With a question of another cell for a chain, its gateways' reports
  come along; that cell is then a party to each. A device reports itself in its heartbeat (`HostedStage.damaged`).
- A device's own word is acted on once, however long it says so. While the budget is used up it waits, and is asked for
  again every `OWN_WORD_RETRY_S` at most: to count the fleet for each heartbeat would cost a large one its coordinator.
- Who is in quarantine is shown with the standing `QUARANTINED`: it is placed nothing and gets no sessions, and what it
  holds is placed on others. Afterwards it counts again by itself.
- Every store is bounded by who fills it: a gateway's reports push out its own older ones, never another's (of these,
  `policy/quarantine.py` says which). All gateways of another cell have one gateway's places together.
- Soft state. A coordinator that takes over has heard devices' own words, and no gateway's; for it, the hour's budget
  begins anew.

The rule and the budget are `policy/quarantine.py`'s. It does no I/O but the log.
"""

import logging
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec

from fallow.coordinator.guard import LOG_PERIOD_S
from fallow.coordinator.registry import Fleet
from fallow.domain.charter import Standing
from fallow.domain.clock import Clock
from fallow.domain.fleet import Accusation, Heartbeat, QuarantinedDevice, RouteRequest
from fallow.domain.ids import NodeId
from fallow.policy import quarantine
from fallow.policy.quarantine import Evidence, Parties
from fallow.trust.contract import Lease

QUARANTINED: Final = "quarantined"
"""In the place of a standing: it works, and is not believed at present."""
GATEWAYS_MAX: Final = 256
"""Of more that report, the one that was silent for longest is forgotten."""
REPORTS_OF_GATEWAY_MAX: Final = 64
REPORTS_OF_DEVICE_MAX: Final = 16
"""Of what one gateway reports, that the same device refused."""
OWN_WORD_RETRY_S: Final = 1.0
COUNTED: Final = frozenset({str(Standing.WORKING), QUARANTINED})
"""Standings of the devices that the council's share is of."""
TOLD_MAX: Final = 64
"""Devices in quarantine that a status names."""

log = logging.getLogger(__name__)


class _Report(NamedTuple):
    """What one gateway tells of one device."""

    accused: NodeId
    parties: Parties
    refused_by: NodeId | None


class _Out(NamedTuple):
    """One device's quarantine."""

    until_s: float
    evidence: Evidence


_Reports = OrderedDict[_Report, float]
"""One gateway's, and when it last told each. Oldest first."""


class Suspects:
    """One coordinator's book."""

    def __init__(self, clock: Clock, lease: Lease, fleet: Fleet) -> None:
        self._clock = clock
        self._lease = lease
        self._fleet = fleet
        self._reports: OrderedDict[str, _Reports] = OrderedDict()
        """By gateway, or by the name of another cell."""
        self._out: dict[NodeId, _Out] = {}
        self._began: deque[tuple[float, Evidence]] = deque()
        """When quarantines of the last hour began, and on what."""
        self._heeded: set[NodeId] = set()
        """Devices whose own word was acted on, while they go on saying it."""
        self._full_s = -OWN_WORD_RETRY_S
        """When it was last found that the budget has no room for an own word."""
        self._stayed_s = -LOG_PERIOD_S
        """When it was last written down that one more could not be taken out."""

    # --- facts ----------------------------------------------------------------------------------

    def hear(self, request: RouteRequest) -> None:
        """Take a gateway's reports. `request.origin` is who sent it, as `checks.py` saw to."""
        if request.origin is not None:
            self._hear(request.origin, (request.origin,), request.accused)

    def hear_cell(self, cell: str, request: RouteRequest) -> None:
        """Take what another cell says that a gateway of its reports: it could have made it up, with any origin."""
        if request.origin is not None:
            self._hear(cell, (cell, request.origin), request.accused)

    def _hear(self, reporter: str, vouching: Iterable[str], accused: Iterable[Accusation]) -> None:
        for told in accused:
            if told.node in self._fleet.present() and told.node not in self._out:
                others = {*told.others, told.refused_by or told.node} - {told.node}
                self._report(reporter, _Report(told.node, frozenset((*vouching, *others)), told.refused_by))

    def enter(self, heartbeat: Heartbeat) -> Heartbeat:
        """A heartbeat with its device's standing as this cell sees it. To be asked after `Roll.enter`."""
        node = heartbeat.node
        found = self._out.get(node)
        if found is not None and self._clock.monotonic_s() >= found.until_s:
            self._release(node)
        if not _damaged(heartbeat):
            self._heeded.discard(node)
        elif heartbeat.standing == Standing.WORKING and node not in self._heeded:
            self._heed(node)
        if node not in self._out or heartbeat.standing != Standing.WORKING:
            return heartbeat
        return msgspec.structs.replace(heartbeat, standing=QUARANTINED)

    # --- questions ------------------------------------------------------------------------------

    def count(self) -> int:
        """Devices in quarantine now."""
        now_s = self._clock.monotonic_s()
        return sum(out.until_s > now_s for out in self._out.values())

    def told(self) -> tuple[QuarantinedDevice, ...]:
        """For `fallow status`."""
        now_s = self._clock.monotonic_s()
        out = [(node, out) for node, out in self._out.items() if out.until_s > now_s][:TOLD_MAX]
        return tuple(QuarantinedDevice(node=n, left_s=each.until_s - now_s, why=each.evidence.value) for n, each in out)

    # --- deciding -------------------------------------------------------------------------------

    def _heed(self, node: NodeId) -> None:
        """Act on a device's own word, if there is room."""
        now_s = self._clock.monotonic_s()
        if node not in self._out and now_s - self._full_s < OWN_WORD_RETRY_S:
            return
        if self._take_out(node, Evidence.OWN_WORD):
            self._heeded &= self._fleet.present().keys()  # of who is gone, nothing has to be remembered
            self._heeded.add(node)
        else:
            self._full_s = now_s

    def _report(self, reporter: str, report: _Report) -> None:
        now_s = self._clock.monotonic_s()
        reports = self._reports.setdefault(reporter, OrderedDict())
        reports[report] = now_s
        reports.move_to_end(report)
        kept = list(reports)
        place = quarantine.pushed_out(
            [(each.refused_by, each.accused) for each in kept], REPORTS_OF_DEVICE_MAX, REPORTS_OF_GATEWAY_MAX
        )
        if place is not None:
            del reports[kept[place]]
        self._reports.move_to_end(reporter)
        if len(self._reports) > GATEWAYS_MAX:
            self._reports.popitem(last=False)
        log.info("gateway or cell %s reports node %s: its numbers were refused", reporter[:8], report.accused[:8])
        if quarantine.suspect(self._reports_of(report.accused, now_s)):
            self._take_out(report.accused, Evidence.REPORTS)

    def _reports_of(self, accused: NodeId, now_s: float) -> list[Parties]:
        """What is behind the reports of one device that still count."""
        return [
            report.parties
            for reports in self._reports.values()
            for report, at_s in reports.items()
            if report.accused == accused and now_s - at_s < quarantine.REPORT_LIFE_S
        ]

    def _take_out(self, node: NodeId, evidence: Evidence) -> bool:
        """Whether a device is in quarantine now."""
        if node in self._out:
            return True
        now_s = self._clock.monotonic_s()
        while self._began and now_s - self._began[0][0] >= quarantine.BUDGET_PERIOD_S:
            self._began.popleft()
        for each in [each for each, out in self._out.items() if out.until_s <= now_s]:
            self._release(each)  # it was not heard of since
        if not self._room(evidence, now_s):
            if now_s - self._stayed_s >= LOG_PERIOD_S:
                self._stayed_s = now_s
                log.warning("node %s is suspect (%s) and stays: the budget allows no more", node[:8], evidence)
            return False
        self._began.append((now_s, evidence))
        self._out[node] = _Out(now_s + quarantine.QUARANTINE_S, evidence)
        for reports in self._reports.values():
            for report in [report for report in reports if report.accused == node]:
                del reports[report]
        log.warning("node %s is in quarantine for %.0f s: %s", node[:8], quarantine.QUARANTINE_S, evidence)
        return True

    def _room(self, evidence: Evidence, now_s: float) -> bool:
        """Whether the council's budget has room for one more."""
        charter = self._lease.charter
        budget = None if charter is None else charter.policy.quarantine
        fleet = sum(beat.standing in COUNTED for beat in self._fleet.present().values())
        began_s = [at_s for at_s, _ in self._began]
        if not quarantine.room_for_another(began_s, len(self._out), fleet, budget, now_s):
            return False
        if evidence is Evidence.REPORTS:
            return True
        own_s = [at_s for at_s, on in self._began if on is Evidence.OWN_WORD]
        out = sum(each.evidence is Evidence.OWN_WORD for each in self._out.values())
        return quarantine.room_for_own_word(own_s, out, fleet, budget, now_s)

    def _release(self, node: NodeId) -> None:
        del self._out[node]
        log.warning("node %s is out of quarantine", node[:8])


def _damaged(heartbeat: Heartbeat) -> bool:
    return any(stage.damaged for stage in heartbeat.hosted)
