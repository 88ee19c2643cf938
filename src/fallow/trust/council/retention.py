"""What a repository keeps on its disk: how much a publisher's key may fill, and what is deleted when.

Rules
- A publisher's files (manifests, descriptions) may have `FILES_BYTES_MAX` in all, those that they took off their list
  included; more is refused. So a stolen key fills no disk.
- What a publisher takes off a list stays until the council's next word: a proposal that is being signed may name it.
- Of signed lists and snapshots, those stay that the newest `SNAPSHOTS_KEPT` snapshots name: devices that are in the
  middle of a check still find what they were told of.
- Roots and policies are the council's, and stay. It decides nothing about what holds; it only sees names and sizes.
"""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from tuf.api.metadata import Snapshot

from fallow.domain.errors import CharterInvalid
from fallow.trust.council import tuf_format as tuf

FILES_BYTES_MAX = 512 * 1024 * 1024
"""Of one publisher."""
FILE_BYTES_MIN = 4096
"""What a file counts for at least: a disk has no smaller ones."""
SNAPSHOTS_KEPT = 64


def check_room(targets: Path, files: Mapping[str, bytes]) -> None:
    """Raises `CharterInvalid` when these files (stored names to content) are more than their publishers may have."""
    new = {targets / name: len(data) for name, data in files.items()}
    for folder in {path.parent for path in new if path.parent != targets}:
        sizes = {path: path.stat().st_size for path in folder.glob("*.json")} if folder.is_dir() else {}
        sizes |= {path: size for path, size in new.items() if path.parent == folder}
        if sum(max(size, FILE_BYTES_MIN) for size in sizes.values()) > FILES_BYTES_MAX and sizes.keys() & new.keys():
            raise CharterInvalid(
                f"{folder.parent.name}/{folder.name} may have files of {FILES_BYTES_MAX} bytes in all, those included "
                "that were taken off its list: they go when the council next signs (`fallow council propose --renew`)"
            )


def forget_files(targets: Path, named: Iterable[str]) -> None:
    """Delete publishers' files but those of these stored names. Called when the council's word changed."""
    kept = {targets / name for name in named}
    for kind in tuf.KINDS:
        for path in (targets / kind).glob("*/*.json"):
            if path not in kept:
                _delete(path)


def forget_lists(metadata: Path, newest: Snapshot) -> None:
    """Delete the snapshots before the newest `SNAPSHOTS_KEPT`, and the lists that only they name."""
    versions = sorted(int(path.name.split(".")[0]) for path in metadata.glob("[0-9]*.snapshot.json"))
    old = [version for version in versions if version <= newest.version - SNAPSHOTS_KEPT]
    if not old:
        return
    oldest_kept = next(version for version in versions if version > old[-1])
    kept = _named(metadata, oldest_kept) | {f"{meta.version}.{name}" for name, meta in newest.meta.items()}
    for version in old:
        for name in _named(metadata, version) - kept:
            _delete(metadata / name)
        _delete(metadata / f"{version}.snapshot.json")


def _named(metadata: Path, version: int) -> set[str]:
    """The file names of the lists that a snapshot names. Versions of a list only rise, so what two snapshots name,
    those between them do, too."""
    snapshot = tuf.read(Snapshot, (metadata / f"{version}.snapshot.json").read_bytes()).signed
    return {f"{meta.version}.{name}" for name, meta in snapshot.meta.items()}


def _delete(path: Path) -> None:
    """One that cannot be deleted now is found again the next time."""
    with contextlib.suppress(OSError):
        path.unlink()
