"""A proposal of a council: what it is, whether it holds together, what it changes, and who must sign it.

Rules
- A proposal is one file. It holds the new documents, with the signatures that they have so far, and what they were
  built on, so that a member can check and sign it on a machine without any network.
- What a member is shown comes from the documents that they sign, compared with a base that is verified from the
  network's first root on. A proposal brings no description of its own that could lie.
- No file, no network, no clock, and nothing is signed here (`ceremonies.py`).
"""

from collections.abc import Iterable, Mapping

import msgspec
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from fallow.domain.charter import FleetPolicy
from fallow.domain.errors import CharterInvalid
from fallow.policy.council import Change, member_changes, policy_changes, why_policy_cannot_follow
from fallow.trust.council import tuf_format as tuf

PROPOSAL_FORMAT = 1
PROPOSAL_MAX_BYTES = 192 * 1024 * 1024
"""All publishers' lists, as large as they may be, fit into one: nobody can bloat theirs to hold up their removal."""
ROOTS_MAX = 4096


class Base(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is in force, as signed texts: what a proposal was built on."""

    roots: tuple[str, ...]
    """Every root since the first."""
    targets: str
    policy: str
    delegated: dict[str, str] = {}
    """By publisher's role."""
    retired: dict[str, int] = {}
    """The last versions of lists whose publishers were removed. Not signed: a lie in it only makes the repository
    refuse a publisher who comes back."""


class Proposal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One change, with the signatures that it has so far. JSON."""

    format: int = PROPOSAL_FORMAT
    base: Base | None
    """`None` founds a network."""
    root: str | None = None
    targets: str
    policy: str
    delegated: dict[str, str] = {}
    """Lists that need their publisher's signature together with this change: the empty first ones of new publishers,
    and those that changed hands or lose entries. They list what they did before, or less."""


class Need(msgspec.Struct, frozen=True):
    """The signatures that a document of a proposal needs."""

    document: str
    needed: int
    signed: tuple[str, ...]
    """Names of those who did."""
    may_sign: tuple[str, ...]
    """Names of those who could still."""

    @property
    def is_met(self) -> bool:
        return len(self.signed) >= self.needed


class Review(msgspec.Struct, frozen=True):
    """A proposal, verified and explained."""

    changes: tuple[Change, ...]
    needs: tuple[Need, ...]
    policy: FleetPolicy
    founds: str
    """SHA-256 of the network's first root."""

    @property
    def is_complete(self) -> bool:
        return all(need.is_met for need in self.needs)


class Documents(msgspec.Struct, frozen=True):
    """A proposal, parsed."""

    root_before: Root | None
    root: Metadata[Root] | None
    targets: Metadata[Targets]
    targets_before: Targets | None
    delegated: Mapping[str, Metadata[Targets]]
    delegated_before: Mapping[str, Targets]

    @property
    def root_after(self) -> Root:
        root = self.root.signed if self.root is not None else self.root_before
        assert root is not None
        return root


# --- reviewing ------------------------------------------------------------------------------------


def verify_base(base: Base) -> tuple[Root, Targets, FleetPolicy]:
    """What a base says is in force, its signatures verified from the first root on. Raises `CharterInvalid`.

    Expiry is not looked at: an expired council may and must still propose.
    """
    if not 1 <= len(base.roots) <= ROOTS_MAX:
        raise CharterInvalid("a base without the network's roots")
    trusted: Root | None = None
    for version, text in enumerate(base.roots, start=1):
        root = tuf.read(Root, text, tuf.ROOT_MAX_BYTES)
        if root.signed.version != version:
            raise CharterInvalid(f"expected root {version}, got {root.signed.version}")
        tuf.check_root(root.signed)
        tuf.verify_by(trusted or root.signed, Root.type, root)
        tuf.verify_by(root.signed, Root.type, root)
        trusted = root.signed
    assert trusted is not None
    targets = tuf.read(Targets, base.targets)
    tuf.check_targets(targets.signed)
    tuf.verify_by(trusted, Targets.type, targets)
    if base.delegated.keys() != tuf.delegated_roles(targets.signed).keys():
        raise CharterInvalid("a base without the lists of its publishers")
    for role, text in base.delegated.items():
        tuf.verify_by(targets.signed, role, tuf.read(Targets, text))
    return trusted, targets.signed, _policy_of(targets.signed, base.policy)


def review(proposed: Proposal) -> Review:
    """What a proposal changes, and who must sign. Raises `CharterInvalid` for one that nobody should sign."""
    documents = parsed(proposed)
    before = documents.targets_before
    old_policy = _policy_of(before, proposed.base.policy) if proposed.base is not None and before is not None else None
    policy = _policy_of(documents.targets.signed, proposed.policy)
    refusal = why_policy_cannot_follow(old_policy, policy)
    if refusal is not None:
        raise CharterInvalid(refusal)
    first = proposed.base.roots[0] if proposed.base is not None else proposed.root or ""
    changes = (
        *_root_changes(documents),
        *_publisher_changes(documents),
        *_list_changes(documents),
        *policy_changes(old_policy, policy),
        *_expiry_change("policy must be signed again before", before, documents.targets.signed),
    )
    return Review(changes, _needs(documents), policy, tuf.sha256(first_root_payload(first)))


def first_root_payload(text: str) -> bytes:
    """What the founders sign; its digest is known before anybody signed."""
    return tuf.read(Root, text, tuf.ROOT_MAX_BYTES).signed_bytes


def parsed(proposed: Proposal) -> Documents:
    """Its documents, held against its base. Raises `CharterInvalid`."""
    if proposed.format != PROPOSAL_FORMAT:
        raise CharterInvalid(f"expected a proposal of format {PROPOSAL_FORMAT}, got {proposed.format}: update Fallow")
    root_before, targets_before = None, None
    if proposed.base is not None:
        root_before, targets_before, _ = verify_base(proposed.base)
    elif proposed.root is None:
        raise CharterInvalid("a proposal that founds a network needs a root")
    root = tuf.read(Root, proposed.root, tuf.ROOT_MAX_BYTES) if proposed.root is not None else None
    if root is not None:
        tuf.check_root(root.signed)
        _check_version("root", root.signed.version, root_before.version if root_before else 0)
        earlier = proposed.base.roots if proposed.base is not None else ()
        refusal = tuf.why_no_online_key(root.signed, [tuf.read(Root, text).signed for text in earlier])
        if refusal is not None:
            raise CharterInvalid(refusal)
    targets = tuf.read(Targets, proposed.targets)
    tuf.check_targets(targets.signed)
    _check_version("targets", targets.signed.version, targets_before.version if targets_before else 0)
    delegated = {role: tuf.read(Targets, text) for role, text in proposed.delegated.items()}
    lists = proposed.base.delegated if proposed.base is not None else {}
    retired = proposed.base.retired if proposed.base is not None else {}
    before = {role: tuf.read(Targets, text).signed for role, text in lists.items()}
    for role, metadata in delegated.items():
        if role not in tuf.delegated_roles(targets.signed):
            raise CharterInvalid(f"a list of {role[:60]!r}, which is delegated to nobody")
        _check_list(role, metadata.signed, before.get(role), retired.get(role, 0))
    return Documents(root_before, root, targets, targets_before, delegated, before)


def _check_version(what: str, version: int, before: int) -> None:
    if version != before + 1:
        raise CharterInvalid(f"expected version {before + 1} of the {what}, got {version}: propose it anew")


def _check_list(role: str, proposed: Targets, before: Targets | None, retired_version: int) -> None:
    """A list travels with a proposal to be signed by its publisher: it may lose entries, not gain any.

    Its version is far above the last one: who holds the old key may publish until the new list is in force.
    """
    _check_version(role, proposed.version, before.version - 1 + tuf.LIST_JUMP if before else retired_version)
    listed = before.targets if before is not None else {}
    if proposed.delegations is not None or any(listed.get(path) != file for path, file in proposed.targets.items()):
        raise CharterInvalid(f"the proposal lists in {role} what was not there; that is its publisher's to do")


def _policy_of(targets: Targets, policy: str) -> FleetPolicy:
    data = policy.encode()
    named = targets.targets[tuf.POLICY]
    if named.length != len(data) or named.hashes.get("sha256") != tuf.sha256(data):
        raise CharterInvalid("the policy is not the one that the targets name")
    return tuf.decode_policy(data)


def _root_changes(documents: Documents) -> tuple[Change, ...]:
    if documents.root is None:
        return ()
    old, new = documents.root_before, documents.root.signed
    before = tuf.member_names(old) if old is not None else {}
    changes = member_changes(
        before,
        old.roles[Root.type].threshold if old is not None else 0,
        tuf.member_names(new),
        new.roles[Root.type].threshold,
        "council",
    )
    keys = tuple(
        ", ".join(sorted(tuf.holders(root.roles[role], root.keys, role).values())) if root is not None else ""
        for role in (Timestamp.type, Snapshot.type)
        for root in (old, new)
    )
    if keys[0] != keys[1]:
        changes += (Change("registrar's key for timestamps", keys[0], keys[1]),)
    if keys[2] != keys[3]:
        changes += (Change("registrar's key for snapshots", keys[2], keys[3]),)
    return (*changes, *_expiry_change("council must be signed again before", old, new))


def _expiry_change(what: str, old: Root | Targets | None, new: Root | Targets) -> tuple[Change, ...]:
    days = (f"{old.expires:%Y-%m-%d}" if old is not None else "", f"{new.expires:%Y-%m-%d}")
    return (Change(what, *days),) if days[0] != days[1] else ()


def _publisher_changes(documents: Documents) -> tuple[Change, ...]:
    old = tuf.publishers(documents.targets_before) if documents.targets_before is not None else {}
    new = tuf.publishers(documents.targets.signed)
    changes = [Change(f"publisher removed: {role}", f"key {old[role]}", "") for role in old if role not in new]
    changes += [Change(f"publisher added: {role}", "", f"key {new[role]}") for role in new if role not in old]
    changes += [
        Change(f"publisher's new key: {role}", f"key {old[role]}", f"key {new[role]}")
        for role in new
        if role in old and old[role] != new[role]
    ]
    before, after = ([role for role in each if tuf.kind_and_name(role)[0] == tuf.MODELS] for each in (old, new))
    if after != [role for role in before if role in new] + [role for role in after if role not in old]:
        changes.append(Change("publishers of models, who has a name first", ", ".join(before), ", ".join(after)))
    return tuple(changes)


def _list_changes(documents: Documents) -> tuple[Change, ...]:
    """What is listed no more, and what a new list vouches for: its signer answers for all of that."""
    roles = tuf.delegated_roles(documents.targets.signed)
    found: list[Change] = []
    for role, before in documents.delegated_before.items():
        if role in roles and role not in documents.delegated:
            continue
        stays = documents.delegated[role].signed.targets if role in roles else {}
        for path in sorted(before.targets):
            what = tuf.what_of(role, path)
            after = what if path in stays else ""
            found.append(Change(f"{role}: {'signed anew' if after else 'withdrawn'}", what, after))
    return tuple(found)


def _needs(documents: Documents) -> tuple[Need, ...]:
    found: list[Need] = []
    if documents.root is not None:
        if documents.root_before is not None:
            found.append(_need("the new council, by the old one", documents.root_before, Root.type, documents.root))
        found.append(_need("the new council, by itself", documents.root.signed, Root.type, documents.root))
    found.append(_need("the policy", documents.root_after, Targets.type, documents.targets))
    for role, metadata in documents.delegated.items():
        found.append(_need(f"the list {role}", documents.targets.signed, role, metadata))
    return tuple(found)


def _need(name: str, delegator: Root | Targets, role: str, metadata: Metadata[Root] | Metadata[Targets]) -> Need:
    result = delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures)

    def names(keys: Iterable[str]) -> tuple[str, ...]:
        return tuple(tuf.name_of(delegator.get_key(each)) or each[:16] for each in keys)

    return Need(name, result.threshold, names(result.signed), names(result.unsigned))
