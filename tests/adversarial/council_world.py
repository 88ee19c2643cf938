"""A council of three (two must sign), a publisher, a registrar's repository, and a device that checks it.

The repository, the council's functions and the device's client are the real ones. What the device fetches is a copy of
the repository's folder (`served`), which an attacker may change at will; with `Forger`, also as who stole keys.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

from fallow.domain.charter import Charter, FleetPolicy, Halt
from fallow.domain.ids import Digest, NodeId
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.ceremonies import Wanted, founding, proposal, publication_of, sign
from fallow.trust.council.client import CharterClient
from fallow.trust.council.fetch import FolderFetcher
from fallow.trust.council.files import read_base
from fallow.trust.council.halts import read_halt
from fallow.trust.council.lists import listing
from fallow.trust.council.proposals import Base, Proposal
from fallow.trust.council.publication import InForce
from fallow.trust.council.repository import Repository
from fallow.trust.keys import Identity, identity_of

NOW = 1_800_000_000.0
LEASE_S = 600.0
NETWORK = "5a" * 32


def identity(name: str) -> Identity:
    """The same key for the same name, in every run."""
    return identity_of(name.encode().ljust(32, b"."))


ALICE, BOB, CAROL = (identity(name) for name in ("alice", "bob", "carol"))
PUBLISHER, ONLINE, MALLORY = (identity(name) for name in ("publisher", "online", "mallory"))
COUNCIL = {ALICE.node: "alice", BOB.node: "bob", CAROL.node: "carol"}
MANIFEST = b'{"name":"honest"}'
MODEL = tuf.sha256(MANIFEST)
POLICY = FleetPolicy(epoch=1, lease_s=LEASE_S)
LIST = tuf.role_of(tuf.MODELS, "publisher")
"""The publisher's role, and the name of its list."""


def path_of(manifest: bytes, role: str = LIST) -> str:
    """Where a publisher lists a manifest."""
    return tuf.path_of(role, tuf.sha256(manifest))


def write_key(folder: Path, key: Identity) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key.node[:16]}.key"
    path.write_bytes(key.seed)
    path.chmod(0o600)


class World:
    """All of it, in a folder, at `now` on every clock."""

    def __init__(self, folder: Path, members: Mapping[NodeId, str] = COUNCIL, threshold: int = 2) -> None:
        self.folder = folder
        self.now = NOW
        write_key(folder / "online", ONLINE)
        self.repository = Repository(folder / "repository", folder / "online", NETWORK)
        if not self.repository.exists:
            self._found(members, threshold)
        self.served = folder / "served"
        self.serve()
        self.client = self.new_client()

    # --- the honest side ------------------------------------------------------------------------

    def _found(self, members: Mapping[NodeId, str], threshold: int) -> None:
        wanted = Wanted(
            policy=POLICY,
            members=members,
            threshold=threshold,
            online=ONLINE.node,
            publishers={LIST: PUBLISHER.node},
        )
        self.put_in_force(founding(wanted, self.now), [*[ALICE, BOB, CAROL][:threshold], PUBLISHER])
        self.publish_model(MANIFEST)

    def put_in_force(self, proposed: Proposal, signers: Iterable[Identity]) -> None:
        signed, _ = sign(proposed, dict.fromkeys(signers))
        self.repository.publish(publication_of(signed), self.now)

    def base(self) -> Base:
        return read_base(FolderFetcher(self.repository.folder))

    def propose(self, **wanted: Any) -> Proposal:
        return proposal(self.base(), Wanted(**wanted), self.now)

    def publish_model(self, manifest: bytes, publisher: Identity = PUBLISHER) -> Digest:
        digest = tuf.sha256(manifest)
        state = self.repository.in_force()
        self.repository.publish(listing(state, tuf.MODELS, {digest: manifest}, publisher, self.now), self.now)
        return digest

    def add_publisher(self, publisher: Identity, name: str) -> str:
        """The council makes one of models, besides those that there are; gives the role."""
        role = tuf.role_of(tuf.MODELS, name)
        held = tuf.publishers(self.repository.in_force().targets.signed)
        self.put_in_force(self.propose(publishers={**held, role: publisher.node}), [ALICE, BOB, publisher])
        return role

    def serve(self) -> None:
        """Let devices see what the honest repository holds."""
        shutil.rmtree(self.served, ignore_errors=True)
        shutil.copytree(self.repository.folder, self.served)

    def renew(self, seconds: float = 1.0) -> None:
        """Time passes, and the registrar renews and serves."""
        self.now += seconds
        self.repository.renew_timestamp(self.now)
        self.serve()

    # --- the device -----------------------------------------------------------------------------

    def new_client(self) -> CharterClient:
        """The device's client after a restart: all that it knows is in its folder."""
        root = self.repository.first_root()
        return CharterClient(root, NETWORK, self.folder / "device", FolderFetcher(self.served))

    def check(self) -> Charter:
        return self.client.check(self.now)[0]

    def halts(self) -> tuple[Halt, ...]:
        return tuple(read_halt(envelope, NETWORK)[0] for envelope in self.client.check(self.now)[1])

    def is_unharmed(self, *, epoch: int = 1) -> None:
        """The honest repository is believed again, by the running device and by one that restarts."""
        self.renew()
        for client in (self.client, self.new_client()):
            charter, _ = client.check(self.now)
            assert charter.policy.epoch == epoch
            assert charter.models == {MODEL}

    def recovers(self, *, epoch: int = 1) -> None:
        """The council gives the registrar a key that nobody stole, and everything is as `is_unharmed` says."""
        new_key = identity(f"online after {self.now}")
        write_key(self.folder / "online", new_key)
        self.put_in_force(self.propose(online=new_key.node), [BOB, CAROL])
        self.is_unharmed(epoch=epoch)


class Forger:
    """What a thief can serve: changed documents, signed with whatever keys were stolen."""

    def __init__(self, world: World, *stolen: Identity) -> None:
        self._world = world
        self._stolen = stolen

    @property
    def metadata(self) -> Path:
        return self._world.served / "metadata"

    @property
    def state(self) -> InForce:
        return self._world.repository.in_force()

    def put(self, name: str, data: bytes) -> None:
        (self.metadata / name).write_bytes(data)

    def signed(self, metadata: Metadata[Any]) -> bytes:
        metadata.signatures.clear()
        return tuf.sign(metadata, self._stolen).to_bytes()

    def root(self, root: Root) -> None:
        self.put(f"{root.version}.root.json", self.signed(Metadata(root)))

    def lists(
        self,
        lists: Mapping[str, bytes],
        *,
        versions: Mapping[str, int] | None = None,
        snapshot_version: int | None = None,
        timestamp_version: int | None = None,
        expires_unix_s: float | None = None,
    ) -> None:
        """Serve these lists of targets (and the rest as it is) under a snapshot and a timestamp signed as stolen."""
        served = {role: data for role, (_, data) in self.state.targets_by_role().items()} | dict(lists)
        meta = {}
        for role, data in served.items():
            version = (versions or {}).get(role) or tuf.read(Targets, data).signed.version
            self.put(f"{version}.{role}.json", data)
            meta[f"{role}.json"] = MetaFile(version, len(data), {"sha256": tuf.sha256(data)})
        self.snapshot(meta, snapshot_version, timestamp_version, expires_unix_s)

    def snapshot(
        self,
        meta: Mapping[str, MetaFile],
        snapshot_version: int | None = None,
        timestamp_version: int | None = None,
        expires_unix_s: float | None = None,
    ) -> None:
        version = snapshot_version or self.state.snapshot.signed.version + 1
        expires = tuf.utc(self._world.now + tuf.SNAPSHOT_LIFE_S)
        data = self.signed(Metadata(Snapshot(version=version, expires=expires, meta=dict(meta))))
        self.put(f"{version}.snapshot.json", data)
        self.timestamp(MetaFile(version, len(data), {"sha256": tuf.sha256(data)}), timestamp_version, expires_unix_s)

    def timestamp(self, snapshot: MetaFile, version: int | None = None, expires_unix_s: float | None = None) -> None:
        current = tuf.read(Timestamp, (self.metadata / "timestamp.json").read_bytes()).signed
        timestamp = Timestamp(
            version=version or current.version + 1,
            expires=tuf.utc(expires_unix_s or self._world.now + LEASE_S),
            snapshot_meta=snapshot,
        )
        self.put("timestamp.json", self.signed(Metadata(timestamp)))

    def policy(self, policy: FleetPolicy, *signers: Identity) -> None:
        """Serve another policy, its targets signed by `signers`, under a snapshot signed as stolen."""
        data = tuf.encode_policy(policy)
        targets = tuf.read(Targets, self.state.targets_bytes)
        targets.signed.version += 1
        targets.signed.targets[tuf.POLICY] = tuf.TargetFile.from_data(tuf.POLICY, data, ["sha256"])
        targets.signatures.clear()
        self.target(f"{tuf.sha256(data)}.{tuf.POLICY}", data)
        self.lists({"targets": tuf.sign(targets, signers).to_bytes()})

    def target(self, stored: str, data: bytes) -> None:
        path = self._world.served / "targets" / stored
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def halts(self, *envelopes: bytes) -> None:
        (self._world.served / "halts.bin").write_bytes(msgspec.msgpack.encode(list(envelopes)))
