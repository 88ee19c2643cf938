"""Whose word on models counts no more. Pure.

A store is believed about what it serves until its key is revoked, or it has been silent for long and others tell of the
same models. Of two that differ on a model, the one that came first counts (`registry.py`).
"""

from collections.abc import Callable, Mapping

from fallow.coordinator.registry import STORE_FORGOTTEN_S, STORE_SILENCE_MAX_S, HeardStore
from fallow.domain.ids import NodeId


def stores_to_drop(
    stores: Mapping[NodeId, HeardStore], revoked: Callable[[NodeId], bool], now_s: float
) -> tuple[NodeId, ...]:
    """Stores whose word counts no more: of revoked keys, and those long silent of whose models others tell."""
    fresh = {
        entry.model
        for heard in stores.values()
        if now_s - heard.heard_s <= STORE_SILENCE_MAX_S
        for entry in heard.announced.models
    }

    def replaced(heard: HeardStore) -> bool:
        silent = now_s - heard.heard_s > STORE_FORGOTTEN_S
        return silent and all(entry.model in fresh for entry in heard.announced.models)

    return tuple(node for node, heard in stores.items() if revoked(node) or replaced(heard))
