"""The council's repository: a folder in TUF's layout that the registrar serves as static files and keeps fresh.

    metadata/N.root.json  N.targets.json  N.models-NAME.json  N.releases-NAME.json  N.snapshot.json  timestamp.json
    targets/<sha256>.policy.json
    targets/models/NAME/<sha256>.<digest>.json  targets/releases/NAME/<sha256>.<version>.json
    halts.bin

Rules
- A publication is verified whole before a file changes: signatures by threshold, versions that rise by one, an epoch
  that rises, delegations and paths that Fallow uses, every target's bytes. What a device would refuse is never written.
- Nothing is written for a publication that says only what is in force. What is kept of the past, and how much a
  publisher's key may fill, is `retention.py`'s; how often one may publish from afar, `publishing_book.py`'s.
- Files get new names (consistent snapshots); `timestamp.json` is replaced last. A crash leaves the old state, or a root
  that publishing the same again completes.
- The online keys sign snapshot and timestamp and can sign nothing else. Which of the keys in their folder to use is
  what the root says, so a rotation needs no restart.
- While a halt holds, no timestamp gets a later expiry.
- A file lock lets the registrar and a council member's command on one machine work at once. Methods block on disk.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import msgspec
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

from fallow.domain.charter import FleetPolicy, Halt
from fallow.domain.errors import CharterInvalid, CharterUnavailable, NotWorking
from fallow.domain.ids import NodeId
from fallow.private_file import Sync, write_durably
from fallow.trust.council import publication as publications
from fallow.trust.council import retention
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.halts import HaltBook
from fallow.trust.council.publication import InForce, Publication, Verified
from fallow.trust.council.publishing_book import PublishingBook
from fallow.trust.keys import Identity, load

HALTS_FILE = "halts.bin"
PUBLISHING_FILE = "publishing.json"
ONLINE_KEYS_MAX = 16


class Repository:
    """The folder. `network` is the SHA-256 of the network's descriptor, which halts name.

    `network` may be empty before the network has one; then no halt can be kept.
    """

    def __init__(self, folder: Path, online_keys: Path, network: str = "") -> None:
        self.folder = folder
        self.network = network
        self._online_keys = online_keys
        self._metadata = folder / "metadata"
        self._targets = folder / "targets"
        self._remembered: tuple[int, InForce] | None = None

    # --- what is in force -----------------------------------------------------------------------

    @property
    def exists(self) -> bool:
        return (self._metadata / "timestamp.json").is_file()

    def first_root(self) -> str:
        """The network's `tuf_root`. Raises `CharterUnavailable`."""
        return self._read(self._metadata / "1.root.json").decode()

    def roots(self) -> tuple[str, ...]:
        """Every root since the first. Raises `CharterUnavailable`."""
        return tuple(self._read(self._root_path(version)).decode() for version in range(1, self._root_version() + 1))

    def in_force(self) -> InForce:
        """What the repository says now. Remembered until something is published. Raises `CharterUnavailable`."""
        return self._named_by(self._timestamp())

    def _named_by(self, timestamp: Metadata[Timestamp]) -> InForce:
        version = timestamp.signed.snapshot_meta.version
        if self._remembered is None or self._remembered[0] != version:
            self._remembered = (version, self._load(version))
        return self._remembered[1]

    def policy(self) -> FleetPolicy:
        return self.in_force().policy

    def timestamp_expires_unix_s(self) -> float:
        return self._timestamp().signed.expires.timestamp()

    def halts(self) -> tuple[tuple[NodeId, Halt], ...]:
        """Those that hold. Raises `SignatureInvalid` when the file was damaged."""
        return self._halts_under(self.in_force())

    def _halts_under(self, state: InForce) -> tuple[tuple[NodeId, Halt], ...]:
        if not self.network or not (self.folder / HALTS_FILE).exists():
            return ()
        return self._book().holding(tuf.council_of(state.root.signed).values(), state.policy.epoch)

    def file(self, path: str) -> bytes | None:
        """A file as devices fetch it, such as `metadata/timestamp.json`; `None` when there is none of that name."""
        wanted = (self.folder / path).resolve()
        if not wanted.is_relative_to(self.folder.resolve()) or not wanted.is_file() or wanted.name.startswith("."):
            return None
        return wanted.read_bytes()

    # --- what the registrar does ----------------------------------------------------------------

    def renew_timestamp(self, now_unix_s: float, lease_s: float | None = None) -> float:
        """Let devices work until `now + lease_s` (the policy's lease without it); gives that time.

        Raises `NotWorking` while a halt holds, `CharterUnavailable` without repository or online key.
        """
        with self._locked():
            timestamp = self._timestamp()
            state = self._named_by(timestamp)
            halts = self._halts_under(state)
            if halts:
                raise NotWorking(f"A council member halted the network: {halts[0][1].why}", "halted")
            snapshot = self._fresh_snapshot(state, timestamp, now_unix_s)
            expires = now_unix_s + (state.policy.lease_s if lease_s is None else lease_s)
            data = self._timestamp_bytes(self._online(state.root.signed), timestamp, snapshot, expires)
            # Whether the newest of many renewals survives a power cut does not matter: a whole file must be there.
            write_durably(self._metadata / "timestamp.json", data, Sync.FILE)
            return expires

    def add_halt(self, envelope: bytes) -> Halt | None:
        """Keep a halt that holds and renew no more; `None` when it says nothing new or does not hold.

        Raises `SignatureInvalid`, `CharterUnavailable`.
        """
        with self._locked():
            state = self.in_force()
            return self._book().add(envelope, tuf.council_of(state.root.signed), state.policy.epoch)

    def publish(self, publication: Publication, now_unix_s: float) -> InForce:
        """Put a publication in force, or raise `CharterInvalid` and change nothing. Nothing changes, either, when it
        says only what is in force.

        While a halt holds that the publication does not end, the timestamp keeps its expiry.
        """
        return self._publish(publication, now_unix_s, lambda before, after: None)

    def publish_from_afar(self, publication: Publication, now_unix_s: float) -> InForce:
        """The same for who does not hold this folder: what publishers change without the council is counted.

        Raises `PublishedTooOften` as well, and then changes nothing.
        """

        def count(before: InForce, after: InForce) -> None:
            if before.targets_bytes == after.targets_bytes:
                changed = [role for role, (_, data) in after.delegated.items() if data != before.delegated[role][1]]
                self._publishing().count(changed, now_unix_s)

        return self._publish(publication, now_unix_s, count)

    def _publish(
        self, publication: Publication, now_unix_s: float, count: Callable[[InForce, InForce], None]
    ) -> InForce:
        """`count` may refuse what was verified and is new, before a file changes."""
        with self._locked():
            before = self.in_force() if self.exists else None
            before = self._completing(before)
            verified = publications.verify(publication, before, self._stored, now_unix_s)
            if before is not None and verified.state.root_bytes != before.root_bytes:
                self._check_online_key(verified.state.root.signed)
            return self._write(verified, before, now_unix_s, count)

    def _check_online_key(self, root: Root) -> None:
        refusal = tuf.why_no_online_key(root, [tuf.read(Root, text).signed for text in self.roots()])
        if refusal is not None:
            raise CharterInvalid(refusal)

    # --- writing --------------------------------------------------------------------------------

    def _write(
        self,
        verified: Verified,
        before: InForce | None,
        now_unix_s: float,
        count: Callable[[InForce, InForce], None],
    ) -> InForce:
        """Everything that can fail for what it says does so before a file changes; what is left is the disk."""
        state = verified.state
        online = self._online(state.root.signed)
        timestamp = self._timestamp() if before is not None else None
        if timestamp is not None and before is not None and self._says_already(timestamp, before, state):
            return state
        retention.check_room(self._targets, verified.files)
        snapshot = tuf.sign(Metadata(self._next_snapshot(state, before, now_unix_s)), [online[Snapshot.type]])
        snapshot_bytes = snapshot.to_bytes()
        # Without a name, no halt can be told from none.
        unread = not self.network and (self.folder / HALTS_FILE).exists()
        if timestamp is not None and (unread or self._halts_under(state)):
            expires = timestamp.signed.expires.timestamp()
        else:
            expires = now_unix_s + state.policy.lease_s
        timestamp_bytes = self._timestamp_bytes(online, timestamp, snapshot_bytes, expires)
        state = msgspec.structs.replace(state, snapshot=snapshot)
        if before is not None:
            count(before, state)
        for path, data in verified.files.items():
            write_durably(self._targets / path, data)
        for role, (metadata, data) in state.targets_by_role().items():
            write_durably(self._metadata / f"{metadata.signed.version}.{role}.json", data)
        write_durably(self._metadata / f"{snapshot.signed.version}.snapshot.json", snapshot_bytes)
        write_durably(self._root_path(state.root.signed.version), state.root_bytes)
        write_durably(self._metadata / "timestamp.json", timestamp_bytes, Sync.FILE)
        self._remembered = (snapshot.signed.version, state)
        if self.network:
            self._book().prune(tuf.council_of(state.root.signed), state.policy.epoch)
        retention.forget_lists(self._metadata, snapshot.signed)
        if before is not None and before.targets_bytes != state.targets_bytes:
            lists = (metadata.signed.targets.values() for metadata, _ in state.delegated.values())
            retention.forget_files(self._targets, (each.get_prefixed_paths()[0] for found in lists for each in found))
            self._publishing().forget()
        return state

    def _says_already(self, timestamp: Metadata[Timestamp], before: InForce, state: InForce) -> bool:
        """Whether a publication brought nothing new, and nothing that a crash left open: then nothing is written, or
        whoever sends the same again would fill the disk."""
        lists = {role: data for role, (_, data) in state.targets_by_role().items()}
        if (before.root_bytes, {role: data for role, (_, data) in before.targets_by_role().items()}) != (
            state.root_bytes,
            lists,
        ):
            return False
        try:
            tuf.verify_by(state.root.signed, Timestamp.type, timestamp)
            tuf.verify_by(state.root.signed, Snapshot.type, before.snapshot)
        except CharterInvalid:
            return False
        return True

    def _next_snapshot(self, state: InForce, before: InForce | None, now_unix_s: float) -> Snapshot:
        meta = {f"{role}.json": meta for role, meta in state.retired.items()}
        for role, (metadata, data) in state.targets_by_role().items():
            meta[f"{role}.json"] = MetaFile(metadata.signed.version, len(data), {"sha256": tuf.sha256(data)})
        version = before.snapshot.signed.version + 1 if before is not None else 1
        return Snapshot(version=version, expires=tuf.utc(now_unix_s + tuf.SNAPSHOT_LIFE_S), meta=meta)

    def _fresh_snapshot(self, state: InForce, timestamp: Metadata[Timestamp], now_unix_s: float) -> bytes | None:
        """A new snapshot when half of the present one's life is gone."""
        left = state.snapshot.signed.expires - tuf.utc(now_unix_s)
        if left > timedelta(seconds=tuf.SNAPSHOT_LIFE_S / 2):
            return None
        snapshot = Snapshot(
            version=timestamp.signed.snapshot_meta.version + 1,
            expires=tuf.utc(now_unix_s + tuf.SNAPSHOT_LIFE_S),
            meta=state.snapshot.signed.meta,
        )
        data = tuf.sign(Metadata(snapshot), [self._online(state.root.signed)[Snapshot.type]]).to_bytes()
        write_durably(self._metadata / f"{snapshot.version}.snapshot.json", data)
        return data

    @staticmethod
    def _timestamp_bytes(
        online: Mapping[str, Identity],
        before: Metadata[Timestamp] | None,
        snapshot: bytes | None,
        expires_unix_s: float,
    ) -> bytes:
        """`snapshot`: the bytes of a new one; `None` when the timestamp goes on naming the one that it named."""
        if snapshot is not None:
            version = tuf.read(Snapshot, snapshot, tuf.SNAPSHOT_MAX_BYTES).signed.version
            meta = MetaFile(version, len(snapshot), {"sha256": tuf.sha256(snapshot)})
        else:
            assert before is not None
            meta = before.signed.snapshot_meta
        timestamp = Timestamp(
            version=before.signed.version + 1 if before is not None else 1,
            expires=tuf.utc(expires_unix_s),
            snapshot_meta=meta,
        )
        return tuf.sign(Metadata(timestamp), [online[Timestamp.type]]).to_bytes()

    # --- reading --------------------------------------------------------------------------------

    def _load(self, snapshot_version: int) -> InForce:
        root_bytes = self._read(self._root_path(self._root_version()))
        snapshot = tuf.read(Snapshot, self._read(self._metadata / f"{snapshot_version}.snapshot.json"))
        named = {name.removesuffix(".json"): meta for name, meta in snapshot.signed.meta.items()}
        targets, targets_bytes = self._load_list(Targets.type, named)
        tuf.check_targets(targets.signed)
        delegated = {role: self._load_list(role, named) for role in tuf.delegated_roles(targets.signed)}
        policy = targets.signed.targets[tuf.POLICY]
        policy_bytes = self._read(self._targets / f"{policy.hashes['sha256']}.{tuf.POLICY}")
        return InForce(
            root=tuf.read(Root, root_bytes),
            root_bytes=root_bytes,
            targets=targets,
            targets_bytes=targets_bytes,
            delegated=delegated,
            retired={role: meta for role, meta in named.items() if role not in {Targets.type, *delegated}},
            snapshot=snapshot,
            policy=tuf.decode_policy(policy_bytes),
            policy_bytes=policy_bytes,
        )

    def _load_list(self, role: str, named: Mapping[str, MetaFile]) -> tuple[Metadata[Targets], bytes]:
        if role not in named:
            raise CharterUnavailable(f"{self.folder} was damaged: its snapshot names no {role}")
        data = self._read(self._metadata / f"{named[role].version}.{role}.json")
        return tuf.read(Targets, data), data

    def _completing(self, before: InForce | None) -> InForce | None:
        """The state with the newest root on disk, which a crash may have left ahead of the rest."""
        if before is None:
            return None
        newest = self._root_version()
        if newest == before.root.signed.version:
            return before
        data = self._read(self._root_path(newest))
        return msgspec.structs.replace(before, root=tuf.read(Root, data), root_bytes=data)

    def _timestamp(self) -> Metadata[Timestamp]:
        return tuf.read(Timestamp, self._read(self._metadata / "timestamp.json"), tuf.TIMESTAMP_MAX_BYTES)

    def _root_path(self, version: int) -> Path:
        return self._metadata / f"{version}.root.json"

    def _root_version(self) -> int:
        versions = [int(path.name.split(".")[0]) for path in self._metadata.glob("[0-9]*.root.json")]
        if not versions:
            raise CharterUnavailable(
                f"{self.folder} holds no council's repository: make one with `fallow council init`"
            )
        return max(versions)

    def _stored(self, path: str) -> Callable[[], bytes] | None:
        stored = self._targets / path
        return stored.read_bytes if stored.is_file() else None

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise CharterUnavailable(
                f"the council's repository cannot be read: {path.name}: {error.strerror}"
            ) from None

    def _publishing(self) -> PublishingBook:
        return PublishingBook(self.folder / PUBLISHING_FILE)

    def _book(self) -> HaltBook:
        return HaltBook(self.folder / HALTS_FILE, self.network)

    def _online(self, root: Root) -> dict[str, Identity]:
        """Role to key, of those that the root names."""
        found: dict[str, Identity] = {}
        paths = sorted(self._online_keys.glob("*.key"))[:ONLINE_KEYS_MAX]
        identities = {identity.node: identity for identity in map(load, paths)}
        for role in (Snapshot.type, Timestamp.type):
            for node in tuf.holders(root.roles[role], root.keys, role).values():
                if node in identities:
                    found[role] = identities[node]
            if role not in found:
                raise CharterUnavailable(
                    f"none of the keys in {self._online_keys} is the one that the council gave the registrar for {role}"
                )
        return found

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a+b") as file:
            _lock(file.fileno())
            yield  # closing the file gives the lock back


def _lock(handle: int) -> None:
    """Wait for the lock of a file. It is given back when the file is closed, or its process dies."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 0, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_LOCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)
