"""What `fallow council …` shows: what a proposal changes, who must sign, and what is in force, in words."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from rich.table import Table
from rich.text import Text

from fallow.cli.options import console, say
from fallow.cli.plain import one_line
from fallow.domain.charter import FleetPolicy, Halt
from fallow.domain.ids import NodeId
from fallow.policy.council import quorum_remark
from fallow.trust.council.proposals import Need, Review
from fallow.trust.council.tuf_format import MODELS

SOON_S: Final = 30 * 24 * 3600.0
"""How long before the council must meet `status` begins to say so."""


_SIGN_AGAIN: Final = "Its publisher signs it again: `fallow council sign-model NAME` with any model on it."


class Publisher(msgspec.Struct, frozen=True):
    """One list, and whose it is."""

    kind: str
    name: str
    key: NodeId
    lists: frozenset[str]
    """Digests or versions."""
    expires: datetime


class Situation:
    """What is in force, gathered for `status`."""

    def __init__(
        self,
        *,
        network: str,
        policy: FleetPolicy,
        members: dict[NodeId, str],
        threshold: int,
        publishers: Sequence[Publisher],
        root_expires: datetime,
        timestamp_expires: datetime,
        halts: Sequence[tuple[str, Halt]],
        own: NodeId | None,
        now: datetime,
    ) -> None:
        self.network = network
        self.policy = policy
        self.members = members
        self.threshold = threshold
        self.publishers = publishers
        self.root_expires = root_expires
        self.timestamp_expires = timestamp_expires
        self.halts = halts
        self.own = own
        self.now = now

    def facts(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "network": self.network,
            "epoch": self.policy.epoch,
            "lease_s": self.policy.lease_s,
            "allowed_models": self.policy.allowed_models,
            "version_min": self.policy.version_min,
            "tier_min": self.policy.tier_min.name.lower(),
            "signed_models": self._models(),
            "threshold": self.threshold,
            "members": [{"name": name, "key": node, "you": node == self.own} for node, name in self.members.items()],
            "publishers": {
                kind: [
                    {"name": each.name, "key": each.key, "lists": len(each.lists), "expires": each.expires.isoformat()}
                    for each in self.publishers
                    if each.kind == kind
                ]
                for kind in sorted({each.kind for each in self.publishers})
            },
            "council_expires": self.root_expires.isoformat(),
            "timestamp_expires": self.timestamp_expires.isoformat(),
            "halts": [
                {"by": name, "why": halt.why, "epoch": halt.epoch, "issued_unix_s": halt.issued_unix_s}
                for name, halt in self.halts
            ],
        }

    def _models(self) -> int:
        """How many are signed, by one publisher or several, in lists that have not run out."""
        lists = [each.lists for each in self.publishers if each.kind == MODELS and each.expires > self.now]
        return len(frozenset[str]().union(*lists))

    def sentences(self) -> list[str]:
        """For people, the most urgent first; each is one line, whatever members and publishers are called."""
        policy = self.policy
        lines = [f"HALTED by {name} on {_day(halt.issued_unix_s)}: {halt.why}" for name, halt in self.halts]
        if self.halts:
            lines.append("Only the council together resumes: `fallow council propose --resume`, sign, publish.")
        elif self.timestamp_expires <= self.now:
            lines.append(
                f"Nobody works: the last timestamp expired at {_time(self.timestamp_expires)}. The registrar renews "
                "it while it runs."
            )
        else:
            lines.append(f"Devices may work, for now until {_time(self.timestamp_expires)}; the registrar renews that.")
        people = ", ".join(
            f"{name or node[:8]}{' (you)' if node == self.own else ''}" for node, name in self.members.items()
        )
        lines.append(f"The council: {self.threshold} of {len(self.members)} must sign: {people}.")
        remark = quorum_remark(len(self.members), self.threshold)
        if remark is not None:
            lines.append(remark)
        lines.append(_policy_sentence(policy, self._models()))
        for kind in sorted({each.kind for each in self.publishers}):
            told = [f"{each.name} ({len(each.lists)} listed)" for each in self.publishers if each.kind == kind]
            lines.append(f"Publishers of {kind}: {', '.join(told)}.")
        for each in self.publishers:
            whose, day = f"list of {each.kind} by {each.name}", f"{each.expires:%d %B %Y}"
            if each.lists and each.expires <= self.now:  # an empty one is missed by nobody
                lines.insert(0, f"The {whose} ran out on {day}, and lists nothing. {_SIGN_AGAIN}")
            elif each.lists and (each.expires - self.now).total_seconds() < SOON_S:
                lines.insert(0, f"SOON: the {whose} runs out on {day}. {_SIGN_AGAIN}")
        if not any(each.kind == MODELS for each in self.publishers):
            lines.append("Nobody may publish models, so that none can be loaded.")
        by = f"The council must meet again (`fallow council propose --renew`) before {self.root_expires:%d %B %Y}."
        if (self.root_expires - self.now).total_seconds() < SOON_S:
            lines.insert(0, f"SOON: {by}")
        else:
            lines.append(by)
        return [one_line(line) for line in lines]


def show_review(review: Review) -> None:
    """The changes and the signatures, as tables."""
    if review.changes:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("what", "now", "then"):
            table.add_column(column, overflow="fold")  # a key that was cut could be another one
        for change in review.changes:
            style = "yellow" if change.before and change.after else "green" if change.after else "red"
            table.add_row(
                Text(one_line(change.what)), Text(one_line(change.before)), Text(one_line(change.after), style)
            )
        console.print(table)
    else:
        say("It changes nothing; it only makes what is in force good for longer.")
    say("")
    for need in review.needs:
        say(one_line(_need_sentence(need)))


def _need_sentence(need: Need) -> str:
    signed = f"signed by {', '.join(need.signed)}" if need.signed else "signed by nobody yet"
    still = f"; these still may: {', '.join(need.may_sign)}" if need.may_sign and not need.is_met else ""
    return f"{'✓' if need.is_met else '✗'} {need.document} ({len(need.signed)} of {need.needed}): {signed}{still}"


def _policy_sentence(policy: FleetPolicy, models: int) -> str:
    signed = f"{models} model{'s are' if models != 1 else ' is'} signed"
    allowed = (
        "all of them are allowed" if policy.allowed_models is None else f"{len(policy.allowed_models)} are allowed"
    )
    oldest = "" if policy.version_min == "0" else f" Fallow must be {policy.version_min} or newer."
    return (
        f"Policy of epoch {policy.epoch}: {signed}, and {allowed}; a lease lasts {policy.lease_s:g} s; devices of tier "
        f"{policy.tier_min.name.lower()} or higher.{oldest}"
    )


def _day(unix_s: float) -> str:
    try:
        return f"{datetime.fromtimestamp(unix_s, UTC):%d %B %Y, %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return "a day that no calendar has"


def _time(moment: datetime) -> str:
    return f"{moment:%d %B, %H:%M:%S} UTC"
