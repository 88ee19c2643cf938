"""A publisher's list: entries added, taken off, and signed.

Rules
- A publisher signs one file's digest under one path of their own; the list otherwise stays as it was, but that a model
  takes the place of another one of its name: of two, whoever captured a gateway could choose. Nobody else's list is
  touched, and no other key can sign this one.
- What makes a manifest good is not looked at here: a publisher vouches for it.
- No file, no network, no clock: the time is passed in.
"""

from collections.abc import Mapping

from tuf.api.metadata import Metadata, TargetFile, Targets

from fallow.domain.errors import CharterInvalid
from fallow.domain.ids import NodeId
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.figures import signed_figures, target_of
from fallow.trust.council.publication import InForce, Publication
from fallow.trust.keys import Identity


def listing(
    state: InForce, kind: str, files: Mapping[str, bytes], publisher: Identity, now_unix_s: float
) -> Publication:
    """A publication that adds files to the publisher's own list, or signs the list again as it is without any.

    `files`: by digest or version. Older models of the same names leave the list. Raises `CharterInvalid`.
    """
    role = own_role(state, kind, publisher.node)
    added = {tuf.path_of(role, what): (what, data) for what, data in files.items()}
    new = {path: target_of(path, data) for path, (_, data) in added.items()}
    names = {figures.name for figures in map(signed_figures, new.values()) if figures is not None}
    targets = {
        path: target
        for path, target in state.delegated[role][0].signed.targets.items()
        if (figures := signed_figures(target)) is None or figures.name not in names
    } | new
    for path in new:
        refusal = tuf.why_not_listed(role, path, targets[path])
        if refusal is not None:
            raise CharterInvalid(refusal)
    signed = _signed(state, role, targets, publisher, now_unix_s)
    return Publication(delegated={role: signed}, files={path: data for path, (_, data) in added.items()})


def delisting(state: InForce, kind: str, what: str, publisher: Identity, now_unix_s: float) -> Publication:
    """A publication that takes a digest or version off the publisher's own list: devices load it no more, unless
    another publisher signed it, too. Raises `CharterInvalid`."""
    role = own_role(state, kind, publisher.node)
    targets = dict(state.delegated[role][0].signed.targets)
    if targets.pop(tuf.path_of(role, what), None) is None:
        raise CharterInvalid(f"{what[:80]} is not listed in {role}")
    return Publication(delegated={role: _signed(state, role, targets, publisher, now_unix_s)})


def signers_of(state: InForce, kind: str, what: str) -> tuple[str, ...]:
    """The roles whose lists name a digest or version, in the council's order."""
    lists = ((role, state.delegated[role][0].signed.targets) for role in tuf.publishers(state.targets.signed))
    return tuple(
        role for role, targets in lists if tuf.kind_and_name(role)[0] == kind and what in tuf.listed(role, targets)
    )


def own_role(state: InForce, kind: str, node: NodeId) -> str:
    """The role of a key. Raises `CharterInvalid` when the council gave it none."""
    role = tuf.role_held_by(state.targets.signed, kind, node)
    if role is None:
        raise CharterInvalid(
            f"the council has not made {node[:16]}… a publisher of {kind}: "
            f"`fallow council propose --publisher {kind}=NAME:{node}`"
        )
    return role


def _signed(state: InForce, role: str, targets: dict[str, TargetFile], publisher: Identity, now_unix_s: float) -> bytes:
    version = state.delegated[role][0].signed.version + 1
    new = Metadata(Targets(version=version, expires=tuf.utc(now_unix_s + tuf.LIST_LIFE_S), targets=targets))
    return tuf.sign(new, [publisher]).to_bytes()
