"""A publication: new signed documents for the council's repository, and what must be true of them.

Rules
- Everything in it is public and carries its own proof: it may come from anybody, by any way.
- It is verified against what is in force, whole, before anything is done with it. This module reads and writes no file.
- A list's version rises by one; by up to `LIST_JUMP` when the council's word comes with it (a publisher who is being
  replaced may publish meanwhile, and must not stop that).
- A new council (root) must leave no document in force that it did not sign: the policy comes along, signed anew.
"""

from collections.abc import Callable, Mapping

import msgspec
from tuf.api.metadata import Metadata, Root, Snapshot, Targets

from fallow.domain.charter import FleetPolicy
from fallow.domain.errors import CharterInvalid
from fallow.policy.council import why_no_quorum, why_policy_cannot_follow
from fallow.trust.council import tuf_format as tuf

PUBLICATION_MAX_BYTES = 64 * 1024 * 1024
FILES_MAX = 1024

HasFile = Callable[[str], bool]


class Publication(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is new. In MessagePack when it travels."""

    root: bytes | None = None
    targets: bytes | None = None
    policy: bytes | None = None
    """Given whenever `targets` is."""
    delegated: dict[str, bytes] = {}
    """Role to its new metadata."""
    files: dict[str, bytes] = {}
    """Target path (`models/<digest>.json`) to content, of targets that the repository does not have yet."""


class InForce(msgspec.Struct, frozen=True, kw_only=True):
    """What a repository says, parsed and as bytes."""

    root: Metadata[Root]
    root_bytes: bytes
    targets: Metadata[Targets]
    targets_bytes: bytes
    delegated: Mapping[str, tuple[Metadata[Targets], bytes]]
    snapshot: Metadata[Snapshot]
    policy: FleetPolicy
    policy_bytes: bytes

    def targets_by_role(self) -> dict[str, tuple[Metadata[Targets], bytes]]:
        """Everything that a snapshot lists."""
        return {Targets.type: (self.targets, self.targets_bytes), **self.delegated}


class Verified(msgspec.Struct, frozen=True):
    """What will be in force (with the snapshot of before), and the target files to write, under their stored names."""

    state: InForce
    files: Mapping[str, bytes]


def decode_publication(data: bytes) -> Publication:
    """Raises `CharterInvalid`."""
    if len(data) > PUBLICATION_MAX_BYTES:
        raise CharterInvalid(f"expected a publication of up to {PUBLICATION_MAX_BYTES} bytes, got {len(data)}")
    try:
        return msgspec.msgpack.decode(data, type=Publication)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CharterInvalid(f"expected a publication, got what cannot be read: {error}") from None


def verify(publication: Publication, before: InForce | None, has_file: HasFile, now_unix_s: float) -> Verified:
    """What a publication makes of what is in force. Raises `CharterInvalid`, saying what is wrong.

    `has_file` tells whether the repository holds a target file of a stored name already.
    """
    if len(publication.files) > FILES_MAX:
        raise CharterInvalid(f"expected up to {FILES_MAX} files at once, got {len(publication.files)}")
    root, root_bytes = _root(publication, before)
    targets, targets_bytes, policy, policy_bytes = _targets(publication, before, root.signed)
    delegated = _delegated(publication, before, targets.signed)
    fresh: dict[str, Root | Targets] = {role: each.signed for role, (each, _) in delegated.items()}
    fresh = {role: each for role, each in fresh.items() if role in publication.delegated}
    fresh |= {Root.type: root.signed} if publication.root is not None else {}
    fresh |= {Targets.type: targets.signed} if publication.targets is not None else {}
    for name, signed in fresh.items():
        if tuf.is_expired(signed, now_unix_s + tuf.LIFE_MIN_S):
            raise CharterInvalid(
                f"the new {name} metadata expires on {signed.expires:%Y-%m-%d}, and what is published must live for "
                f"{tuf.LIFE_MIN_S / 86_400:g} days or more: propose it anew"
            )
    files = {f"{tuf.sha256(policy_bytes)}.{tuf.POLICY}": policy_bytes}
    for role, (metadata, _) in delegated.items():
        files |= _files_of(role, metadata.signed, publication.files, has_file)
    state = InForce(
        root=root,
        root_bytes=root_bytes,
        targets=targets,
        targets_bytes=targets_bytes,
        delegated=delegated,
        snapshot=before.snapshot if before is not None else Metadata(Snapshot()),
        policy=policy,
        policy_bytes=policy_bytes,
    )
    return Verified(state, files)


def _root(publication: Publication, before: InForce | None) -> tuple[Metadata[Root], bytes]:
    if publication.root is None or (before is not None and publication.root == before.root_bytes):
        if before is None:
            raise CharterInvalid("the first publication needs a root")
        return before.root, before.root_bytes
    new = tuf.read(Root, publication.root, tuf.ROOT_MAX_BYTES)
    expected = before.root.signed.version + 1 if before is not None else 1
    if new.signed.version != expected:
        raise CharterInvalid(f"expected version {expected} of the root, got {new.signed.version}")
    tuf.check_root(new.signed)
    council = new.signed.roles[Root.type]
    refusal = why_no_quorum(len(council.keyids), council.threshold)
    if refusal is not None:
        raise CharterInvalid(f"a council that cannot be: {refusal}")
    if before is not None:
        tuf.verify_by(before.root.signed, Root.type, new)
    tuf.verify_by(new.signed, Root.type, new)
    return new, publication.root


def _targets(
    publication: Publication, before: InForce | None, root: Root
) -> tuple[Metadata[Targets], bytes, FleetPolicy, bytes]:
    if publication.targets is None or (before is not None and publication.targets == before.targets_bytes):
        if before is None:
            raise CharterInvalid("the first publication needs a policy")
        tuf.verify_by(root, Targets.type, before.targets)  # under a new council, too
        return before.targets, before.targets_bytes, before.policy, before.policy_bytes
    if publication.policy is None:
        raise CharterInvalid("a publication with new targets needs the policy that they name")
    new = tuf.read(Targets, publication.targets, tuf.TARGETS_MAX_BYTES)
    expected = before.targets.signed.version + 1 if before is not None else 1
    if new.signed.version != expected:
        raise CharterInvalid(f"expected version {expected} of the targets, got {new.signed.version}")
    tuf.check_targets(new.signed)
    tuf.verify_by(root, Targets.type, new)
    named = new.signed.targets[tuf.POLICY]
    if named.length != len(publication.policy) or named.hashes != {"sha256": tuf.sha256(publication.policy)}:
        raise CharterInvalid("the policy is not the one that was signed")
    policy = tuf.decode_policy(publication.policy)
    refusal = why_policy_cannot_follow(before.policy if before is not None else None, policy)
    if refusal is not None:
        raise CharterInvalid(refusal)
    return new, publication.targets, policy, publication.policy


def _delegated(
    publication: Publication, before: InForce | None, targets: Targets
) -> dict[str, tuple[Metadata[Targets], bytes]]:
    roles = tuf.delegated_roles(targets)
    decided = before is not None and publication.targets not in {None, before.targets_bytes}
    for role in publication.delegated:
        if role not in roles:
            raise CharterInvalid(f"the council delegated nothing to {role[:40]!r}")
    found: dict[str, tuple[Metadata[Targets], bytes]] = {}
    for role in roles:
        old = before.delegated.get(role) if before is not None else None
        data = publication.delegated.get(role)
        if data is not None and (old is None or data != old[1]):
            step = tuf.LIST_JUMP if decided and old is not None else 1
            found[role] = (_read_list(role, data, old[0].signed.version if old is not None else 0, step), data)
        elif old is not None:
            found[role] = old
        else:
            raise CharterInvalid(f"the list of {role} is missing: its publisher signs a first one, which may be empty")
        tuf.verify_by(targets, role, found[role][0])
    if before is not None and not before.delegated.keys() <= found.keys():
        raise CharterInvalid("a delegation cannot be taken back, only given to another publisher")
    return found


def _read_list(role: str, data: bytes, version_before: int, step_max: int) -> Metadata[Targets]:
    metadata = tuf.read(Targets, data, tuf.TARGETS_MAX_BYTES)
    if not 1 <= metadata.signed.version - version_before <= step_max:
        raise CharterInvalid(
            f"expected version {version_before + 1} of {role}, or up to {step_max} above {version_before}, "
            f"got {metadata.signed.version}"
        )
    if metadata.signed.delegations is not None:
        raise CharterInvalid(f"the publisher of {role} may delegate nothing further")
    for path, target in metadata.signed.targets.items():
        refusal = tuf.why_not_listed(role, path, target)
        if refusal is not None:
            raise CharterInvalid(f"the publisher of {role} may not sign this: {refusal}")
    return metadata


def _files_of(role: str, targets: Targets, files: Mapping[str, bytes], has_file: HasFile) -> dict[str, bytes]:
    """The files that a list names, of those that came; each listed one must have come or be there."""
    found: dict[str, bytes] = {}
    for path, target in targets.targets.items():
        stored = target.get_prefixed_paths()[0]
        data = files.get(path)
        if data is not None:
            if len(data) > tuf.FILE_MAX_BYTES or len(data) != target.length:
                raise CharterInvalid(f"{path} has {len(data)} bytes, and not the {target.length} that were signed")
            if target.hashes != {"sha256": tuf.sha256(data)}:
                raise CharterInvalid(f"{path} is not the file that was signed in {role}")
            found[stored] = data
        elif not has_file(stored):
            raise CharterInvalid(f"{path} is signed in {role}, but its file did not come")
    return found
