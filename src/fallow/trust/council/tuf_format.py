"""The council's documents in TUF's format: which roles there are, what each may say, and how they are read and signed.

Rules
- Keys are Ed25519 and nothing else. In one role a public key counts once, whatever names (key ids) it goes by: TUF
  counts key ids, so a key with two ids would count twice.
- `root` and `targets` are the council's, with the same keys and threshold. `snapshot` and `timestamp` are the
  registrar's.
- Each publisher has a role of its own, `models-NAME` or `releases-NAME`: one key, one list, and paths that no other
  role may sign (`models/NAME/*.json`). Nothing else is delegated, and publishers delegate nothing.
- The top role has one target, `policy.json`. It is never looked up in a delegated role.
- What is signed is TUF's canonical JSON, which begins with `{`; envelopes begin with `DSSEv1`. Neither is the other.
- No cryptography here: python-tuf and securesystemslib sign and verify.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
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
from fallow.policy.council import PUBLISHERS_MAX, why_no_publisher_name
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
TARGETS_MAX_BYTES = 1024 * 1024
"""Of a publisher's list, too: some 1,000 models."""
LIST_ROOM_BYTES = 4096
"""A publisher leaves so much of that: a list stays short enough to be signed anew by who replaces them."""
NESTING_MAX = 32
"""Of brackets in a document. Whether Python can read deeper ones depends on who asks, so nobody may write them."""
POLICY_MAX_BYTES = 1024 * 1024
FILE_MAX_BYTES = 32 * 1024 * 1024
"""Of a manifest or a release's description."""
ROOT_ROTATIONS_MAX = 64
"""A device follows so many new councils in one check, and the rest in the next one."""
DELEGATIONS_MAX = 1
"""For one path: the council delegates to a publisher, and what a publisher may delegate is never fetched."""
LISTS_KEPT_MAX = 256
"""A snapshot names every list that there is and was, because to a device one that vanished is an attack."""

POLICY = "policy.json"
MODELS = "models"
RELEASES = "releases"
KINDS = (MODELS, RELEASES)
"""Of what publishers publish."""
NAME_FIELD = "x-fallow-name"
"""In a key of the root: whose it is, for people."""
NAME_MAX_CHARS = 64

_WHAT = {MODELS: re.compile(r"[0-9a-f]{64}"), RELEASES: re.compile(r"[0-9A-Za-z][0-9A-Za-z.+!_-]{0,63}")}
"""What a list of each kind may name: digests of manifests, versions of Fallow."""
_NEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[][{}]', re.DOTALL)
"""A text (to the end, when it has none), or a bracket."""
_PROBES = {MODELS: "0" * 64, RELEASES: "0"}

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


def online_keys(root: Root) -> set[NodeId]:
    """The registrar's keys, for snapshot and timestamp. Raises `CharterInvalid`."""
    roles = (Snapshot.type, Timestamp.type)
    return {node for role in roles for node in holders(root.roles[role], root.keys, role).values()}


def why_no_online_key(root: Root, earlier: Sequence[Root]) -> str | None:
    """Why a root that follows the `earlier` ones, oldest first, may not name its online keys; `None` when it may.

    A key that comes back brings back what it signed before, and versions of which devices saw higher ones since.
    """
    new = online_keys(root) - online_keys(earlier[-1]) if earlier else set()
    again = {node for each in earlier if new for node in new & online_keys(each)}
    return (
        f"the registrar's key {min(again)} was in use before, and does not come back: make another" if again else None
    )


def member_names(root: Root) -> dict[NodeId, str]:
    return {node: name_of(root.keys[keyid]) for keyid, node in council_of(root).items()}


# --- reading --------------------------------------------------------------------------------------


def read(type_: type[S], data: bytes | str, max_bytes: int = TARGETS_MAX_BYTES) -> Metadata[S]:
    """Metadata of that kind, nothing verified yet. Raises `CharterInvalid`."""
    raw = data.encode() if isinstance(data, str) else data
    if len(raw) > max_bytes:
        raise CharterInvalid(f"expected {type_.type} metadata of up to {max_bytes} bytes, got {len(raw)}")
    _check_nesting(raw)
    try:
        metadata: Metadata[S] = Metadata.from_bytes(raw)
    except RepositoryError as error:
        raise CharterInvalid(f"expected {type_.type} metadata, got what cannot be read: {error.__cause__}") from None
    if not isinstance(metadata.signed, type_):
        raise CharterInvalid(f"expected {type_.type} metadata, got {metadata.signed.type}")
    return metadata


def _check_nesting(raw: bytes) -> None:
    """Raises `CharterInvalid` beyond `NESTING_MAX`, in one pass over the bytes."""
    depth = 0
    for match in _NEXT.finditer(raw):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(match[0], 0)
        if depth > NESTING_MAX:
            raise CharterInvalid(f"expected brackets nested up to {NESTING_MAX} deep")


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
    held: dict[str, list[NodeId]] = {kind: [] for kind in KINDS}
    for role in delegated_roles(targets).values():
        kind, _ = kind_and_name(str(role.name))  # python-tuf takes anything for a name
        if role.paths != [path_of(role.name, "*")]:
            raise CharterInvalid(f"expected a delegation of {path_of(role.name, '*')}, got {role.name}: {role.paths}")
        assert targets.delegations is not None
        keys = [*holders(role, targets.delegations.keys, role.name).values()]
        if len(keys) != 1:
            raise CharterInvalid(f"expected one key for the publisher {role.name}, got {len(keys)}")
        held[kind] += keys
    for kind, keys in held.items():
        if len(keys) > PUBLISHERS_MAX:
            raise CharterInvalid(f"expected up to {PUBLISHERS_MAX} publishers of {kind}, got {len(keys)}")
        if len(set(keys)) != len(keys):
            raise CharterInvalid(f"one key is two publishers of {kind}: each needs their own")


def delegated_roles(targets: Targets) -> dict[str, DelegatedRole]:
    """By name. Raises `CharterInvalid` when they are delegated in a way that Fallow does not use."""
    if targets.delegations is None:
        return {}
    if targets.delegations.roles is None:
        raise CharterInvalid("expected delegations by name, got hashed bins")
    return targets.delegations.roles


# --- publishers -----------------------------------------------------------------------------------


def role_of(kind: str, name: str) -> str:
    """The role of a publisher. Raises `CharterInvalid` for a kind or a name that there cannot be."""
    if kind not in KINDS:
        raise CharterInvalid(f"expected publishers of {' or '.join(KINDS)}, got {kind[:40]!r}")
    refusal = why_no_publisher_name(name)
    if refusal is not None:
        raise CharterInvalid(refusal)
    return f"{kind}-{name}"


def kind_and_name(role: str) -> tuple[str, str]:
    """What a publisher's role publishes, and what the publisher is called. Raises `CharterInvalid` for any other."""
    if role in KINDS:
        raise CharterInvalid(
            f"this council's repository was made by an earlier Fallow, whose publishers of {role} shared one list; now "
            "each has their own. Found the network anew: `fallow up` with another --state-dir"
        )
    kind, dash, name = role.partition("-")
    if kind not in KINDS or not dash or why_no_publisher_name(name) is not None:
        raise CharterInvalid(f"expected delegations of {'-NAME or '.join(KINDS)}-NAME only, got {role[:60]!r}")
    return kind, name


def path_of(role: str, what: str) -> str:
    """Where a publisher signs a model's digest or a release's version."""
    return f"{_folder(role)}{what}.json"


def what_of(role: str, path: str) -> str:
    """The digest or version in a path of a publisher's list; whatever it is, when it is none of theirs."""
    return path.removeprefix(_folder(role)).removesuffix(".json")


def probe_of(role: str) -> str:
    """A path that makes python-tuf's `Updater` load a publisher's list: it has no other public way to."""
    return path_of(role, _PROBES[kind_and_name(role)[0]])


def _folder(role: str) -> str:
    kind, name = kind_and_name(role)
    return f"{kind}/{name}/"


def publishers(targets: Targets) -> dict[str, NodeId]:
    """Role to key of every publisher, in the order in which the council names them. Of targets that were checked."""
    roles, delegations = delegated_roles(targets), targets.delegations
    return {
        name: next(iter(holders(role, delegations.keys, name).values()))
        for name, role in roles.items()
        if delegations is not None
    }


def role_held_by(targets: Targets, kind: str, node: NodeId) -> str | None:
    """The publisher's role of that kind which a key has."""
    held = publishers(targets).items()
    return next((role for role, key in held if key == node and kind_and_name(role)[0] == kind), None)


def listed(role: str, targets: Mapping[str, TargetFile]) -> dict[str, TargetFile]:
    """Digests or versions that a publisher's list names. Whatever else it lists is not there for us."""
    return {
        what_of(role, path): target for path, target in targets.items() if why_not_listed(role, path, target) is None
    }


def why_not_listed(role: str, path: str, target: TargetFile) -> str | None:
    """Why a publisher may not list this; `None` when they may."""
    kind, what = kind_and_name(role)[0], what_of(role, path)
    if path != path_of(role, what) or not _WHAT[kind].fullmatch(what):
        return f"{path[:100]!r} is not a path of {role}"
    if kind == MODELS and target.hashes.get("sha256") != what:
        return f"{path} is listed with another file's digest"
    return None


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
