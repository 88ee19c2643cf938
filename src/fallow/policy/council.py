"""What the council's word means: which halt holds, which policy may follow which, and what a change changes.

Rules
- A halt holds while its signer is in the council of today, it is of this network, and the quorum has signed no policy
  of a higher epoch than its own. So one member halts; k of n resume; who is voted out halts nothing any more.
- A halt names an epoch at most `HALT_EPOCHS_AHEAD` above the policy's, or it does not hold: one stolen key must not use
  up the epochs that a resumption needs.
- Epochs only rise. Two different policies of one epoch cannot both be in force, on any device, ever.
- Pure: no clock, no file, no signature. Who signed what was checked before (`trust/`).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from fallow.domain.charter import FleetPolicy, Halt
from fallow.domain.ids import NodeId

MEMBERS_MAX = 32
PUBLISHERS_MAX = 32
"""Of models, and as many of releases. Each has a list of its own, which every device fetches."""
EPOCH_MAX = 1 << 53
HALT_EPOCHS_AHEAD = 64
"""A member who does not see the newest policy halts for epochs that there may be by now. Nobody honest needs more."""

PUBLISHER_NAME_MAX_CHARS = 32
_PUBLISHER_NAME = re.compile(rf"[a-z0-9][a-z0-9-]{{0,{PUBLISHER_NAME_MAX_CHARS - 1}}}")


class Change(msgspec.Struct, frozen=True):
    """One line of what a proposal changes. An empty side: it was not there, or is there no more."""

    what: str
    before: str
    after: str


def halt_holds(halt: Halt, signer: NodeId, council: Iterable[NodeId], network: str, epoch: int) -> bool:
    """Whether a halt signed by `signer` stops the network whose policy in force has that epoch."""
    return halt.network == network and epoch <= halt.epoch <= epoch + HALT_EPOCHS_AHEAD and signer in set(council)


def resuming_epoch(policy: FleetPolicy, halts: Iterable[Halt]) -> int:
    """The lowest epoch at which none of these halts, which hold now, does; one above the policy's without any."""
    return max([policy.epoch, *(halt.epoch for halt in halts)]) + 1


def why_policy_cannot_follow(before: FleetPolicy | None, after: FleetPolicy) -> str | None:
    """For a person; `None` when it can. Giving the same policy again is no change, and can."""
    if after.epoch >= EPOCH_MAX:
        return f"expected an epoch below {EPOCH_MAX}, got {after.epoch}"
    if before is None or after == before or after.epoch > before.epoch:
        return None
    if after.epoch == before.epoch:
        return f"expected an epoch above {before.epoch} for another policy, got the same epoch"
    return f"expected an epoch above {before.epoch}, got {after.epoch}: an old policy does not come back"


def why_no_quorum(members: int, threshold: int) -> str | None:
    """Why k of n cannot be a council, for a person; `None` when it can."""
    if not 1 <= members <= MEMBERS_MAX:
        return f"expected 1 to {MEMBERS_MAX} members, got {members}"
    if not 1 <= threshold <= members:
        return f"expected a threshold of 1 to {members}, got {threshold}"
    return None


def why_no_publisher_name(name: str) -> str | None:
    """Why a publisher cannot be called that, for a person; `None` when it can. The name is a part of file names."""
    if _PUBLISHER_NAME.fullmatch(name):
        return None
    return (
        f"expected a publisher's name of 1 to {PUBLISHER_NAME_MAX_CHARS} small letters, digits and dashes, "
        f"got {name[:80]!r}"
    )


def publisher_name(text: str) -> str:
    """The nearest name of a publisher to what somebody or their machine is called."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:PUBLISHER_NAME_MAX_CHARS].strip("-") or "founder"


def quorum_remark(members: int, threshold: int) -> str | None:
    """What a founder should know about k of n; `None` when there is nothing to say."""
    if members == 1:
        return (
            "A council of one: who has this one key decides everything, and if it is lost nobody can ever decide again."
        )
    if threshold == 1:
        return "Each member alone can change everything: one stolen key is enough."
    if threshold == members:
        return "All members are needed: if one key is lost, nothing can ever be changed again."
    if threshold * 2 <= members:
        return "Two groups of members could sign against each other: more than half is safer."
    return None


def policy_changes(before: FleetPolicy | None, after: FleetPolicy) -> tuple[Change, ...]:
    """Field by field, nested ones with a dot; lists by what is added and removed."""
    old = _readable(before) if before is not None else {}
    new = _readable(after)
    changes: list[Change] = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name) and (name in old) == (name in new):
            continue
        changes.extend(_field_changes(name, name in old, old.get(name), name in new, new.get(name)))
    return tuple(changes)


def member_changes(
    before: Mapping[NodeId, str], threshold_before: int, after: Mapping[NodeId, str], threshold_after: int, role: str
) -> tuple[Change, ...]:
    """Who comes and goes among the keys of a role, and how many of them must sign."""
    changes = [Change(f"{role}: removed", _named(node, before[node]), "") for node in before if node not in after]
    changes += [Change(f"{role}: added", "", _named(node, after[node])) for node in after if node not in before]
    changes += [
        Change(f"{role}: renamed", _named(node, before[node]), _named(node, after[node]))
        for node in after
        if node in before and before[node] != after[node]
    ]
    quorum = (f"{threshold_before} of {len(before)}" if before else "", f"{threshold_after} of {len(after)}")
    if quorum[0] != quorum[1]:
        changes.append(Change(f"{role}: signatures needed", *quorum))
    return tuple(changes)


def _named(node: NodeId, name: str) -> str:
    return f"{name or 'unnamed'} (key {node})"


def _readable(policy: FleetPolicy) -> dict[str, Any]:
    return _flat(msgspec.to_builtins(policy)) | {"tier_min": policy.tier_min.name.lower()}


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _field_changes(name: str, was: bool, before: Any, comes: bool, after: Any) -> list[Change]:
    lists = (list, tuple)
    if isinstance(before, lists) and isinstance(after, lists):
        gone = [Change(f"{name}: removed", str(each), "") for each in before if each not in after]
        return gone + [Change(f"{name}: added", "", str(each)) for each in after if each not in before]
    return [Change(name, _shown(before) if was else "", _shown(after) if comes else "")]


def _shown(value: Any) -> str:
    if value is None:
        return "any"
    if isinstance(value, list | tuple):
        return ", ".join(str(each) for each in value) or "none"
    return str(value)
