"""Who may ask the registrar for what, and who is admitted or stays.

Rules
- What a role may do is one table, `ALLOWED`; nothing else grants anything. Whoever can write the registrar's files is
  the operator of the whole network, and is asked nothing: `Standpoint.MACHINE`.
- From elsewhere an operator invites what does the work or reads, never what signs or admits: the theft of an operator's
  key gives nobody grants to sign, and no second operator.
- A key that was revoked stays out. A device that left, or was not seen for `FORGOTTEN_S`, needs a new invitation.
- Both are cut at once, by voiding the passports that they were given so far. Who comes back gets later ones.

Pure: times are arguments. Signatures, secrets and storage are the registrar's.
"""

import math
from collections.abc import Collection
from enum import StrEnum

import msgspec

from fallow.domain.credentials import Role
from fallow.domain.fleet import Tier
from fallow.domain.ids import NodeId

FORGOTTEN_S = 180 * 24 * 3600.0
"""A device that did not renew for so long is retired."""
INVITATION_LIFE_S = 3600.0
INVITATION_LIFE_MAX_S = 30 * 24 * 3600.0
REVOCATION_KEPT_S = 24 * 3600.0
"""How long a revocation is told to everybody. Passports of the key end after an hour by themselves, and it gets no new
one; the rest is for clocks that are wrong."""
BUS_DEPARTURES_KEPT_S = 2 * 3600.0
"""How long the bus's server is told of who left: for the hour of their passports, and clocks an hour apart."""

RENEWAL_SHARE = 0.5
"""Of a passport's life, after which it is renewed: the other half is for a registrar that is away."""
RETRY_S = 1.0
RETRY_MAX_S = 60.0
REFUSED_RETRY_S = 300.0
"""A member that was refused asks seldom: only an operator can change the answer."""


class Action(StrEnum):
    """What can be asked of a registrar by an enrolled party. (To enrol takes an invitation, not a role.)"""

    RENEW = "renew"
    LEAVE = "leave"
    INVITE = "invite"
    WITHDRAW = "withdraw"
    REVOKE = "revoke"
    READ_JOURNAL = "read_journal"


_EVERYBODY = frozenset({Action.RENEW, Action.LEAVE})

ALLOWED = {
    Role.NODE: _EVERYBODY,
    Role.GATEWAY: _EVERYBODY,
    Role.COORDINATOR: _EVERYBODY,
    Role.REGISTRAR: frozenset({Action.RENEW}),
    Role.OPERATOR: _EVERYBODY | {Action.INVITE, Action.WITHDRAW, Action.REVOKE, Action.READ_JOURNAL},
    Role.AUDITOR: _EVERYBODY | {Action.READ_JOURNAL},
    Role.READER: _EVERYBODY,
}


MACHINE = "machine"
"""Stands for whoever holds the registrar's files, where others are named by their key."""
INVITATIONS_OPEN_MAX = 10_000
INVITATIONS_OPEN_AFAR_MAX = 200
"""Of one operator who asks from elsewhere: a stolen key leaves room for everybody else's."""
MOVE_EVERY_S = 3600.0
"""A device chooses its cell once an hour at most: each choice is in the journal."""


class Standpoint(StrEnum):
    """From where somebody asks."""

    MACHINE = "machine"
    """With the registrar's own files in hand."""
    AFAR = "afar"
    """By a signed request."""


INVITED = {
    Standpoint.MACHINE: frozenset(Role) - {Role.REGISTRAR},
    Standpoint.AFAR: frozenset({Role.NODE, Role.GATEWAY, Role.AUDITOR, Role.READER}),
}
TIER_MAX = {Standpoint.MACHINE: Tier.ATTESTED, Standpoint.AFAR: Tier.KEYED}
"""Until devices can prove what they are, `ATTESTED` is the word of whoever runs the registrar's machine."""


class Enrolment(msgspec.Struct, frozen=True, kw_only=True):
    """An admitted key, as the registrar remembers it."""

    node: NodeId
    role: Role
    tier: Tier
    name: str
    cell: str
    enrolled_unix_s: float
    seen_unix_s: float
    """When it last enrolled or renewed, or the time of the last passport that it was given, if that is later."""
    consent: str | None = None
    """SHA-256 of the words that its owner agreed to."""
    revoked_unix_s: float | None = None
    revoked_why: str = ""
    left_unix_s: float | None = None
    """When it left of its own accord, or was retired."""
    moved_unix_s: float | None = None
    """When it last chose another cell."""


class InvitationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An invitation, as the registrar remembers it: without its secret."""

    id: str
    role: Role
    tier: Tier
    name: str | None
    """What its user will be called; `None`: as they say themselves."""
    cell: str
    made_by: str
    """An operator's NodeId, or `MACHINE`."""
    made_unix_s: float
    expires_unix_s: float
    used_by: NodeId | None = None
    withdrawn_unix_s: float | None = None


class Weight(StrEnum):
    """How far a refusal reaches."""

    THIS_REQUEST = "this_request"
    FOR_GOOD = "for_good"
    """The asker's membership has ended."""


class Verdict(msgspec.Struct, frozen=True):
    """Yes, or why not, for a person."""

    refusal: str | None = None
    weight: Weight = Weight.THIS_REQUEST

    @property
    def yes(self) -> bool:
        return self.refusal is None


YES = Verdict()


def may_ask(who: Enrolment | None, action: Action, now_unix_s: float) -> Verdict:
    """Whether an enrolled party may have that done now."""
    if who is None:
        return Verdict("This key was never admitted here; ask the operator for an invitation (`fallow invite`).")
    refusal = _gone(who, now_unix_s)
    if refusal is not None:
        return Verdict(refusal, Weight.FOR_GOOD)
    if action not in ALLOWED[who.role]:
        return Verdict(f"A {who.role} may not {action.replace('_', ' ')}; that takes {_who_may(action)}.")
    return YES


def is_forgotten(who: Enrolment, now_unix_s: float) -> bool:
    """Whether a device has been away for so long that it is retired."""
    return now_unix_s - who.seen_unix_s > FORGOTTEN_S


def may_invite(standpoint: Standpoint, role: Role, tier: Tier, life_s: float) -> Verdict:
    """Whether somebody there, who may invite at all, may invite such a party for so long."""
    if role not in INVITED[standpoint]:
        if role is Role.REGISTRAR:
            return Verdict("A registrar is founded with its network and never invited.")
        return Verdict(f"A {role} is invited on the registrar's machine only.")
    if tier > TIER_MAX[standpoint]:
        return Verdict(f"From elsewhere the highest tier is {TIER_MAX[standpoint].name.lower()}.")
    if not 0 < life_s <= INVITATION_LIFE_MAX_S:
        days = INVITATION_LIFE_MAX_S / 86400
        return Verdict(f"An invitation is good for more than 0 s and at most {days:g} days, not {life_s:g} s.")
    return YES


def invitations_open_max(made_by: str) -> int:
    """How many unused invitations one inviter may have."""
    return INVITATIONS_OPEN_MAX if made_by == MACHINE else INVITATIONS_OPEN_AFAR_MAX


def may_enrol(
    invitation: InvitationRecord,
    node: NodeId,
    role: Role,
    known: Enrolment | None,
    inviter: Enrolment | None,
    now_unix_s: float,
) -> Verdict:
    """Whether a key may be admitted by an invitation whose secret it knows.

    `inviter`: who made it, as the registrar remembers them now; `None` for the machine. Once they may invite no more,
    what they left unused admits nobody. The key that used it may come again with it: the answer to its first attempt
    can have been lost.
    """
    if known is not None and known.revoked_unix_s is not None:
        return Verdict(
            "This key was revoked and is not admitted again. Delete the device's identity file to become a new device."
        )
    if invitation.used_by not in {None, node}:
        return Verdict("This invitation was used already; each is for one device. Ask for another.")
    if invitation.used_by == node and (known is None or known.left_unix_s is not None):
        return Verdict("This invitation was used already, and the device has left since. Ask for another.")
    if invitation.used_by is None and now_unix_s >= invitation.expires_unix_s:
        return Verdict("This invitation has expired. Ask for another.")
    if invitation.used_by is None and not _still_holds(invitation, inviter, now_unix_s):
        return Verdict("This invitation was withdrawn, or who made it may invite no more. Ask for another.")
    if role is not invitation.role:
        return Verdict(f"This invitation is for a {invitation.role}, and a {role} came with it.")
    return YES


def renewal_wait_s(life_s: float, draw: float) -> float:
    """How long after it came a passport is renewed. `draw`, uniform in [0, 1), keeps members that began together from
    coming together."""
    return life_s * RENEWAL_SHARE * (0.9 + 0.2 * draw)


def retry_wait_s(failures: int, draw: float) -> float:
    """How long to wait after that many renewals in a row that nobody answered, or that brought a passport which the bus
    refused: doubling, at most `RETRY_MAX_S`."""
    return min(RETRY_S * 2.0 ** min(failures, 16), RETRY_MAX_S) * (0.5 + 0.5 * draw)


def may_move(who: Enrolment, cell: str, cells: Collection[str], now_unix_s: float) -> Verdict:
    """Whether a member may choose that cell, of those that there are.

    Nobody follows a coordinator or gateway that moves itself.
    """
    if who.role is not Role.NODE:
        return Verdict(f"A {who.role} stays in the cell that it was invited to.")
    if cell not in cells:
        return Verdict(f"There is no cell {cell}; whom the operator invites into a cell begins it.")
    if who.moved_unix_s is not None and abs(now_unix_s - who.moved_unix_s) < MOVE_EVERY_S:
        return Verdict(f"A device chooses its cell once in {MOVE_EVERY_S / 60:g} minutes at most.")
    return YES


def void_until_unix_s(who: Enrolment, now_unix_s: float) -> float:
    """Up to when passports of a key are void that is shut out, or leaves, now: all that it was given, even if the clock
    was set back since."""
    return max(now_unix_s, who.seen_unix_s)


def seen_unix_s(known: Enrolment | None, issued_unix_s: float) -> float:
    """When a key counts as seen that is given a passport of that time. It never falls, so that what ends a membership
    (`void_until_unix_s`) reaches every passport, whatever the clock did."""
    return issued_unix_s if known is None else max(issued_unix_s, known.seen_unix_s)


def issue_unix_s(void_unix_s: float | None, now_unix_s: float) -> float:
    """When a passport is issued, for a key whose earlier ones are void up to a time: later than that.

    Times in passports are whole seconds, so that who leaves and comes back within one waits, on paper, for the next.
    """
    return now_unix_s if void_unix_s is None else max(now_unix_s, math.floor(void_unix_s) + 1.0)


def bus_since_unix_s(last_revoked_unix_s: float | None, now_unix_s: float) -> tuple[float, float]:
    """From when on the bus's server is told of revocations, and of who left.

    The newest revocation counts as now when it is longer ago: a clock that is ahead for a moment lets nobody in again.
    """
    newest_s = now_unix_s if last_revoked_unix_s is None else min(now_unix_s, last_revoked_unix_s)
    return newest_s - REVOCATION_KEPT_S, now_unix_s - BUS_DEPARTURES_KEPT_S


def _still_holds(invitation: InvitationRecord, inviter: Enrolment | None, now_unix_s: float) -> bool:
    if invitation.withdrawn_unix_s is not None:
        return False
    return invitation.made_by == MACHINE or may_ask(inviter, Action.INVITE, now_unix_s).yes


def _gone(who: Enrolment, now_unix_s: float) -> str | None:
    if who.revoked_unix_s is not None:
        return f"This key was revoked: {who.revoked_why}"
    if who.left_unix_s is not None:
        return "This device has left or was retired; ask the operator for a new invitation."
    if is_forgotten(who, now_unix_s):
        return f"This device was not seen for {FORGOTTEN_S / 86400:g} days and is retired; ask for a new invitation."
    return None


def _who_may(action: Action) -> str:
    return " or ".join(f"an {role}" for role in Role if action in ALLOWED[role]) or "nobody's role"
