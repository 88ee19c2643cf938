"""A publication: new signed documents for the council's repository, and what must be true of them.

Rules
- Everything in it is public and carries its own proof: it may come from anybody, by any way.
- It is verified against what is in force, whole, before anything is done with it. This module reads and writes no file.
- A list's version rises by one; by up to `LIST_JUMP` when the council's word comes with it (a publisher whose key is
  being replaced may publish meanwhile, and must not stop that).
- An entry that is new in a list comes with its file, and is what Fallow makes of that, figures and all. The council may
  also take an entry up again whose file is still here: who holds the old key may take entries off meanwhile.
- A list is what python-tuf writes of it, byte for byte, and holds no field that Fallow does not use: what is read here
  is read alike by everybody, and a list is as long when it is signed again.
- A publisher whom the council removes is gone with their list, without their help. What stays is the list's last
  version, which the snapshot goes on naming (devices take one that vanished for an attack); the same name given again
  goes on above it. A new online key lets go of them, since what the old one signed counts no more.
- A new council (root) must leave no document in force that it did not sign: the policy comes along, signed anew.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping

import msgspec
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets

from fallow.domain.charter import FleetPolicy
from fallow.domain.errors import CharterInvalid
from fallow.domain.ids import NodeId
from fallow.policy.council import why_no_quorum, why_policy_cannot_follow
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.figures import signed_figures, target_of

PUBLICATION_MAX_BYTES = 64 * 1024 * 1024
FILES_MAX = 1024

StoredFile = Callable[[str], Callable[[], bytes] | None]
"""From the stored name of a target file to how to read it; `None` when the repository has none of that name."""


class Publication(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is new. In MessagePack when it travels."""

    root: bytes | None = None
    targets: bytes | None = None
    policy: bytes | None = None
    """Given whenever `targets` is."""
    delegated: dict[str, bytes] = {}
    """Role to its new metadata."""
    files: dict[str, bytes] = {}
    """Target path (`models/<name>/<digest>.json`) to content, of entries that are new in their list."""


class InForce(msgspec.Struct, frozen=True, kw_only=True):
    """What a repository says, parsed and as bytes."""

    root: Metadata[Root]
    root_bytes: bytes
    targets: Metadata[Targets]
    targets_bytes: bytes
    delegated: Mapping[str, tuple[Metadata[Targets], bytes]]
    retired: Mapping[str, MetaFile]
    """The last lists of publishers who were removed."""
    snapshot: Metadata[Snapshot]
    policy: FleetPolicy
    policy_bytes: bytes

    def targets_by_role(self) -> dict[str, tuple[Metadata[Targets], bytes]]:
        """Everything that is delegated, and what delegates it."""
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


def verify(publication: Publication, before: InForce | None, stored: StoredFile, now_unix_s: float) -> Verified:
    """What a publication makes of what is in force. Raises `CharterInvalid`, saying what is wrong."""
    if len(publication.files) > FILES_MAX:
        raise CharterInvalid(f"expected up to {FILES_MAX} files at once, got {len(publication.files)}")
    root, root_bytes = _root(publication, before)
    targets, targets_bytes, policy, policy_bytes = _targets(publication, before, root.signed)
    delegated, retired = _delegated(publication, before, targets.signed)
    if before is not None and _snapshot_keys(root).isdisjoint(_snapshot_keys(before.root)):
        retired = {}
    if len(delegated) + len(retired) > tuf.LISTS_KEPT_MAX:
        raise CharterInvalid(
            f"expected up to {tuf.LISTS_KEPT_MAX} publishers, those who were removed included: let the council give "
            "the registrar another online key, and the old lists are forgotten"
        )
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
    decided = _decided(publication, before)
    for role, (metadata, _) in delegated.items():
        old = before.delegated.get(role) if before is not None else None
        listed = old[0].signed.targets if old is not None else {}
        files |= _files_of(role, metadata.signed, listed, publication.files, stored, decided)
    state = InForce(
        root=root,
        root_bytes=root_bytes,
        targets=targets,
        targets_bytes=targets_bytes,
        delegated=delegated,
        retired=retired,
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
) -> tuple[dict[str, tuple[Metadata[Targets], bytes]], dict[str, MetaFile]]:
    """The lists that will be in force, and the last ones of those whom the council delegates nothing any more."""
    roles = tuf.delegated_roles(targets)
    decided = _decided(publication, before)
    for role in publication.delegated:
        if role not in roles:
            raise CharterInvalid(f"the council delegated nothing to {role[:60]!r}")
    held = before.delegated if before is not None else {}
    gone = before.retired if before is not None else {}
    found: dict[str, tuple[Metadata[Targets], bytes]] = {}
    for role in roles:
        old, data = held.get(role), publication.delegated.get(role)
        if data is not None and (old is None or data != old[1]):
            version = old[0].signed.version if old is not None else gone[role].version if role in gone else 0
            step = tuf.LIST_JUMP if decided and old is not None else 1
            found[role] = (_read_list(role, data, version, step), data)
            if not decided:
                _check_alone(role, found[role][0].signed, old[0].signed.targets if old is not None else {}, len(data))
        elif old is not None:
            found[role] = old
        else:
            raise CharterInvalid(f"the list of {role} is missing: its publisher signs a first one, which may be empty")
        tuf.verify_by(targets, role, found[role][0])
    last = {role: MetaFile(metadata.signed.version) for role, (metadata, _) in held.items()}
    return found, {role: meta for role, meta in {**gone, **last}.items() if role not in roles}


def _decided(publication: Publication, before: InForce | None) -> bool:
    """Whether the council's word on what there is comes with it."""
    return before is not None and publication.targets not in {None, before.targets_bytes}


def _snapshot_keys(root: Metadata[Root]) -> set[NodeId]:
    return {*tuf.holders(root.signed.roles[Snapshot.type], root.signed.keys, Snapshot.type).values()}


def _read_list(role: str, data: bytes, version_before: int, step_max: int) -> Metadata[Targets]:
    metadata = tuf.read(Targets, data, tuf.TARGETS_MAX_BYTES)
    if not 1 <= metadata.signed.version - version_before <= step_max:
        raise CharterInvalid(
            f"expected version {version_before + 1} of {role}, or up to {step_max} above {version_before}, "
            f"got {metadata.signed.version}"
        )
    if metadata.signed.delegations is not None:
        raise CharterInvalid(f"the publisher {role} may delegate nothing further")
    _check_form(role, metadata, data)
    for path, target in metadata.signed.targets.items():
        refusal = tuf.why_not_listed(role, path, target)
        if refusal is not None:
            raise CharterInvalid(f"the publisher {role} may not sign this: {refusal}")
    return metadata


def _check_alone(role: str, listed: Targets, before: Mapping[str, TargetFile], size_bytes: int) -> None:
    """What a publisher may do without the council: leave room for the list to be signed anew, and give a model a name
    that none of the others has. Raises `CharterInvalid`."""
    if size_bytes > tuf.TARGETS_MAX_BYTES - tuf.LIST_ROOM_BYTES:
        raise CharterInvalid(f"the list {role} is too long to be signed anew: {size_bytes} bytes")
    figures = {path: signed_figures(target) for path, target in listed.targets.items()}
    named = Counter(each.name for each in figures.values() if each is not None)
    for path, each in figures.items():
        if each is not None and named[each.name] > 1 and before.get(path) != listed.targets[path]:
            raise CharterInvalid(f"{path} has the name of another model on {role}: withdraw that one with it")


def _check_form(role: str, metadata: Metadata[Targets], data: bytes) -> None:
    """Raises `CharterInvalid` unless every field is one that Fallow uses, written as python-tuf writes it."""
    signed, targets = metadata.signed, metadata.signed.targets.values()
    unknown = [metadata.unrecognized_fields, signed.unrecognized_fields]
    unknown += [signature.unrecognized_fields for signature in metadata.signatures.values()]
    unknown += [
        {name: each for name, each in target.unrecognized_fields.items() if name != "custom"} for target in targets
    ]
    if any(unknown) or any(target.hashes.keys() != {"sha256"} for target in targets):
        raise CharterInvalid(f"the list {role} has fields that Fallow does not use")
    if data != metadata.to_bytes():
        raise CharterInvalid(f"the list {role} is not in the form that it is signed in: sign it with `fallow`")


def _files_of(
    role: str,
    targets: Targets,
    before: Mapping[str, TargetFile],
    files: Mapping[str, bytes],
    stored: StoredFile,
    decided: bool,
) -> dict[str, bytes]:
    """The files that a list names, of those that came, checked. Of an entry that was not in the list `before` the file
    came; or it is here, when the council `decided` that the entry stays."""
    found: dict[str, bytes] = {}
    for path, target in targets.targets.items():
        name = target.get_prefixed_paths()[0]
        data, kept = files.get(path), stored(name)
        if data is not None:
            _check_file(role, path, target, data)
            found[name] = data
        elif kept is None or (before.get(path) != target and not decided):
            raise CharterInvalid(f"{path} is signed in {role}, but its file did not come")
        elif before.get(path) != target:
            _check_file(role, path, target, kept())
    return found


def _written(target: TargetFile) -> str:
    """An entry as it is written: `1` and `true`, which are equal in Python, are not."""
    return json.dumps(target.to_dict(), sort_keys=True)


def _check_file(role: str, path: str, target: TargetFile, data: bytes) -> None:
    if len(data) > tuf.FILE_MAX_BYTES or len(data) != target.length:
        raise CharterInvalid(f"{path} has {len(data)} bytes, and not the {target.length} that were signed")
    if target.hashes != {"sha256": tuf.sha256(data)}:
        raise CharterInvalid(f"{path} is not the file that was signed in {role}")
    if _written(target) != _written(target_of(path, data)):
        raise CharterInvalid(f"{path} is signed in {role} with other figures than its manifest has")
