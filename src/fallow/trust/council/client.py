"""A device's check of the council's repository: `CharterSource` by python-tuf's `Updater`.

Rules
- A new `Updater` at every check: its reference time is fixed when it is built. The time that it judges expiry by is the
  caller's, which does not run backwards (`policy/lease.py`), and not the clock of this machine.
- What was verified once is kept in a folder and is never gone back on, across restarts: versions by TUF's rules, and
  the policy's epoch by ours. The folder starts from the root that the network's descriptor pins,
  and from nothing where it was another network's.
- Beyond TUF's rules, each root and the policy's document must be of the form that Fallow uses (`tuf_format.py`).
- A publisher's list that expired or cannot be read lists nothing, and the rest stays good: a publisher must not be able
  to stop the network, nor another publisher. One that its publisher did not sign, that the snapshot leaves out, or that
  is not the file that it names, is the registrar's doing or the line's, and makes the check fail.
- `CharterInvalid` is what an attack looks like, `CharterUnavailable` what a bad line looks like. Both extend nothing.
- Blocking; one check at a time.
"""

import contextlib
import logging
import shutil
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

import msgspec
import tuf as python_tuf
from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Root, TargetFile, Targets
from tuf.ngclient import Updater, UpdaterConfig
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet

from fallow.domain.charter import Charter, FleetPolicy, Halt, SignedModel
from fallow.domain.errors import CharterInvalid, CharterUnavailable, SignatureInvalid
from fallow.domain.ids import Digest, NodeId
from fallow.policy.council import halt_holds, why_policy_cannot_follow
from fallow.private_file import write_durably
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.fetch import BASE, RepositoryFetcher
from fallow.trust.council.figures import signed_figures
from fallow.trust.council.halts import HALTS_FILE_MAX_BYTES, decode_halts

HALTS_PATH = "halts.bin"
LAST_POLICY = "last_policy.json"

log = logging.getLogger(__name__)


def last_known(folder: Path) -> tuple[Mapping[str, NodeId], int] | None:
    """The council and the policy's epoch that a client's folder holds as verified; `None` before its first check.

    Raises `CharterInvalid` when the folder was damaged.
    """
    try:
        root = (folder / "metadata" / "root.json").read_bytes()
        last = (folder / LAST_POLICY).read_bytes()
    except OSError:
        return None
    return tuf.council_of(tuf.read(Root, root, tuf.ROOT_MAX_BYTES).signed), _decode_last(last).policy.epoch


class LastPolicy(msgspec.Struct, frozen=True):
    """The newest policy that a device believed, and of which network: another one's epochs are no measure."""

    policy: FleetPolicy
    network: str


class CharterClient:
    """The repository as a device sees it. Implements `trust.contract.CharterSource`."""

    def __init__(self, first_root: str, network: str, folder: Path, fetcher: RepositoryFetcher) -> None:
        """`first_root`: the descriptor's `tuf_root`; `network`: its SHA-256; `folder`: this client's alone.

        Raises `CharterUnavailable` when the folder cannot be made or was damaged.
        """
        self._first_root = first_root.encode()
        self._network = network
        self._metadata = folder / "metadata"
        self._policy_file = folder / "policy.json"
        self._last_policy_file = folder / LAST_POLICY
        self._fetcher = fetcher
        self._roots_checked = 0
        self._told_of_lists: dict[str, str] = {}
        self._lock = threading.Lock()
        self._last = self._read_last_policy()
        with _named("prepare the charter's folder"):
            if self._last is not None and self._last.network not in {"", network}:
                self._begin_anew()
            self._metadata.mkdir(parents=True, exist_ok=True)

    def check(self, reference_unix_s: float) -> tuple[Charter, tuple[bytes, ...]]:
        """Fetch and verify all of it, as of that time; and the halts that hold, in their envelopes.

        Raises `CharterInvalid` or `CharterUnavailable`.
        """
        with self._lock:
            self._fetcher.start()
            with _named("check the council's repository"):
                return self._check(reference_unix_s)

    def _check(self, reference_unix_s: float) -> tuple[Charter, tuple[bytes, ...]]:
        updater = self._updater()
        trusted = _trusted_set_as_of(updater, tuf.utc(reference_unix_s))
        try:
            updater.refresh()
        except ExpiredMetadataError as error:
            raise CharterInvalid(f"{error}{self._halt_remark(trusted)}") from None
        self._check_roots(trusted.root)
        tuf.check_targets(trusted.targets)
        policy = self._policy(updater, trusted.targets)
        signed, releases = self._listed(updater, trusted)
        if policy.allowed_models is not None:
            signed = {model: signed[model] for model in policy.allowed_models if model in signed}
        halts = self._halts(trusted.root, policy.epoch)
        self._remember(policy)
        return Charter(
            policy=policy,
            council=tuf.council_of(trusted.root),
            root_version=trusted.root.version,
            timestamp_version=trusted.timestamp.version,
            timestamp_expires_unix_s=trusted.timestamp.expires.timestamp(),
            models=frozenset(signed),
            signed=signed,
            releases=releases,
        ), tuple(envelope for envelope, _ in halts)

    def _updater(self) -> Updater:
        config = UpdaterConfig(
            max_root_rotations=tuf.ROOT_ROTATIONS_MAX,
            max_delegations=tuf.DELEGATIONS_MAX,
            root_max_length=tuf.ROOT_MAX_BYTES,
            timestamp_max_length=tuf.TIMESTAMP_MAX_BYTES,
            snapshot_max_length=tuf.SNAPSHOT_MAX_BYTES,
            targets_max_length=tuf.TARGETS_MAX_BYTES,
        )
        return Updater(
            str(self._metadata),
            BASE + "metadata/",
            target_base_url=BASE + "targets/",
            fetcher=self._fetcher.tuf,
            config=config,
            bootstrap=self._bootstrap(),
        )

    def _bootstrap(self) -> bytes:
        """The newest root that was verified from the first one on; else the first.

        Not always the first: the bound on rotations counts from here, and would end all rotations for good.
        """
        try:
            if (self._metadata / "root_history" / "1.root.json").read_bytes() == self._first_root:
                return (self._metadata / "root.json").read_bytes()
        except FileNotFoundError:
            pass
        return self._first_root

    def _check_roots(self, newest: Root) -> None:
        """Each root that led to the newest, too: one that counts a key twice could have signed the next alone."""
        for version in range(self._roots_checked + 1, newest.version):
            data = (self._metadata / "root_history" / f"{version}.root.json").read_bytes()
            tuf.check_root(tuf.read(Root, data, tuf.ROOT_MAX_BYTES).signed)
        tuf.check_root(newest)
        self._roots_checked = newest.version

    def _policy(self, updater: Updater, targets: Targets) -> FleetPolicy:
        target = targets.targets[tuf.POLICY]
        try:
            data = self._policy_file.read_bytes()
            target.verify_length_and_hashes(data)
        except (OSError, RepositoryError):
            updater.download_target(target, str(self._policy_file))
            data = self._policy_file.read_bytes()
            target.verify_length_and_hashes(data)
        policy = tuf.decode_policy(data)
        refusal = why_policy_cannot_follow(None if self._last is None else self._last.policy, policy)
        if refusal is not None:
            raise CharterInvalid(f"a policy that cannot follow the last one: {refusal}")
        return policy

    def _listed(
        self, updater: Updater, trusted: TrustedMetadataSet
    ) -> tuple[dict[Digest, SignedModel], frozenset[str]]:
        """What all publishers signed together. What two of them signed stays while one of them lists it."""
        models: dict[Digest, SignedModel] = {}
        releases: set[str] = set()
        for rank, role in enumerate(tuf.delegated_roles(trusted.targets)):
            found = tuf.listed(role, self._list(updater, trusted, role))
            if tuf.kind_and_name(role)[0] == tuf.RELEASES:
                releases |= found.keys()
                continue
            for what, target in found.items():
                before, figures = models.get(Digest(what), SignedModel(rank, ())), signed_figures(target)
                told = before.figures if figures is None or figures in before.figures else (*before.figures, figures)
                models[Digest(what)] = SignedModel(before.rank, told)
        return models, frozenset(releases)

    def _list(self, updater: Updater, trusted: TrustedMetadataSet, role: str) -> Mapping[str, TargetFile]:
        if f"{role}.json" not in trusted.snapshot.meta:
            raise CharterInvalid(f"the snapshot leaves the list {role} out")
        try:
            updater.get_targetinfo(tuf.probe_of(role))
        except (LengthOrHashMismatchError, UnsignedMetadataError, BadVersionNumberError):
            raise
        except RepositoryError as error:
            if self._told_of_lists.get(role) != str(error):
                log.warning("the list %s cannot be believed, and lists nothing: %s", role, error)
            self._told_of_lists[role] = str(error)
            return {}
        self._told_of_lists.pop(role, None)
        loaded = trusted.get(role)
        return loaded.targets if isinstance(loaded, Targets) else {}

    # --- halts ----------------------------------------------------------------------------------

    def _halts(self, root: Root, epoch: int) -> tuple[tuple[bytes, Halt], ...]:
        data = self._fetcher.get(HALTS_PATH, HALTS_FILE_MAX_BYTES)
        if data is None:
            return ()
        try:
            found = decode_halts(data, self._network)
        except SignatureInvalid as error:
            raise CharterInvalid(f"the registrar's halts: {error.message}") from None
        members = frozenset(tuf.council_of(root).values())
        return tuple(
            (envelope, halt)
            for envelope, signer, halt in found
            if halt_holds(halt, signer, members, self._network, epoch)
        )

    def _halt_remark(self, trusted: TrustedMetadataSet) -> str:
        """Why nobody renewed the timestamp, when it is a halt: for the words only."""
        epoch = self._last.policy.epoch if self._last is not None else 0
        try:
            halts = self._halts(trusted.root, epoch)
        except (CharterInvalid, CharterUnavailable):
            return ""
        return f"; a council member halted the network: {halts[0][1].why}" if halts else ""

    # --- the last policy ------------------------------------------------------------------------

    def _read_last_policy(self) -> LastPolicy | None:
        try:
            last = _decode_last(self._last_policy_file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, CharterInvalid) as error:
            raise CharterUnavailable(
                f"{self._last_policy_file} cannot be read ({error}), so this device does not know which policies are "
                "old: delete the folder that it is in"
            ) from None
        return last

    def _begin_anew(self) -> None:
        """Forget another network's versions. The file that names it goes last, so that a crash leaves nothing half."""
        shutil.rmtree(self._metadata, ignore_errors=True)
        self._policy_file.unlink(missing_ok=True)
        self._last_policy_file.unlink()
        self._last = None

    def _remember(self, policy: FleetPolicy) -> None:
        last = LastPolicy(policy, self._network)
        if last != self._last:
            write_durably(self._last_policy_file, msgspec.json.encode(last))
            self._last = last


def _decode_last(data: bytes) -> LastPolicy:
    """Raises `CharterInvalid`."""
    try:
        return msgspec.json.decode(data, type=LastPolicy)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return LastPolicy(tuf.decode_policy(data), "")  # as it was written before the network was kept


def _trusted_set_as_of(updater: Updater, reference: datetime) -> TrustedMetadataSet:
    """The updater's verified metadata, which from now on judges expiry by `reference`.

    python-tuf offers no public way to pass a reference time in. Should a version keep it elsewhere, nothing is checked
    rather than checked against the wrong time.
    """
    trusted = getattr(updater, "_trusted_set", None)
    if not isinstance(trusted, TrustedMetadataSet) or not isinstance(
        getattr(trusted, "reference_time", None), datetime
    ):
        raise CharterUnavailable(
            f"Fallow cannot set the time of python-tuf {python_tuf.__version__}: "
            "install a version that it was tested with"
        )
    trusted.reference_time = reference
    return trusted


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Turn whatever fetching and parsing strangers' bytes can raise into the two errors of the contract."""
    try:
        yield
    except (CharterInvalid, CharterUnavailable):
        raise
    except (RepositoryError, DownloadLengthMismatchError) as error:
        raise CharterInvalid(f"cannot {what}: {error}") from error
    except DownloadError as error:
        raise CharterUnavailable(f"cannot {what}: {error}") from error
    except OSError as error:
        raise CharterUnavailable(f"cannot {what}: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise CharterInvalid(f"cannot {what}: it is malformed ({type(error).__name__}: {error})") from error
