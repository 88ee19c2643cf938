"""The council's documents in TUF's format: which roles there are, what each may say, and how they are read and signed.

Rules
- Keys are Ed25519 and nothing else. In one role a public key counts once, whatever names (key ids) it goes by: TUF
  counts key ids, so a key with two ids would count twice.
- `root` and `targets` are the council's, with the same keys and threshold. `snapshot` and `timestamp` are the
  registrar's. `models` and `releases` are delegated to publishers, for fixed paths; nothing else is delegated, and they
  delegate nothing.
- The top role has one target, `policy.json`. It is never looked up in a delegated role.
- What is signed is TUF's canonical JSON, which begins with `{`; envelopes begin with `DSSEv1`. Neither is the other.
- No cryptography here: python-tuf and securesystemslib sign and verify.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner, Key, SSlibKey
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import DelegatedRole, Metadata, Role, Root, Signed, Snapshot, TargetFile, Targets, Timestamp

from fallow.domain.charter import FleetPolicy
from fallow.domain.errors import CharterInvalid, SignatureInvalid
from fallow.domain.ids import Digest, NodeId
from fallow.trust import keys
from fallow.trust.keys import Identity

ROOT_LIFE_S = 90 * 24 * 3600.0
"""Of root and policy: so long a device that a captured registrar keeps in the dark can be shown what is old."""
LIST_LIFE_S = 365 * 24 * 3600.0
"""Of a publisher's list, unless it is signed again before."""
LIFE_MIN_S = 7 * 24 * 3600.0
"""What is published lives at least so long: nothing is put in force to run out before anybody looks."""
LIST_JUMP = 1 << 32
"""By how much the council's proposal raises a list's version: no publisher can overtake it while members sign."""
SNAPSHOT_LIFE_S = 30 * 24 * 3600.0
"""The registrar renews it by itself when half of it is gone."""

ROOT_MAX_BYTES = 256 * 1024
TIMESTAMP_MAX_BYTES = 16 * 1024
SNAPSHOT_MAX_BYTES = 64 * 1024
TARGETS_MAX_BYTES = 4 * 1024 * 1024
POLICY_MAX_BYTES = 1024 * 1024
FILE_MAX_BYTES = 32 * 1024 * 1024
"""Of a manifest or a release's description."""
ROOT_ROTATIONS_MAX = 64
"""A device follows so many new councils in one check, and the rest in the next one."""
DELEGATIONS_MAX = 4

POLICY = "policy.json"
MODELS = "models"
RELEASES = "releases"
PATHS: Mapping[str, str] = {MODELS: "models/*.json", RELEASES: "releases/*.json"}
"""Delegated roles and the only paths that each may sign."""
NAME_FIELD = "x-fallow-name"
"""In a key of the root: whose it is, for people."""
NAME_MAX_CHARS = 64

_MODEL_PATH = re.compile(r"models/([0-9a-f]{64})\.json")
_RELEASE_PATH = re.compile(r"releases/([0-9A-Za-z][0-9A-Za-z.+!_-]{0,63})\.json")

S = TypeVar("S", Root, Targets, Snapshot, Timestamp)


# --- keys -----------------------------------------------------------------------------------------


def public_key(node: NodeId, name: str = "") -> SSlibKey:
    """A key as TUF writes it. Raises `CharterInvalid` when it is none."""
    try:
        key = SSlibKey.from_crypto(keys.public_key(node))
    except SignatureInvalid as error:
        raise CharterInvalid(str(error)) from None
    if name:
        key.unrecognized_fields[NAME_FIELD] = name[:NAME_MAX_CHARS]
    return key


def signer_of(identity: Identity) -> CryptoSigner:
    return CryptoSigner(Ed25519PrivateKey.from_private_bytes(identity.seed), public_key(identity.node))


def node_of(key: Key) -> NodeId:
    """Whose key it is. Raises `CharterInvalid` for any but an Ed25519 key."""
    public = key.keyval.get("public")
    if key.keytype != "ed25519" or key.scheme != "ed25519" or not isinstance(public, str):
        raise CharterInvalid(f"expected Ed25519 keys only, got {key.keytype[:40]!r}/{key.scheme[:40]!r}")
    try:
        raw = bytes.fromhex(public)
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise CharterInvalid(f"expected a public key of 64 hex digits, got {public[:80]!r}")
    return NodeId(raw.hex())


def name_of(key: Key) -> str:
    """For people: whoever made the key chose it, so it proves nothing, and it prints on one line."""
    name = key.unrecognized_fields.get(NAME_FIELD, "")
    return "".join(each for each in name[:NAME_MAX_CHARS] if each.isprintable()) if isinstance(name, str) else ""


def holders(role: Role, keys: Mapping[str, Key], name: str) -> dict[str, NodeId]:
    """Key id to public key of a role. Raises `CharterInvalid` when one key would count twice, or one is missing."""
    found: dict[str, NodeId] = {}
    for keyid in role.keyids:
        key = keys.get(keyid) if isinstance(keyid, str) else None  # python-tuf takes anything for an id
        if key is None:
            raise CharterInvalid(f"the role {name} names a key {str(keyid)[:16]!r} that is not there")
        node = node_of(key)
        if node in found.values():
            raise CharterInvalid(f"the role {name} counts the key {node[:16]} twice, under two ids")
        found[keyid] = node
    if not 1 <= role.threshold <= len(found):
        raise CharterInvalid(f"the role {name} asks for {role.threshold} signatures of {len(found)} keys")
    return found


def council_of(root: Root) -> dict[str, NodeId]:
    """Key id to public key of the members. Raises `CharterInvalid`."""
    return holders(root.roles[Root.type], root.keys, Root.type)


def member_names(root: Root) -> dict[NodeId, str]:
    return {node: name_of(root.keys[keyid]) for keyid, node in council_of(root).items()}


# --- reading --------------------------------------------------------------------------------------


def read(type_: type[S], data: bytes | str, max_bytes: int = TARGETS_MAX_BYTES) -> Metadata[S]:
    """Metadata of that kind, nothing verified yet. Raises `CharterInvalid`."""
    raw = data.encode() if isinstance(data, str) else data
    if len(raw) > max_bytes:
        raise CharterInvalid(f"expected {type_.type} metadata of up to {max_bytes} bytes, got {len(raw)}")
    try:
        metadata: Metadata[S] = Metadata.from_bytes(raw)
    except RepositoryError as error:
        raise CharterInvalid(f"expected {type_.type} metadata, got what cannot be read: {error.__cause__}") from None
    if not isinstance(metadata.signed, type_):
        raise CharterInvalid(f"expected {type_.type} metadata, got {metadata.signed.type}")
    return metadata


def verify_by(delegator: Root | Targets, role: str, metadata: Metadata[S]) -> None:
    """Raises `CharterInvalid` unless the role's threshold of keys signed it."""
    try:
        result = delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError) as error:
        raise CharterInvalid(f"the {role} metadata cannot be verified: {error}") from None
    if not result:
        raise CharterInvalid(
            f"the {role} metadata has {len(result.signed)} valid signatures of the {result.threshold} that it needs"
        )


def check_root(root: Root) -> None:
    """Raises `CharterInvalid` for a root that no Fallow network has, however well it is signed."""
    council = council_of(root)
    targets = holders(root.roles[Targets.type], root.keys, Targets.type)
    if set(targets.values()) != set(council.values()):
        raise CharterInvalid("root and targets are not signed by the same council")
    if root.roles[Targets.type].threshold != root.roles[Root.type].threshold:
        raise CharterInvalid("root and targets do not need the same number of signatures")
    for online in (Snapshot.type, Timestamp.type):
        if set(holders(root.roles[online], root.keys, online).values()) & set(council.values()):
            raise CharterInvalid(f"a council member's key is also the registrar's key for {online}")
    if not root.consistent_snapshot:
        raise CharterInvalid("expected consistent snapshots")


def check_targets(targets: Targets) -> None:
    """Raises `CharterInvalid` unless the top role says policy and the delegations that there are, and no more."""
    if set(targets.targets) != {POLICY}:
        raise CharterInvalid(f"expected the one target {POLICY}, got {sorted(targets.targets)[:4]}")
    if targets.targets[POLICY].length > POLICY_MAX_BYTES:
        raise CharterInvalid(f"expected a policy of up to {POLICY_MAX_BYTES} bytes")
    for role in delegated_roles(targets).values():
        if role.name not in PATHS or role.paths != [PATHS[role.name]]:
            raise CharterInvalid(
                f"expected delegations of {', '.join(PATHS)} only, got {role.name[:40]!r}: {role.paths}"
            )
        assert targets.delegations is not None
        holders(role, targets.delegations.keys, role.name)


def delegated_roles(targets: Targets) -> dict[str, DelegatedRole]:
    """By name. Raises `CharterInvalid` when they are delegated in a way that Fallow does not use."""
    if targets.delegations is None:
        return {}
    if targets.delegations.roles is None:
        raise CharterInvalid("expected delegations by name, got hashed bins")
    return targets.delegations.roles


def publishers(targets: Targets, role: str) -> dict[str, NodeId]:
    """Key id to public key of a delegated role's holders; empty when nobody holds it."""
    found = delegated_roles(targets).get(role)
    if found is None or targets.delegations is None:
        return {}
    return holders(found, targets.delegations.keys, role)


def publisher_names(targets: Targets, role: str) -> dict[NodeId, str]:
    """Who holds a delegated role, with the names that people gave them."""
    if targets.delegations is None:
        return {}
    return {node: name_of(targets.delegations.keys[keyid]) for keyid, node in publishers(targets, role).items()}


def signed_models(targets: Mapping[str, TargetFile]) -> frozenset[Digest]:
    """Models that a publisher's list names under their own digest. Whatever else it lists is not there for us."""
    found = ((_MODEL_PATH.fullmatch(path), target) for path, target in targets.items())
    return frozenset(Digest(path[1]) for path, target in found if path and target.hashes.get("sha256") == path[1])


def signed_releases(targets: Mapping[str, TargetFile]) -> frozenset[str]:
    return frozenset(path[1] for path in map(_RELEASE_PATH.fullmatch, targets) if path)


def why_not_listed(role: str, path: str, target: TargetFile) -> str | None:
    """Why a delegated role may not list this; `None` when it may."""
    if role == MODELS:
        match = _MODEL_PATH.fullmatch(path)
        if match is None:
            return f"{path[:100]!r} is not a model's path"
        return None if target.hashes.get("sha256") == match[1] else f"{path} is listed with another file's digest"
    return None if _RELEASE_PATH.fullmatch(path) else f"{path[:100]!r} is not a release's path"


# --- policy ---------------------------------------------------------------------------------------


def encode_policy(policy: FleetPolicy) -> bytes:
    return msgspec.json.format(msgspec.json.encode(policy), indent=1) + b"\n"


def decode_policy(data: bytes) -> FleetPolicy:
    """Raises `CharterInvalid`."""
    if len(data) > POLICY_MAX_BYTES:
        raise CharterInvalid(f"expected a policy of up to {POLICY_MAX_BYTES} bytes, got {len(data)}")
    try:
        return msgspec.json.decode(data, type=FleetPolicy)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CharterInvalid(
            f"a policy that this version of Fallow cannot read ({error}): a newer Fallow may be needed"
        ) from None


# --- small things ---------------------------------------------------------------------------------


def utc(unix_s: float) -> datetime:
    """Raises `CharterInvalid` for a time that no calendar has."""
    try:
        return datetime.fromtimestamp(unix_s, UTC)
    except (ValueError, OverflowError, OSError):
        raise CharterInvalid(f"expected a time, got {unix_s!r}") from None


def sha256(data: bytes) -> Digest:
    return Digest(hashlib.sha256(data).hexdigest())


def sign(metadata: Metadata[S], identities: Iterable[Identity]) -> Metadata[S]:
    """Add signatures, in place; one that is there already is made again."""
    for identity in identities:
        metadata.sign(signer_of(identity), append=True)
    return metadata


def signed_alike(one: Metadata[S], other: Metadata[S]) -> bool:
    """Whether two documents say the same, whoever signed them."""
    return one.signed_bytes == other.signed_bytes


def is_expired(signed: Signed, now_unix_s: float) -> bool:
    return signed.is_expired(utc(now_unix_s))
