"""The council's files: where they lie, how a proposal is written, and what a repository holds as a proposal's base.

    <state>/council/member.key      a member's key, on the member's own machine (0600)
    <state>/council/pin.json        which network it is, and the newest council that this member has seen (`pins.py`)
    <state>/publisher/publisher.key a publisher's key (0600)
    <state>/registrar/online/*.key  the registrar's keys for snapshot and timestamp (0600)
    <state>/registrar/repository/   the repository, which the registrar serves

Rules
- Proposals are JSON, and are refused whole when they are not. Texts for people to copy are one word without spaces.
- An invitation is signed by nobody: its name is held to what a name may be, and is believed no further.
"""

import base64
import binascii
import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from fallow.domain.charter import FleetPolicy
from fallow.domain.errors import CharterInvalid, CharterUnavailable, ConfigError, SignatureInvalid
from fallow.domain.ids import NodeId
from fallow.policy.council import publisher_name
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.ceremonies import Members, Wanted, founding, is_young, publication_of, sign
from fallow.trust.council.ceremonies import proposal as renewal
from fallow.trust.council.fetch import FolderFetcher, RepositoryFetcher
from fallow.trust.council.lists import listing
from fallow.trust.council.proposals import (
    PROPOSAL_MAX_BYTES,
    ROOTS_MAX,
    Base,
    Proposal,
    verify_base,
)
from fallow.trust.council.publication import InForce
from fallow.trust.council.repository import Repository
from fallow.trust.envelope import Kind, seal, unseal
from fallow.trust.keys import Identity, load, load_or_create
from fallow.trust.registrar.requests import NAME_PATTERN

INVITATION_PREFIX = "fallow-council-"
MEMBER_PREFIX = "fallow-member-"
TEXT_MAX_CHARS = 8192

T = TypeVar("T")


class CouncilPaths(msgspec.Struct, frozen=True):
    """Where a machine keeps what it has of a council."""

    state: Path

    @property
    def member_key(self) -> Path:
        return self.state / "council" / "member.key"

    @property
    def pin(self) -> Path:
        return self.state / "council" / "pin.json"

    @property
    def publisher_key(self) -> Path:
        return self.state / "publisher" / "publisher.key"

    @property
    def online_keys(self) -> Path:
        return self.state / "registrar" / "online"

    @property
    def repository(self) -> Path:
        return self.state / "registrar" / "repository"

    def open_repository(self, network: str = "") -> Repository:
        return Repository(self.repository, self.online_keys, network)


class CouncilInvitation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a new member must know. Public."""

    name: str
    network: str
    """SHA-256 of the network's descriptor."""
    first_root: str
    """SHA-256 of what the founders signed."""
    threshold: int
    members: int


class Candidate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new member's answer, signed with the key that it offers."""

    name: str
    network: str


# --- a council of one -----------------------------------------------------------------------------


def found_council_of_one(state: Path, name: str, now_unix_s: float, policy: FleetPolicy | None = None) -> str:
    """Make a council of one, a publisher and the repository on this machine, at epoch 1; gives the first root.

    On a folder that has a repository already it gives that one's first root; a council of one whose word has lived for
    half of its life gives it again.
    """
    paths = CouncilPaths(state)
    repository = paths.open_repository()
    if not repository.exists:
        member, publisher = load_or_create(paths.member_key), load_or_create(paths.publisher_key)
        wanted = Wanted(
            policy=policy,
            members={member.node: name},
            threshold=1,
            online=load_or_create(paths.online_keys / "1.key").node,
            publishers={tuf.role_of(kind, publisher_name(name)): publisher.node for kind in tuf.KINDS},
        )
        proposal, _ = sign(founding(wanted, now_unix_s), [member, publisher])
        repository.publish(publication_of(proposal), now_unix_s)
    else:
        _renew_alone(paths, repository, now_unix_s)
    return repository.first_root()


def _renew_alone(paths: CouncilPaths, repository: Repository, now_unix_s: float) -> None:
    """What would stop the home network of somebody who never heard of a council, when their first word runs out: the
    council's documents where this member alone decides, and the lists that this machine's publisher signs.

    More members than this one, and other publishers, are told by `fallow council status`.
    """
    state = repository.in_force()
    with contextlib.suppress(FileNotFoundError, CharterInvalid):  # others decide, or more keys must sign
        if not (is_young(state.root.signed, now_unix_s) and is_young(state.targets.signed, now_unix_s)):
            renewed = renewal(read_base(FolderFetcher(paths.repository)), Wanted(), now_unix_s)
            signed, _ = sign(renewed, [load(paths.member_key)])
            repository.publish(publication_of(signed), now_unix_s)
    with contextlib.suppress(FileNotFoundError, CharterInvalid):
        publisher = load(paths.publisher_key)
        for role, key in tuf.publishers(state.targets.signed).items():
            if key == publisher.node and not is_young(state.delegated[role][0].signed, now_unix_s):
                again = listing(repository.in_force(), tuf.kind_and_name(role)[0], {}, publisher, now_unix_s)
                repository.publish(again, now_unix_s)


def member_of(paths: CouncilPaths) -> Identity:
    """This machine's member key. Raises `ConfigError` when there is none."""
    try:
        return load(paths.member_key)
    except FileNotFoundError:
        raise ConfigError(
            f"There is no council member's key on this machine ({paths.member_key}). A member makes one with "
            "`fallow council join`; `fallow up` makes a council of one."
        ) from None


def signing_keys(paths: CouncilPaths) -> tuple[Identity, ...]:
    """The member's and the publisher's key, as far as this machine has them. Raises `ConfigError` when it has none."""
    found = []
    for path in (paths.member_key, paths.publisher_key):
        try:
            found.append(load(path))
        except FileNotFoundError:
            continue
    if not found:
        member_of(paths)
    return tuple(found)


# --- proposals ------------------------------------------------------------------------------------


def encode_proposal(proposal: Proposal) -> bytes:
    return msgspec.json.format(msgspec.json.encode(proposal), indent=1) + b"\n"


def decode_proposal(data: bytes) -> Proposal:
    """Raises `CharterInvalid`."""
    if len(data) > PROPOSAL_MAX_BYTES:
        raise CharterInvalid(f"expected a proposal of up to {PROPOSAL_MAX_BYTES} bytes, got {len(data)}")
    return _json(data, Proposal, "a proposal")


def read_proposal(path: Path) -> Proposal:
    """Raises `CharterInvalid`, `ConfigError` when there is no such file."""
    try:
        with path.open("rb") as file:
            return decode_proposal(file.read(PROPOSAL_MAX_BYTES + 1))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def read_base(fetcher: RepositoryFetcher) -> Base:
    """What a repository has in force, verified as a proposal's base is.

    Raises `CharterInvalid`, `CharterUnavailable`.
    """
    fetcher.start()
    roots: list[str] = []
    while len(roots) < ROOTS_MAX:
        data = fetcher.get(f"metadata/{len(roots) + 1}.root.json", tuf.ROOT_MAX_BYTES)
        if data is None:
            break
        roots.append(_utf8(data))
    versions = _versions(fetcher, roots)
    targets_text = _list(fetcher, Targets.type, versions)
    targets = tuf.read(Targets, targets_text)
    tuf.check_targets(targets.signed)
    lists = {role: _list(fetcher, role, versions) for role in tuf.delegated_roles(targets.signed)}
    stored = targets.signed.targets[tuf.POLICY].get_prefixed_paths()[0]
    policy = _utf8(_needed(fetcher, f"targets/{stored}", tuf.POLICY_MAX_BYTES))
    retired = {role: version for role, version in versions.items() if role not in {Targets.type, *lists}}
    base = Base(roots=tuple(roots), targets=targets_text, policy=policy, delegated=lists, retired=retired)
    verify_base(base)
    return base


def _versions(fetcher: RepositoryFetcher, roots: Sequence[str]) -> dict[str, int]:
    """Of every list, as the registrar's key of the newest root signed it. Expired or not: see `verify_base`."""
    if not roots:
        raise CharterUnavailable("the council's repository has no root")
    root = tuf.read(Root, roots[-1], tuf.ROOT_MAX_BYTES).signed
    timestamp = tuf.read(Timestamp, _needed(fetcher, "metadata/timestamp.json", tuf.TIMESTAMP_MAX_BYTES))
    tuf.verify_by(root, Timestamp.type, timestamp)
    version = timestamp.signed.snapshot_meta.version
    snapshot = tuf.read(Snapshot, _needed(fetcher, f"metadata/{version}.snapshot.json", tuf.SNAPSHOT_MAX_BYTES))
    tuf.verify_by(root, Snapshot.type, snapshot)
    return {name.removesuffix(".json"): meta.version for name, meta in snapshot.signed.meta.items()}


def in_force_of(base: Base) -> InForce:
    """A base as a publisher builds on it; of its snapshot nothing is known here. Raises `CharterInvalid`."""
    _, _, policy = verify_base(base)
    root, targets = base.roots[-1].encode(), base.targets.encode()
    lists = {role: text.encode() for role, text in base.delegated.items()}
    return InForce(
        root=tuf.read(Root, root),
        root_bytes=root,
        targets=tuf.read(Targets, targets),
        targets_bytes=targets,
        delegated={role: (tuf.read(Targets, data), data) for role, data in lists.items()},
        retired={},
        snapshot=Metadata(Snapshot()),
        policy=policy,
        policy_bytes=base.policy.encode(),
    )


def _list(fetcher: RepositoryFetcher, role: str, versions: Mapping[str, int]) -> str:
    if role not in versions:
        raise CharterInvalid(f"the repository's snapshot names no {role}")
    return _utf8(_needed(fetcher, f"metadata/{versions[role]}.{role}.json", tuf.TARGETS_MAX_BYTES))


def _needed(fetcher: RepositoryFetcher, path: str, max_bytes: int) -> bytes:
    data = fetcher.get(path, max_bytes)
    if data is None:
        raise CharterUnavailable(f"the council's repository has no {path}")
    return data


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise CharterInvalid("expected text in UTF-8") from None


# --- texts ----------------------------------------------------------------------------------------


def invitation_text(invitation: CouncilInvitation) -> str:
    return INVITATION_PREFIX + _pack(msgspec.msgpack.encode(invitation))


def invitation_of(text: str) -> CouncilInvitation:
    """Raises `SignatureInvalid` for anything else."""
    data = _unpack(text, INVITATION_PREFIX)
    try:
        invitation = msgspec.msgpack.decode(data, type=CouncilInvitation)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise SignatureInvalid("an invitation to a council that was not copied whole") from None
    if invitation.name and not re.search(NAME_PATTERN, invitation.name):
        raise SignatureInvalid(f"an invitation to a network that cannot be called {invitation.name[:80]!r}")
    return invitation


def member_text(identity: Identity, name: str, network: str) -> str:
    """A member's public key and name, with proof that the key is theirs."""
    return MEMBER_PREFIX + _pack(seal(Kind.MEMBER, Candidate(name=name, network=network), identity))


def member_of_text(text: str, network: str) -> tuple[NodeId, str]:
    """Key and name. Raises `SignatureInvalid`: altered, or of another network."""
    candidate, node = unseal(Kind.MEMBER, Candidate, _unpack(text, MEMBER_PREFIX))
    if candidate.network not in {network, ""}:
        raise SignatureInvalid(f"{candidate.name[:64]!r} answered the invitation of another network")
    name = "".join(each for each in candidate.name if each.isprintable())[: tuf.NAME_MAX_CHARS]
    return node, name


def members_of_texts(texts: tuple[str, ...], network: str) -> Members:
    """Raises `SignatureInvalid`, also when one key comes twice."""
    found: dict[NodeId, str] = {}
    for text in texts:
        node, name = member_of_text(text, network)
        if node in found:
            raise SignatureInvalid(f"the key of {name!r} is the key of {found[node]!r}: each member needs their own")
        found[node] = name
    return found


def _pack(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unpack(text: str, prefix: str) -> bytes:
    packed = "".join(text.split())
    if not packed.startswith(prefix) or len(packed) > TEXT_MAX_CHARS:
        raise SignatureInvalid(f"expected a text that begins with {prefix}, got {packed[:24]!r}")
    body = packed.removeprefix(prefix)
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise SignatureInvalid(f"a text {prefix}… that was not copied whole") from None


def _json(data: bytes, type_: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(data, type=type_)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CharterInvalid(f"expected {what}, got what cannot be read: {error}") from None
