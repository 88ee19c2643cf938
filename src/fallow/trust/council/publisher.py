"""A publisher's work: list a model or a release, sign the list, hand it to the repository.

Rules
- A publisher signs one file's digest under one fixed path; the list otherwise stays as it was.
- The key is a publisher's own (`<state>/publisher/publisher.key`). Where it is not, nothing is published, and the words
  say what to do instead.
- What makes a manifest good is not looked at here: a publisher vouches for it.
"""

from pathlib import Path

from tuf.api.metadata import Metadata, TargetFile, Targets

from fallow.domain.errors import CharterInvalid, ConfigError
from fallow.domain.ids import Digest
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.files import CouncilPaths
from fallow.trust.council.publication import InForce, Publication
from fallow.trust.keys import Identity, load


def listing(state: InForce, role: str, files: dict[str, bytes], publisher: Identity, now_unix_s: float) -> Publication:
    """A publication that adds files to a role's list, or replaces them. Raises `CharterInvalid`."""
    if publisher.node not in tuf.publishers(state.targets.signed, role).values():
        raise CharterInvalid(
            f"the council has not made {publisher.node[:16]}… a publisher of {role}: "
            f"`fallow council propose --publisher {role}=NAME:{publisher.node}`"
        )
    old, _ = state.delegated[role]
    targets = dict(old.signed.targets)
    for path, data in files.items():
        targets[path] = TargetFile.from_data(path, data, ["sha256"])
        refusal = tuf.why_not_listed(role, path, targets[path])
        if refusal is not None:
            raise CharterInvalid(refusal)
    new = Metadata(
        Targets(version=old.signed.version + 1, expires=tuf.utc(now_unix_s + tuf.LIST_LIFE_S), targets=targets)
    )
    return Publication(delegated={role: tuf.sign(new, [publisher]).to_bytes()}, files=files)


def delisting(state: InForce, role: str, path: str, publisher: Identity, now_unix_s: float) -> Publication:
    """A publication that takes a file off a role's list: devices load it no more. Raises `CharterInvalid`."""
    publication = listing(state, role, {}, publisher, now_unix_s)
    metadata = tuf.read(Targets, publication.delegated[role])
    if metadata.signed.targets.pop(path, None) is None:
        raise CharterInvalid(f"{path} is not listed")
    metadata.signatures.clear()
    return Publication(delegated={role: tuf.sign(metadata, [publisher]).to_bytes()})


def publish_model(state: Path, manifest: bytes, now_unix_s: float) -> Digest:
    """Sign a model on this machine and put it into this machine's repository; does nothing when it is listed already.

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
    listed = in_force.delegated.get(tuf.MODELS)
    if listed is None or digest not in tuf.signed_models(listed[0].signed.targets):
        files = {f"models/{digest}.json": manifest}
        repository.publish(listing(in_force, tuf.MODELS, files, publisher, now_unix_s), now_unix_s)
    return digest


def withdraw_model(state: Path, digest: Digest, now_unix_s: float) -> bool:
    """Take a model off this machine's list, if it is on it and this machine may. Raises `CharterInvalid`."""
    paths = CouncilPaths(state)
    repository = paths.open_repository()
    if not repository.exists or not paths.publisher_key.is_file():
        return False
    in_force = repository.in_force()
    if digest not in tuf.signed_models(in_force.delegated[tuf.MODELS][0].signed.targets):
        return False
    publisher = load(paths.publisher_key)
    repository.publish(delisting(in_force, tuf.MODELS, f"models/{digest}.json", publisher, now_unix_s), now_unix_s)
    return True


def _how_else(digest: Digest) -> str:
    return (
        "The model is in the store, but no device loads it before a publisher signed it, and this machine has no "
        "publisher's key and repository. A publisher on another machine, with the model in its store, runs "
        f"`fallow council sign-model {digest}`; the council makes publishers with `fallow council propose --publisher`."
    )
