"""The figures of a model that coordinators place and route by: from its manifest, and as a store announces them.

Rules
- Both ways give the same figures for an honest store, so that they can be compared, and a difference be named.
- What is in them is what placement, routing and the catalogue use, and nothing else: an announcement's other fields
  (when a model was added) are nobody's to sign.
- Pure: who signed figures, and whether a manifest is the one of its digest, was seen to before (`trust/council/`).
"""

from enum import StrEnum

import msgspec

from fallow.domain.charter import ModelFigures
from fallow.domain.fleet import ModelEntry
from fallow.domain.model import Manifest


def figures_of_manifest(manifest: Manifest, manifest_bytes: int) -> ModelFigures:
    """What a publisher signs. `manifest_bytes`: the length of the encoded manifest."""
    return ModelFigures(
        name=manifest.name,
        manifest_bytes=manifest_bytes,
        quantisation=manifest.quantisation,
        layer_bytes=tuple(layer.size_bytes for layer in manifest.layers),
        embedding_bytes=manifest.embedding.size_bytes,
        head_bytes=manifest.head.size_bytes,
        tied_head=manifest.config.tied_head,
        hidden_size=manifest.config.hidden_size,
        kv_head_count=manifest.config.kv_head_count,
        head_dim=manifest.config.head_dim,
    )


def figures_of_entry(entry: ModelEntry) -> ModelFigures:
    """What a store announces. Its `layer_count` is that of its layers' sizes: who took the message saw to that."""
    embedding, head, layers = entry.weights_bytes
    return ModelFigures(
        name=entry.name,
        manifest_bytes=entry.manifest_bytes,
        quantisation=entry.quantisation,
        layer_bytes=layers,
        embedding_bytes=embedding,
        head_bytes=head,
        tied_head=entry.config.tied_head,
        hidden_size=entry.config.hidden_size,
        kv_head_count=entry.config.kv_head_count,
        head_dim=entry.config.head_dim,
    )


def difference(signed: ModelFigures, announced: ModelFigures) -> str:
    """The first figure that differs, for a person; empty when none does."""
    for field in msgspec.structs.fields(ModelFigures):
        ours, theirs = getattr(signed, field.name), getattr(announced, field.name)
        if ours != theirs:
            return f"{field.name} {_short(theirs)} and not {_short(ours)}"
    return ""


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return f"of {len(value)} layers, {sum(value)} together"
    return f"{value:.40}" if isinstance(value, StrEnum) else f"{value!r:.40}"
