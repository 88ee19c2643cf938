"""What a council does: found a network's trust, propose a change, sign it, and hand it to the repository.

Rules
- Signing adds a member's signature to the documents that their key counts for. Copies signed apart are merged; a key
  counts once, whatever comes together.
- A change of the council renews the policy's signature in the same proposal, by the new council.
- Whoever signs is shown what `proposals.review` says of it, never what somebody else says of it.
- No file or network here (`files.py`, `repository.py`), and no clock: the time is passed in.
"""

from collections.abc import Iterable, Mapping

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
    publishers: Mapping[str, NodeId] | None = None
    """By role (`models-alice`), all of them, in the order that decides which model has a name that two claim."""
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

    A list comes along, for its publisher to sign, when it is the first one, when another key has it, or when it loses
    entries. A publisher who is removed signs nothing, and one who is away holds up nobody.
    Raises `CharterInvalid` for a base that does not hold, or a change that cannot be.
    """
    root, targets, policy = verify_base(base)
    after = wanted.policy or policy
    refusal = why_policy_cannot_follow(policy, after)
    if refusal is not None:
        raise CharterInvalid(refusal)
    held = tuf.publishers(targets)
    publishers = held if wanted.publishers is None else wanted.publishers
    new_root = _next_root(root, wanted, now_unix_s)
    new_targets = _targets(targets.version + 1, after, publishers, now_unix_s)
    return Proposal(
        base=base,
        root=_text(Metadata(new_root)) if new_root is not None else None,
        targets=_text(Metadata(new_targets)),
        policy=tuf.encode_policy(after).decode(),
        delegated={
            role: _text(Metadata(_list(version, listed, now_unix_s)))
            for role, (version, listed) in _lists_to_sign(base, held, publishers, wanted.withdraw or {}).items()
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
    base: Base, held: Mapping[str, NodeId], publishers: Mapping[str, NodeId], withdrawn: Mapping[str, frozenset[str]]
) -> dict[str, tuple[int, Mapping[str, TargetFile]]]:
    """Role to version and content of the lists that are new, have another key, or lose entries.

    Raises `CharterInvalid` for a path to withdraw that is not listed.
    """
    unknown = withdrawn.keys() - (held.keys() & publishers.keys())
    if unknown:
        raise CharterInvalid(f"nobody publishes {min(unknown)[:60]!r} before and after this")
    found: dict[str, tuple[int, Mapping[str, TargetFile]]] = {}
    for role, key in publishers.items():
        if role not in held:
            found[role] = (base.retired.get(role, 0) + 1, {})
        elif role in withdrawn or key != held[role]:
            old, gone = tuf.read(Targets, base.delegated[role]).signed, withdrawn.get(role, frozenset())
            missing = gone - old.targets.keys()
            if missing:
                raise CharterInvalid(f"{min(missing)} is not listed")
            left = {path: file for path, file in old.targets.items() if path not in gone}
            found[role] = (old.version + tuf.LIST_JUMP, left)
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


def _targets(version: int, policy: FleetPolicy, publishers: Mapping[str, NodeId], now_unix_s: float) -> Targets:
    keys = {role: tuf.public_key(node, tuf.kind_and_name(role)[1]) for role, node in publishers.items()}
    delegations = Delegations(
        keys={key.keyid: key for key in keys.values()},
        roles={
            role: DelegatedRole(role, [key.keyid], 1, terminating=True, paths=[tuf.path_of(role, "*")])
            for role, key in keys.items()
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
        if tuf.publishers(documents.targets.signed)[role] == node:
            found[role] = metadata
    return found


def _with_signatures(proposed: Proposal, documents: Documents) -> Proposal:
    return msgspec.structs.replace(
        proposed,
        root=_text(documents.root) if documents.root is not None else None,
        targets=_text(documents.targets),
        delegated={role: _text(metadata) for role, metadata in documents.delegated.items()},
    )
