"""What a council does: found a network's trust, propose a change, sign it, and hand it to the repository.

Rules
- Signing adds a member's signature to the documents that their key counts for. Copies signed apart are merged; a key
  counts once, whatever comes together.
- A change of the council renews the policy's signature in the same proposal, by the new council.
- Whoever signs is shown what `proposals.review` says of it, never what somebody else says of it.
- No file or network here (`files.py`, `repository.py`), and no clock: the time is passed in.
"""

from collections.abc import Collection, Iterable, Mapping
from datetime import datetime

import msgspec
from tuf.api.metadata import (
    TOP_LEVEL_ROLE_NAMES,
    DelegatedRole,
    Delegations,
    Metadata,
    Role,
    Root,
    TargetFile,
    Targets,
    Timestamp,
)

from fallow.domain.charter import FleetPolicy
from fallow.domain.errors import CharterInvalid
from fallow.domain.ids import NodeId
from fallow.policy.council import why_no_quorum, why_policy_cannot_follow
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.proposals import Base, Documents, Proposal, parsed, review, verify_base
from fallow.trust.council.publication import Publication
from fallow.trust.keys import Identity

Members = Mapping[NodeId, str]
"""Public keys, each with a name for people."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What should be in force; `None` leaves as it is."""

    policy: FleetPolicy | None = None
    members: Members | None = None
    threshold: int | None = None
    online: NodeId | None = None
    """The registrar's key for snapshot and timestamp."""
    publishers: Mapping[str, Members] | None = None
    """By role, all of them."""
    withdraw: Mapping[str, frozenset[str]] | None = None
    """By role, the paths that its list loses."""


# --- proposing ------------------------------------------------------------------------------------


def founding(wanted: Wanted, now_unix_s: float) -> Proposal:
    """The proposal that founds a network: `wanted` names members, threshold and online key.

    Without publishers, no model can ever be loaded until some are delegated. Raises `CharterInvalid`.
    """
    if wanted.members is None or wanted.threshold is None or wanted.online is None:
        raise CharterInvalid("a network is founded with members, a threshold and the registrar's key")
    root = _root(1, wanted.members, wanted.threshold, wanted.online, now_unix_s)
    policy = wanted.policy or FleetPolicy(epoch=1)
    publishers = wanted.publishers or {}
    targets = _targets(1, policy, publishers, now_unix_s)
    return Proposal(
        base=None,
        root=_text(Metadata(root)),
        targets=_text(Metadata(targets)),
        policy=tuf.encode_policy(policy).decode(),
        delegated={role: _text(Metadata(_list(1, {}, now_unix_s))) for role in publishers},
    )


def proposal(base: Base, wanted: Wanted, now_unix_s: float) -> Proposal:
    """A change of what is in force; with nothing `wanted`, the same for as long again (`ROOT_LIFE_S`).

    A list is signed anew when none of today's publishers may be the one who signed it, when somebody stops publishing
    it (whose next version must not stop this), or when it loses entries.
    Raises `CharterInvalid` for a base that does not hold, or a change that cannot be.
    """
    root, targets, policy = verify_base(base)
    after = wanted.policy or policy
    refusal = why_policy_cannot_follow(policy, after)
    if refusal is not None:
        raise CharterInvalid(refusal)
    held = {role: tuf.publisher_names(targets, role) for role in tuf.delegated_roles(targets)}
    publishers = held | {role: dict(names) for role, names in (wanted.publishers or {}).items()}
    withdrawn = wanted.withdraw or {}
    changed = {role for role, names in held.items() if names.keys() - publishers[role].keys()} | withdrawn.keys()
    # An old list is signed anew with a renewal only: a publisher who is away must not hold up a resumption, and a list
    # that ran out lists nothing until its publisher signs it again.
    lists_until = tuf.utc(now_unix_s + tuf.ROOT_LIFE_S / 2 if wanted == Wanted() else 0)
    new_root = _next_root(root, wanted, now_unix_s)
    new_targets = _targets(targets.version + 1, after, publishers, now_unix_s)
    return Proposal(
        base=base,
        root=_text(Metadata(new_root)) if new_root is not None else None,
        targets=_text(Metadata(new_targets)),
        policy=tuf.encode_policy(after).decode(),
        delegated={
            role: _text(Metadata(_list(version, listed, now_unix_s)))
            for role, (version, listed) in _lists_to_sign(base, new_targets, lists_until, changed, withdrawn).items()
        },
    )


def _next_root(root: Root, wanted: Wanted, now_unix_s: float) -> Root | None:
    """`None` when nothing in it changes and it is young enough to stay."""
    members = tuf.member_names(root)
    threshold = root.roles[Root.type].threshold
    online = next(iter(tuf.holders(root.roles[Timestamp.type], root.keys, Timestamp.type).values()))
    after = (
        dict(wanted.members) if wanted.members is not None else members,
        wanted.threshold if wanted.threshold is not None else threshold,
        wanted.online if wanted.online is not None else online,
    )
    if after == (members, threshold, online) and is_young(root, now_unix_s):
        return None
    return _root(root.version + 1, *after, now_unix_s)


def is_young(signed: Root | Targets, now_unix_s: float) -> bool:
    """Whether more than half of the council's word's life is left to it."""
    return signed.expires > tuf.utc(now_unix_s + tuf.ROOT_LIFE_S / 2)


def _lists_to_sign(
    base: Base, targets: Targets, until: datetime, changed: Collection[str], withdrawn: Mapping[str, frozenset[str]]
) -> dict[str, tuple[int, Mapping[str, TargetFile]]]:
    """Role to version and content of the lists that changed, or that no publisher of `targets` signed until then.

    Raises `CharterInvalid` for a path to withdraw that is not listed.
    """
    found: dict[str, tuple[int, Mapping[str, TargetFile]]] = {}
    for role in tuf.delegated_roles(targets):
        old = tuf.read(Targets, base.delegated[role]) if role in base.delegated else None
        listed = old.signed.targets if old is not None else {}
        missing = withdrawn.get(role, frozenset()) - listed.keys()
        if missing:
            raise CharterInvalid(f"{min(missing)} is not listed")
        if old is None:
            found[role] = (1, {})
        elif (
            role in changed
            or old.signed.expires < until
            or not targets.get_verification_result(role, old.signed_bytes, old.signatures)
        ):
            left = {path: file for path, file in listed.items() if path not in withdrawn.get(role, frozenset())}
            found[role] = (old.signed.version + tuf.LIST_JUMP, left)
    unknown = withdrawn.keys() - found.keys()
    if unknown:
        raise CharterInvalid(f"nobody publishes {min(unknown)[:40]!r}")
    return found


def _root(version: int, members: Members, threshold: int, online: NodeId, now_unix_s: float) -> Root:
    refusal = why_no_quorum(len(members), threshold)
    if refusal is not None:
        raise CharterInvalid(refusal)
    council = [tuf.public_key(node, name) for node, name in members.items()]
    registrar = tuf.public_key(online, "registrar")
    roles = {
        name: Role([key.keyid for key in council], threshold) if name in {Root.type, Targets.type} else
        Role([registrar.keyid], 1)
        for name in sorted(TOP_LEVEL_ROLE_NAMES)
    }  # fmt: skip
    root = Root(
        version=version,
        expires=tuf.utc(now_unix_s + tuf.ROOT_LIFE_S),
        keys={key.keyid: key for key in [*council, registrar]},
        roles=roles,
        consistent_snapshot=True,
    )
    tuf.check_root(root)
    return root


def _targets(version: int, policy: FleetPolicy, publishers: Mapping[str, Members], now_unix_s: float) -> Targets:
    keys = {role: [tuf.public_key(node, name) for node, name in held.items()] for role, held in publishers.items()}
    for role, held in keys.items():
        if role not in tuf.PATHS or not held:
            raise CharterInvalid(f"expected one publisher or more of {' or '.join(tuf.PATHS)}, got {role[:40]!r}")
    delegations = Delegations(
        keys={key.keyid: key for held in keys.values() for key in held},
        roles={
            role: DelegatedRole(role, [key.keyid for key in held], 1, terminating=True, paths=[tuf.PATHS[role]])
            for role, held in keys.items()
        },
    )
    targets = Targets(
        version=version,
        expires=tuf.utc(now_unix_s + tuf.ROOT_LIFE_S),
        targets={tuf.POLICY: TargetFile.from_data(tuf.POLICY, tuf.encode_policy(policy), ["sha256"])},
        delegations=delegations if keys else None,
    )
    tuf.check_targets(targets)
    return targets


def _list(version: int, listed: Mapping[str, TargetFile], now_unix_s: float) -> Targets:
    return Targets(version=version, expires=tuf.utc(now_unix_s + tuf.LIST_LIFE_S), targets=dict(listed))


def _text(metadata: Metadata[Root] | Metadata[Targets]) -> str:
    return metadata.to_bytes().decode()


# --- signing --------------------------------------------------------------------------------------


def sign(proposed: Proposal, identities: Iterable[Identity]) -> tuple[Proposal, tuple[str, ...]]:
    """The proposal with these keys' signatures, and the documents that they signed.

    A key that counts for nothing in it is left out. Raises `CharterInvalid` when all of them do.
    """
    documents = parsed(proposed)
    signed: set[str] = set()
    for identity in identities:
        for name, metadata in _documents_of(documents, identity.node).items():
            metadata.sign(tuf.signer_of(identity), append=True)
            signed.add(name)
    if not signed:
        raise CharterInvalid(
            "the keys here are in neither the old nor the new council, and no publisher's that must sign"
        )
    return _with_signatures(proposed, documents), tuple(sorted(signed))


def merge(proposals: Iterable[Proposal]) -> Proposal:
    """One proposal with the signatures of all copies. Raises `CharterInvalid` when they are not of one proposal."""
    merged: Proposal | None = None
    for each in proposals:
        if merged is None:
            merged = each
            continue
        ours, theirs = parsed(merged), parsed(each)
        if each.base != merged.base or each.policy != merged.policy or ours.delegated.keys() != theirs.delegated.keys():
            raise CharterInvalid("these are copies of different proposals")
        pairs = [(ours.targets, theirs.targets), *((ours.delegated[r], theirs.delegated[r]) for r in ours.delegated)]
        if (ours.root is None) != (theirs.root is None) or any(not tuf.signed_alike(a, b) for a, b in pairs):
            raise CharterInvalid("these are copies of different proposals")
        if ours.root is not None and theirs.root is not None:
            if not tuf.signed_alike(ours.root, theirs.root):
                raise CharterInvalid("these are copies of different proposals")
            ours.root.signatures.update(theirs.root.signatures)
        for a, b in pairs:
            a.signatures.update(b.signatures)
        merged = _with_signatures(merged, ours)
    if merged is None:
        raise CharterInvalid("there is no proposal to merge")
    return merged


def publication_of(proposed: Proposal) -> Publication:
    """What the repository takes. Raises `CharterInvalid` when signatures are missing, and says whose."""
    for need in review(proposed).needs:
        if not need.is_met:
            raise CharterInvalid(
                f"{need.document} has {len(need.signed)} of the {need.needed} signatures that it needs; "
                f"these may still sign: {', '.join(need.may_sign) or 'nobody'}"
            )
    return Publication(
        root=proposed.root.encode() if proposed.root is not None else None,
        targets=proposed.targets.encode(),
        policy=proposed.policy.encode(),
        delegated={role: text.encode() for role, text in proposed.delegated.items()},
    )


def _documents_of(documents: Documents, node: NodeId) -> dict[str, Metadata[Root] | Metadata[Targets]]:
    found: dict[str, Metadata[Root] | Metadata[Targets]] = {}
    after = tuf.council_of(documents.root_after).values()
    before = tuf.council_of(documents.root_before).values() if documents.root_before is not None else ()
    if documents.root is not None and (node in after or node in before):
        found[Root.type] = documents.root
    if node in after:
        found[Targets.type] = documents.targets
    for role, metadata in documents.delegated.items():
        if node in tuf.publishers(documents.targets.signed, role).values():
            found[role] = metadata
    return found


def _with_signatures(proposed: Proposal, documents: Documents) -> Proposal:
    return msgspec.structs.replace(
        proposed,
        root=_text(documents.root) if documents.root is not None else None,
        targets=_text(documents.targets),
        delegated={role: _text(metadata) for role, metadata in documents.delegated.items()},
    )
