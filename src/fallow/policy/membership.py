"""Who is here: folds heartbeats, departures and silence into one `Member` for each node. Pure.

Rules
- A node is gone after `missed_max` heartbeat intervals of silence, at once when its bus connection breaks, and at once
  when it says goodbye. Whatever it was, a newer heartbeat brings it back.
- Heartbeats are ordered by `sequence` within one run of a node (`boot`). Late ones are ignored; so are those of a run
  that another run has replaced, so that two heartbeats on the wire cannot make a node flicker.
- A broken connection and a heartbeat sent just before it may arrive in the wrong order: a heartbeat of the same run
  within `late_s` of the departure is ignored. A node that is alive sends another one an interval later.
- A node that left politely comes back only as a new run.
- A node that departed more than `flaps_max` times within `flap_window_s` is *flapping*: it may carry sessions with what
  it holds, and gets nothing new to load until it has calmed down.

It does not decide what follows from a departure; that is `placement` and the coordinator.
"""

from collections.abc import Mapping
from enum import StrEnum

import msgspec

from fallow.domain.fleet import Heartbeat
from fallow.domain.ids import NodeId

OLD_BOOTS_MAX = 4
DEPARTURES_MAX = 16


class MembershipRules(msgspec.Struct, frozen=True, kw_only=True):
    """When a node counts as gone, forgotten or flapping."""

    heartbeat_interval_s: float = 1.0
    missed_max: int = 3
    late_s: float = 0.2
    forget_after_s: float = 600.0
    flap_window_s: float = 60.0
    flaps_max: int = 3

    @property
    def silence_max_s(self) -> float:
        return self.heartbeat_interval_s * self.missed_max


class Presence(StrEnum):
    """Whether a node is here."""

    PRESENT = "present"
    LEFT = "left"
    """It said goodbye."""
    GONE = "gone"
    """It fell silent or its connection broke."""


class Member(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What is known of a node's presence."""

    heartbeat: Heartbeat
    """The newest one."""
    presence: Presence
    heard_s: float
    joined_s: float
    """Since when it has been present without a break, or had been when it departed."""
    departed_s: float | None = None
    old_boots: tuple[str, ...] = ()
    departures_s: tuple[float, ...] = ()


def heard(member: Member | None, heartbeat: Heartbeat, now_s: float, rules: MembershipRules) -> Member | None:
    """The member after a heartbeat, or `None` when the heartbeat is late and changes nothing."""
    if member is None:
        return Member(heartbeat=heartbeat, presence=Presence.PRESENT, heard_s=now_s, joined_s=now_s)
    if heartbeat.boot in member.old_boots:
        return None
    present = member.presence is Presence.PRESENT
    if heartbeat.boot == member.heartbeat.boot:
        if heartbeat.sequence <= member.heartbeat.sequence or member.presence is Presence.LEFT:
            return None
        if member.departed_s is not None and now_s - member.departed_s < rules.late_s:
            return None
        joined_s = member.joined_s if present else now_s
        return msgspec.structs.replace(
            member, heartbeat=heartbeat, presence=Presence.PRESENT, heard_s=now_s, joined_s=joined_s, departed_s=None
        )
    departures = (*member.departures_s, now_s)[-DEPARTURES_MAX:] if present else member.departures_s
    return Member(
        heartbeat=heartbeat,
        presence=Presence.PRESENT,
        heard_s=now_s,
        joined_s=now_s,
        old_boots=(*member.old_boots, member.heartbeat.boot)[-OLD_BOOTS_MAX:],
        departures_s=departures,
    )


def restarted(before: Member | None, after: Member) -> bool:
    """Whether a heartbeat revealed that a node thought present had died and come back as a new run."""
    return before is not None and before.presence is Presence.PRESENT and before.heartbeat.boot != after.heartbeat.boot


def departed(member: Member, presence: Presence, now_s: float) -> Member:
    """The member after it departed. A node that has departed already stays as it is, except that leaving is final."""
    if member.presence is not Presence.PRESENT:
        return msgspec.structs.replace(member, presence=presence) if presence is Presence.LEFT else member
    departures = member.departures_s if presence is Presence.LEFT else (*member.departures_s, now_s)
    return msgspec.structs.replace(
        member, presence=presence, departed_s=now_s, departures_s=departures[-DEPARTURES_MAX:]
    )


def silent(members: Mapping[NodeId, Member], now_s: float, rules: MembershipRules) -> tuple[NodeId, ...]:
    """Nodes thought present that have been silent for too long."""
    return tuple(
        node
        for node, member in members.items()
        if member.presence is Presence.PRESENT and now_s - member.heard_s > rules.silence_max_s
    )


def forgettable(members: Mapping[NodeId, Member], now_s: float, rules: MembershipRules) -> tuple[NodeId, ...]:
    """Nodes that departed so long ago that nobody needs to hear of them again."""
    return tuple(
        node
        for node, member in members.items()
        if member.departed_s is not None and now_s - member.departed_s > rules.forget_after_s
    )


def flapping(member: Member, now_s: float, rules: MembershipRules) -> bool:
    """Whether a node comes and goes too often to be given anything new."""
    return sum(now_s - at_s <= rules.flap_window_s for at_s in member.departures_s) >= rules.flaps_max


def lost_since(members: Mapping[NodeId, Member], since_s: float) -> tuple[NodeId, ...]:
    """Nodes that were lost, and not by their own word, since that time and are not back."""
    return tuple(
        node
        for node, member in members.items()
        if member.presence is Presence.GONE and member.departed_s is not None and member.departed_s >= since_s
    )
