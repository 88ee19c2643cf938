"""What stores tell of models, and how much of it counts. Pure.

Rules
- Under a charter a store is believed about a model only where it announces the figures that a publisher signed beside
  the manifest's digest. Its word on that model is ignored otherwise, as if it had not told of it; others' counts. A
  model that nobody signed is shown as it is told: it is never placed.
- In the development mode there is no charter, and every word counts.
- Of two models of one name, a signed one comes before one that is not; then the one whose publisher the council named
  first; then, as no list names two of one name, the one of the lower digest: never by who told of it first. Of two
  that nobody signed, the one that was told of first. Of two stores that differ on a model, the first that is believed
  counts.
- A store's word ends when its key is revoked, or it has been silent for long and others tell of the same models.
"""

from collections.abc import Callable, Iterable, Mapping

import msgspec

from fallow.domain.charter import Charter
from fallow.domain.errors import BusMessageError
from fallow.domain.fleet import ModelEntry, StoreAnnounced
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import Digest, NodeId
from fallow.policy.figures import difference, figures_of_entry

STORES_MAX = 16
STORE_SILENCE_MAX_S = 15.0
"""Its models stay in the catalogue, because devices have them; but it is no longer the first to be asked for files."""
STORE_FORGOTTEN_S = 600.0
"""One that was not heard of for so long gives its place to a new one, where there is no other."""


class HeardStore(msgspec.Struct, frozen=True):
    """A store's last announcement, and when it came."""

    announced: StoreAnnounced
    heard_s: float


def why_disbelieved(entry: ModelEntry, charter: Charter | None) -> str | None:
    """Why a store's word on a model does not count, for a person; `None` when it does."""
    if charter is None or entry.model not in charter.models:
        return None
    signed = charter.signed.get(entry.model)
    if signed is None or not signed.figures:
        return f"{entry.name}: no publisher signed its figures with it; its publisher signs it again"
    told = figures_of_entry(entry)
    if told in signed.figures:
        return None
    return f"{entry.name}: it tells {difference(signed.figures[0], told)}, as its publisher signed"


def believed(announced: StoreAnnounced, charter: Charter | None) -> tuple[ModelEntry, ...]:
    """The models on which a store's word counts."""
    return tuple(entry for entry in announced.models if why_disbelieved(entry, charter) is None)


def disbelieved(announced: StoreAnnounced, charter: Charter | None) -> tuple[BusMessageError, ...]:
    """Of each model on which it does not, why."""
    whys = (why_disbelieved(entry, charter) for entry in announced.models)
    return tuple(BusMessageError(f"store {announced.address.node[:8]}, {why}") for why in whys if why is not None)


def catalogue_of(stores: Iterable[HeardStore], charter: Charter | None) -> dict[Digest, ModelEntry]:
    """What all stores together serve; who comes first in it keeps its name."""
    told = [entry for heard in stores for entry in believed(heard.announced, charter)]
    names: set[str] = set()
    found: dict[Digest, ModelEntry] = {}
    for entry in sorted(told, key=lambda each: _rank(each.model, charter)):
        if entry.name not in names and entry.model not in found:
            names.add(entry.name)
            found[entry.model] = entry
    return found


def _rank(model: Digest, charter: Charter | None) -> tuple[bool, int, str]:
    """Whose claim on a name comes first: the lowest."""
    signed = charter.signed.get(model) if charter is not None else None
    return (True, 0, "") if signed is None else (False, signed.rank, model)


def store_sources(
    stores: Iterable[HeardStore], model: Digest, charter: Charter | None, now_s: float
) -> tuple[list[PeerAddress], list[PeerAddress]]:
    """Stores that have files of a model: those heard of lately, and those that have been silent for long."""
    fresh: list[PeerAddress] = []
    stale: list[PeerAddress] = []
    for heard in stores:
        if any(entry.model == model for entry in believed(heard.announced, charter)):
            silent = now_s - heard.heard_s > STORE_SILENCE_MAX_S
            (stale if silent else fresh).append(heard.announced.address)
    return fresh, stale


def stores_to_drop(
    stores: Mapping[NodeId, HeardStore], charter: Charter | None, revoked: Callable[[NodeId], bool], now_s: float
) -> tuple[NodeId, ...]:
    """Stores whose word counts no more: of revoked keys, and those long silent of whose models others tell."""
    fresh = {
        entry.model
        for heard in stores.values()
        if now_s - heard.heard_s <= STORE_SILENCE_MAX_S
        for entry in believed(heard.announced, charter)
    }

    def replaced(heard: HeardStore) -> bool:
        silent = now_s - heard.heard_s > STORE_FORGOTTEN_S
        return silent and all(entry.model in fresh for entry in believed(heard.announced, charter))

    return tuple(node for node, heard in stores.items() if revoked(node) or replaced(heard))
