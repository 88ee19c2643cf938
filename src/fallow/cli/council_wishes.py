"""From the flags of `fallow council propose` to what should be in force."""

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from tuf.api.metadata import Root, Targets

from fallow.cli.council_look import halts_in_force
from fallow.cli.council_place import Place
from fallow.domain.charter import FleetPolicy
from fallow.domain.errors import ConfigError
from fallow.domain.fleet import Tier
from fallow.domain.ids import Digest, NodeId
from fallow.policy.council import resuming_epoch
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.ceremonies import Wanted
from fallow.trust.council.files import member_of_text
from fallow.trust.council.proposals import Base, verify_base

_KEY = re.compile(r"[0-9a-f]{64}")


class SeatWish(msgspec.Struct, frozen=True):
    """Who should sit in the council, and which key the registrar should have."""

    add: tuple[str, ...]
    remove: tuple[str, ...]
    threshold: int | None
    online: str | None


class PolicyWish(msgspec.Struct, frozen=True, kw_only=True):
    """What the policy should say."""

    allow: tuple[str, ...]
    forbid: tuple[str, ...]
    allow_all: bool
    resume: bool
    values: Mapping[str, Any]
    """Dotted field to value; `None`: as it is."""


class PublisherWish(msgspec.Struct, frozen=True):
    """Who should publish: `KIND=NAME:KEY`, and who no more: `KIND=NAME` or `KIND=KEY`."""

    add: tuple[str, ...]
    remove: tuple[str, ...]
    withdraw: tuple[str, ...] = ()
    """`KIND=NAME:DIGEST`, a model's local name instead of a digest, or `KIND=NAME:all`."""


def wanted_of(
    place: Place, base: Base, seats: SeatWish, policy: PolicyWish, publishers: PublisherWish
) -> Wanted | None:
    """What should be in force; `None` when it is already. Raises `ConfigError`, `SignatureInvalid`."""
    root, targets, current = verify_base(base)
    held = tuf.publishers(targets)
    members = _members(place, tuf.member_names(root), seats)
    staying = frozenset(tuf.member_names(root) if members is None else members)
    wanted = Wanted(
        policy=_policy(place, root, current, policy, staying),
        members=members,
        threshold=seats.threshold if seats.threshold != root.roles[Root.type].threshold else None,
        online=_key(seats.online) if seats.online is not None else None,
        publishers=_publishers(held, publishers),
        withdraw=_withdrawn(place, base, publishers.withdraw),
    )
    return None if wanted == Wanted() else wanted


def _members(place: Place, now: Mapping[NodeId, str], wish: SeatWish) -> Mapping[NodeId, str] | None:
    members = dict(now)
    for text in wish.remove:
        members.pop(_found(text, members, "member"))
    for text in wish.add:
        node, name = member_of_text(text, place.network)
        members[node] = name
    return members if members != now else None


def _publishers(now: Mapping[str, NodeId], wish: PublisherWish) -> dict[str, NodeId] | None:
    """By role. A name that is there already gets another key, and keeps its list."""
    held = dict(now)
    for text in wish.remove:
        kind, who = _kind_of(text)
        people = {key: tuf.kind_and_name(role)[1] for role, key in held.items() if tuf.kind_and_name(role)[0] == kind}
        del held[tuf.role_of(kind, people[_found(who, people, f"publisher of {kind}")])]
    for text in wish.add:
        kind, who = _kind_of(text)
        name, _, key = who.rpartition(":")
        held[tuf.role_of(kind, name)] = _key(key)
    return held if held != now else None


def _kind_of(text: str) -> tuple[str, str]:
    """`KIND=REST`, apart."""
    kind, _, rest = text.partition("=")
    if kind not in tuf.KINDS or not rest:
        raise ConfigError(f"Expected KIND=NAME… with the kind {' or '.join(tuf.KINDS)}, got {text[:100]!r}.")
    return kind, rest


def _withdrawn(place: Place, base: Base, wishes: tuple[str, ...]) -> dict[str, frozenset[str]] | None:
    found: dict[str, frozenset[str]] = {}
    for text in wishes:
        kind, rest = _kind_of(text)
        name, _, what = rest.partition(":")
        role = tuf.role_of(kind, name)
        if role not in base.delegated or not what:
            raise ConfigError(
                f"Expected {kind}=NAME:WHAT or {kind}=NAME:all with the name of a publisher, got {text[:100]!r}."
            )
        if what == "all":
            paths = frozenset(tuf.read(Targets, base.delegated[role]).signed.targets)
        else:
            paths = frozenset({tuf.path_of(role, _model(place, what) if kind == tuf.MODELS else what)})
        found[role] = found.get(role, frozenset()) | paths
    return found or None


def _policy(
    place: Place, root: Root, now: FleetPolicy, wish: PolicyWish, staying: frozenset[NodeId]
) -> FleetPolicy | None:
    """`staying`: the members whose halts hold after the proposal. Those of the others end by themselves."""
    fields = msgspec.to_builtins(now)
    for name, value in wish.values.items():
        if value is None:
            continue
        group, _, field = name.rpartition(".")
        target = fields[group] if group else fields
        target[field] = _tier(value) if field == "tier_min" else value
    fields["allowed_models"] = _allowed(place, now, wish)
    try:
        wanted = msgspec.convert(fields, FleetPolicy)
    except msgspec.ValidationError as error:
        raise ConfigError(f"That is no policy: {error}.") from None
    if wanted == now and not wish.resume:
        return None
    halts = halts_in_force(place.fetcher(), root, place, now.epoch)
    ending = (halt for signer, halt in halts if signer in staying)
    epoch = resuming_epoch(now, ending) if wish.resume else now.epoch + 1
    return msgspec.structs.replace(wanted, epoch=epoch)


def _allowed(place: Place, now: FleetPolicy, wish: PolicyWish) -> tuple[Digest, ...] | None:
    if wish.allow_all:
        return None
    allowed = dict.fromkeys(now.allowed_models or ())
    allowed |= dict.fromkeys(_model(place, text) for text in wish.allow)
    for text in wish.forbid:
        if now.allowed_models is None:
            raise ConfigError("All models are allowed: name those that should be with --allow-model instead.")
        allowed.pop(_model(place, text), None)
    return None if now.allowed_models is None and not wish.allow else tuple(allowed)


def _model(place: Place, text: str) -> Digest:
    from fallow.models.store import Store

    if _KEY.fullmatch(text):
        return Digest(text)
    digest, _ = Store(place.paths.state / "models").by_name(text)
    return Digest(digest)


def _tier(text: str) -> int:
    try:
        return Tier[text.upper()]
    except KeyError:
        raise ConfigError(f"Expected one of {', '.join(each.name.lower() for each in Tier)}, got {text!r}.") from None


def _key(text: str) -> NodeId:
    if not _KEY.fullmatch(text):
        raise ConfigError(f"Expected a public key of 64 hex digits, got {text[:80]!r}.")
    return NodeId(text)


def _found(text: str, people: Mapping[NodeId, str], what: str) -> NodeId:
    nodes = [node for node, name in people.items() if text in {name, node}]
    if len(nodes) != 1:
        names = ", ".join(f"{name} ({node[:8]}…)" for node, name in people.items())
        raise ConfigError(f"Expected one {what}'s name or key, got {text[:80]!r}. There are: {names}.")
    return nodes[0]
