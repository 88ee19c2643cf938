"""Whether a device is taken out of service on suspicion, whether there is room for one more, and which reports are
remembered. Pure.

Rules
- A report says that a device's numbers were refused, and names the *parties* who could have brought that about, the
  device itself apart: the gateway that tells of it and chose the chain, the device that refused, and those whose rows
  the accused computed with. What a gateway of another cell tells has that cell for a party besides: its coordinator
  vouches for all of them.
- Reports that have no party in common make a device suspect: whoever lies, or is damaged, alone cannot be behind all of
  them. Any number of reports with one party behind all of them make nobody suspect.
- A device's own word that it found itself damaged (its canary, its weights) is enough.
- Own words cost nothing, so they get half of the budget, rounded up, and leave the rest to reports: the stages of a
  device that says it are failed in any case, those of one that is reported serve on.
- Of too many reports, those of the device that refused most often go first, and of these the oldest about the one that
  it accuses most often: who lies much pushes out what it said itself.
- Reports count for `REPORT_LIFE_S`. A quarantine lasts `QUARANTINE_S`, and what was said before it counts no more.
- An alarm must not become a weapon: the council's budget (`Quarantine`) bounds how many are taken out in an hour, and
  how large a share of the fleet, rounded down, is out at a time. Without a council's word nobody is.

Who may report, and what is remembered of it, is `coordinator/suspects.py`'s.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import StrEnum
from math import ceil, floor
from typing import Final

from fallow.domain.charter import Quarantine
from fallow.domain.ids import NodeId

REPORT_LIFE_S: Final = 600.0
QUARANTINE_S: Final = 1800.0
BUDGET_PERIOD_S: Final = 3600.0

Parties = frozenset[str]
"""Behind one report: nodes by their ids, and other cells by their names."""


class Evidence(StrEnum):
    """What a device is taken out for, in words for a person."""

    REPORTS = "its numbers were refused in chains that have nobody else in common"
    OWN_WORD = "it found itself damaged"


def suspect(reports: Iterable[Parties]) -> bool:
    """Whether no single party can be behind all reports of one device. Without reports: no."""
    told = list(reports)
    return bool(told) and not frozenset.intersection(*told)


def room_for_another(began_s: Iterable[float], out: int, fleet: int, budget: Quarantine | None, now_s: float) -> bool:
    """Whether one more device may be taken out.

    `began_s`: when quarantines began. `out`: devices in quarantine now. `fleet`: devices that count, those among them.
    `budget`: the council's; `None` while it is not known.
    """
    if budget is None:
        return False
    lately = sum(now_s - at_s < BUDGET_PERIOD_S for at_s in began_s)
    return lately < budget.devices_per_hour_max and out + 1 <= budget.fleet_share_max * fleet


def room_for_own_word(began_s: Iterable[float], out: int, fleet: int, budget: Quarantine | None, now_s: float) -> bool:
    """Whether own words have room for one more, beside `room_for_another`. `began_s`, `out`: of own words alone."""
    if budget is None:
        return False
    lately = sum(now_s - at_s < BUDGET_PERIOD_S for at_s in began_s)
    share = floor(budget.fleet_share_max * fleet)
    return lately < ceil(budget.devices_per_hour_max / 2) and out < ceil(share / 2)


def pushed_out(kept: Sequence[tuple[NodeId | None, NodeId]], of_one_max: int, all_max: int) -> int | None:
    """Which of a gateway's reports is forgotten, by its place; `None` while there is room for all.

    `kept`: of each, oldest first, who refused (`None`: the gateway itself), and who is accused. `of_one_max`: reports
    of one that refused. `all_max`: reports together.
    """
    if not kept:
        return None
    refused_by, most = Counter(refuser for refuser, _ in kept).most_common(1)[0]
    if most <= of_one_max and len(kept) <= all_max:
        return None
    of_it = [(place, accused) for place, (refuser, accused) in enumerate(kept) if refuser == refused_by]
    blamed, _ = Counter(accused for _, accused in of_it).most_common(1)[0]
    return next(place for place, accused in of_it if accused == blamed)
