"""A publisher's machine: sign a model, or take one back, in the repository that lies here.

Rules
- The key is a publisher's own (`<state>/publisher/publisher.key`). Where it is not, nothing is published, and the words
  say what to do instead.
- Only the own list is looked at and changed (`lists.py`): what others signed is theirs.
"""

from pathlib import Path

from fallow.domain.errors import ConfigError
from fallow.domain.ids import Digest
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.files import CouncilPaths
from fallow.trust.council.lists import delisting, listing
from fallow.trust.council.publication import InForce
from fallow.trust.keys import Identity, load


def publish_model(state: Path, manifest: bytes, now_unix_s: float) -> Digest:
    """Sign a model on this machine and put it into this machine's repository; nothing when its list has it already.

    `manifest` is the manifest's canonical bytes: their SHA-256 is the model's digest. Raises `ConfigError` when this
    machine has no publisher's key or no repository, `CharterInvalid` when the key may not publish.
    """
    digest = tuf.sha256(manifest)
    paths = CouncilPaths(state)
    repository = paths.open_repository()
    try:
        publisher = load(paths.publisher_key)
    except FileNotFoundError:
        raise ConfigError(_how_else(digest)) from None
    if not repository.exists:
        raise ConfigError(_how_else(digest))
    in_force = repository.in_force()
    if not _lists(in_force, publisher, digest):
        repository.publish(listing(in_force, tuf.MODELS, {digest: manifest}, publisher, now_unix_s), now_unix_s)
    return digest


def withdraw_model(state: Path, digest: Digest, now_unix_s: float) -> bool:
    """Take a model off this machine's list, if it is on it and this machine may. Another publisher's signature under it
    stays. Raises `CharterInvalid`."""
    paths = CouncilPaths(state)
    repository = paths.open_repository()
    if not repository.exists or not paths.publisher_key.is_file():
        return False
    in_force, publisher = repository.in_force(), load(paths.publisher_key)
    if not _lists(in_force, publisher, digest):
        return False
    repository.publish(delisting(in_force, tuf.MODELS, digest, publisher, now_unix_s), now_unix_s)
    return True


def _lists(state: InForce, publisher: Identity, digest: Digest) -> bool:
    """Whether a publisher's own list names a model."""
    role = tuf.role_held_by(state.targets.signed, tuf.MODELS, publisher.node)
    return role is not None and digest in tuf.listed(role, state.delegated[role][0].signed.targets)


def _how_else(digest: Digest) -> str:
    return (
        "The model is in the store, but no device loads it before a publisher signed it, and this machine has no "
        "publisher's key and repository. A publisher on another machine, with the model in its store, runs "
        f"`fallow council sign-model {digest}`; the council makes publishers with `fallow council propose --publisher`."
    )
