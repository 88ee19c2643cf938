"""What the council decided, for the journal: found by comparing its repository with what was recorded before.

Rules
- Publications reach the repository by several ways (HTTPS, a command on the same machine), and halts too. So the
  repository is what is looked at, and what was recorded is kept in the database: nothing is recorded twice, by several
  processes or after a restart, and nothing that came while no registrar ran is missed.
- `changes` is pure. Bodies are bounded: a long list is counted, and its beginning given.
"""

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from fallow.domain.charter import Halt
from fallow.domain.ids import NodeId
from fallow.trust.council.publication import InForce
from fallow.trust.council.tuf_format import council_of, sha256
from fallow.trust.registrar import database as db
from fallow.trust.registrar.journal import Kind
from fallow.trust.registrar.journal_db import append

NAMES_RECORDED_MAX: Final = 50
POLICY_RECORDED_BYTES_MAX: Final = 8 * 1024
_SETTING: Final = "council_seen"

Record = tuple[Kind, str, dict[str, Any]]
"""Kind, whose doing, and what."""


class Listed(msgspec.Struct, frozen=True):
    """A publisher's list."""

    version: int
    names: tuple[str, ...]


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What a repository said when it was looked at."""

    root: int
    targets: int
    epoch: int
    signed_by: tuple[NodeId, ...]
    """Council members whose signatures the policy carries."""
    policy_sha256: str
    policy: str
    """Its JSON; empty when it is long."""
    members: tuple[NodeId, ...]
    threshold: int
    lists: dict[str, Listed] = {}
    halts: dict[str, Halt] = {}
    """By signer."""


def seen(state: InForce, halts: Iterable[tuple[NodeId, Halt]]) -> Seen:
    """What a repository says now."""
    council = council_of(state.root.signed)
    policy = state.policy_bytes.decode()
    short = len(msgspec.json.encode(policy)) <= POLICY_RECORDED_BYTES_MAX  # as it is written inside an entry
    return Seen(
        root=state.root.signed.version,
        targets=state.targets.signed.version,
        epoch=state.policy.epoch,
        signed_by=tuple(sorted(node for key, node in council.items() if key in state.targets.signatures)),
        policy_sha256=sha256(state.policy_bytes),
        policy=policy if short else "",
        members=tuple(sorted(council.values())),
        threshold=state.root.signed.roles["targets"].threshold,
        lists={
            role: Listed(metadata.signed.version, tuple(sorted(metadata.signed.targets)))
            for role, (metadata, _) in state.delegated.items()
        },
        halts=dict(halts),
    )


def changes(before: Seen | None, after: Seen) -> list[Record]:
    """What is to be recorded of the way from one to the other."""
    records: list[Record] = []
    if before is None or after.root != before.root:
        body = {"root": after.root, "members": after.members[:NAMES_RECORDED_MAX], "threshold": after.threshold}
        records.append((Kind.COUNCIL_PUBLISHED, "council", body))
    if before is None or (after.epoch, after.policy_sha256) != (before.epoch, before.policy_sha256):
        body = {
            "epoch": after.epoch,
            "signed_by": after.signed_by[:NAMES_RECORDED_MAX],
            "sha256": after.policy_sha256,
            "policy": after.policy,
            "ends_halts": sorted(set(before.halts) - set(after.halts)) if before is not None else [],
        }
        records.append((Kind.POLICY_PUBLISHED, "council", body))
    for role, listed in after.lists.items():
        known = before.lists.get(role) if before is not None else None
        if known is None or known.version != listed.version:
            old = set(known.names) if known is not None else set()
            records.append((Kind.MODEL_PUBLISHED, "publishers", _list_body(role, listed, old)))
    for role, listed in before.lists.items() if before is not None else ():
        if role not in after.lists:  # recorded although it listed nothing: somebody may publish no more
            body = _list_body(role, Listed(listed.version, ()), set(listed.names)) or {"list": role}
            records.append((Kind.MODEL_PUBLISHED, "council", body | {"publisher_removed": True}))
    for signer, halt in after.halts.items():
        if before is None or before.halts.get(signer) != halt:
            body = {"epoch": halt.epoch, "why": halt.why, "issued_unix_s": halt.issued_unix_s}
            records.append((Kind.HALTED, signer, body))
    return [record for record in records if record[2]]


def record(database: db.RegistryDb, after: Seen, now_unix_s: float) -> list[Record]:
    """Put into the journal what has changed since it was last done, by whichever process."""
    with database.reading() as connection:
        if db.setting(connection, _SETTING) == _encoded(after):
            return []
    with database.writing() as connection:
        kept = db.setting(connection, _SETTING)
        before = msgspec.json.decode(kept, type=Seen) if kept is not None else None
        records = changes(before, after)
        for kind, who, body in records:
            append(connection, now_unix_s, kind, who, body)
        db.set_setting(connection, _SETTING, _encoded(after))
    return records


def _encoded(after: Seen) -> str:
    return msgspec.json.encode(after).decode()


def _list_body(role: str, listed: Listed, old: set[str]) -> dict[str, Any]:
    added = [name for name in listed.names if name not in old]
    removed = sorted(old - set(listed.names))
    if not added and not removed:
        return {}
    return {
        "list": role,
        "version": listed.version,
        "added": added[:NAMES_RECORDED_MAX],
        "removed": removed[:NAMES_RECORDED_MAX],
        "added_count": len(added),
        "removed_count": len(removed),
    }
