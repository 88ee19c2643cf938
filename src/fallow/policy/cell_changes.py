"""When a device changes its cell, and when a cell dissolves: what `cells.py` finds best must stay so for a while. Pure.

Devices
- A running device looks at the cells around it now and then. It moves when `looks_agreeing` looks in a row found one
  that is clearly nearer, so that no hour of bad connections moves it; at once when its own cell says that it dissolves.
- It moves at most once a `stay_min_s`, whatever it sees: devices can neither flap between cells nor be chased.

Cells
- A cell dissolves once it could have done so, without a break, for `small_for_s`: it has fewer than `devices_min`, and
  there is a neighbour to dissolve into (`cells.dissolve_into`) that serves every model which is served here, so that
  those who ask here lose nothing.
- Once it has said so it means it: the word holds while round trip and room stay within `hold_slack` of the bounds, the
  neighbour is there and serves as much, and the cell is small. So a device more or less does not turn everybody round.
- Two cells never dissolve into each other: none dissolves into one that does so itself, or while another dissolves into
  it. Where a cell and the one that it named said so in the same moment, the one with the lesser name keeps its word and
  the other takes its own back; meanwhile no device moves between them, because neither takes anybody new.

It measures nothing and moves nobody.
"""

from collections.abc import Sequence

import msgspec

from fallow.domain.cells import CellDigest
from fallow.domain.ids import Digest
from fallow.policy.cells import CellOffer, CellRules, Neighbour, choose_cell, dissolve_into

# --- devices --------------------------------------------------------------------------------------


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """A device in its cell, and what its last looks found."""

    home: str
    since_s: float
    """When it came, or was refused another cell."""
    away: int = 0
    """How many looks in a row found another cell clearly nearer; counted up to `looks_agreeing`."""


def look(settled: Settled, offers: Sequence[CellOffer], now_s: float, rules: CellRules) -> tuple[Settled, str | None]:
    """What a look at the cells around leads to: the cell to move to now, or `None` to stay."""
    chosen = choose_cell(settled.home, offers, rules) or settled.home
    if chosen == settled.home:
        return msgspec.structs.replace(settled, away=0), None
    settled = msgspec.structs.replace(settled, away=min(settled.away + 1, rules.looks_agreeing))
    dissolves = any(offer.cell == settled.home and offer.dissolves_into is not None for offer in offers)
    sure = dissolves or settled.away >= rules.looks_agreeing
    return settled, chosen if sure and now_s - settled.since_s >= rules.stay_min_s else None


# --- cells ----------------------------------------------------------------------------------------


class Smallness(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a cell is too small, and what it says of it."""

    since_s: float | None = None
    """Since when it could dissolve; `None`: it cannot."""
    into: str | None = None
    """The cell that it dissolves into, once it says so."""


def dissolving(
    before: Smallness, own: CellDigest, neighbours: Sequence[Neighbour], now_s: float, rules: CellRules
) -> Smallness:
    """How a cell stands, by what it and its neighbours serve now. To be asked at least once a digest interval."""
    spoke = before.into is not None
    comers = [each.digest.cell for each in neighbours if each.digest.dissolves_into == own.cell]
    if any(not spoke or comer < own.cell for comer in comers):
        return Smallness()
    heirs = [each for each in neighbours if _inherits(each.digest, own, before.into)]
    if before.into is not None:
        return before if any(_holds(before.into, own, each, rules) for each in heirs) else Smallness()
    devices = {own.cell: own.devices} | {each.digest.cell: each.digest.devices for each in heirs}
    rtts_s = {each.digest.cell: each.rtt_s for each in heirs if each.rtt_s is not None}
    into = dissolve_into(own.cell, devices, rtts_s, rules)
    if into is None:
        return Smallness()
    since_s = now_s if before.since_s is None else before.since_s
    return Smallness(since_s=since_s, into=into if now_s - since_s >= rules.small_for_s else None)


def _holds(into: str, own: CellDigest, heir: Neighbour, rules: CellRules) -> bool:
    """Whether a cell that dissolves into a neighbour should go on doing so."""
    room = rules.merge_fill_max * rules.hold_slack * rules.devices_max
    return (
        heir.digest.cell == into
        and heir.rtt_s is not None
        and heir.rtt_s <= rules.rtt_max_s * rules.hold_slack
        and own.devices < rules.devices_min
        and own.devices + heir.digest.devices <= room
    )


def _inherits(theirs: CellDigest, own: CellDigest, into: str | None) -> bool:
    """Whether those who are served here lose nothing when its devices go there."""
    takes = theirs.dissolves_into is None or (theirs.cell == into and own.cell < theirs.cell)
    return takes and _served(own) <= _served(theirs)


def _served(digest: CellDigest) -> set[Digest]:
    return {told.model for told in digest.models if told.servable}
