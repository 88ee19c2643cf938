"""The simulated model: a manifest of tiny files, a catalogue entry with the scenario's sizes, the right answers.

`undisturbed` is the yardstick of every session: what one device that never fails would have answered. It shares the
arithmetic with `MemoryEngine` and nothing else, so a row that the fleet loses, doubles, reorders or alters shows.
"""

import hashlib
from collections.abc import Sequence
from typing import Final

import msgspec

from fallow.domain.fleet import ModelEntry
from fallow.domain.frames import Phase
from fallow.domain.ids import Digest, ModelName
from fallow.domain.model import BlobRef, Family, Manifest, ModelConfig, Quantisation
from fallow.engine.memory import choice, next_row
from fallow.models.manifest import encode_manifest
from fallow.simulator.disk import TRANSFER_BYTES
from fallow.simulator.scenario import SimulatedModel

VOCABULARY: Final = 4096
CONTEXT_TOKENS: Final = 8192
HEAD_DIM_MAX: Final = 1024
FLOAT_BYTES: Final = 4


class BuiltModel(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the world tells its parts about the model."""

    manifest: Manifest
    entry: ModelEntry
    pieces: dict[Digest, int]
    """For each file, in how many pieces it travels."""

    @property
    def digest(self) -> Digest:
        return self.entry.model


def build(model: SimulatedModel) -> BuiltModel:
    """The model of a scenario."""

    def file(name: str) -> BlobRef:
        digest = Digest(hashlib.sha256(name.encode()).hexdigest())
        return BlobRef(digest=digest, size_bytes=1000, chunk_digests=(digest,))

    layers = tuple(file(f"layer {index}") for index in range(model.layer_count))
    embedding, head, tokenizer = file("embedding"), file("head"), file("tokenizer")
    manifest = Manifest(
        format=1,
        name=ModelName("simulated"),
        config=_config(model),
        quantisation=Quantisation.F32,
        embedding=embedding,
        layers=layers,
        head=head,
        tokenizer=tokenizer,
        chat_template=None,
        bos_token_id=None,
        eos_token_ids=(0,),
    )
    encoded = encode_manifest(manifest)
    sizes = {embedding.digest: model.embedding_bytes, head.digest: model.head_bytes, tokenizer.digest: 1}
    sizes |= {layer.digest: model.layer_bytes for layer in layers}
    entry = ModelEntry(
        name=manifest.name,
        model=Digest(hashlib.sha256(encoded).hexdigest()),
        manifest_bytes=len(encoded),
        config=manifest.config,
        quantisation=manifest.quantisation,
        weights_bytes=(model.embedding_bytes, model.head_bytes, (model.layer_bytes,) * model.layer_count),
        created_unix_s=0,
    )
    pieces = {digest: -(-size // TRANSFER_BYTES) for digest, size in sizes.items()}
    return BuiltModel(manifest=manifest, entry=entry, pieces=pieces)


def _config(model: SimulatedModel) -> ModelConfig:
    # Keys and values in float32, as the engine keeps them.
    kv_values = max(2, model.kv_bytes_per_token_layer // (2 * FLOAT_BYTES))
    head_dim = next(size for size in range(min(HEAD_DIM_MAX, kv_values), 0, -1) if kv_values % size == 0)
    return ModelConfig(
        family=Family.LLAMA,
        layer_count=model.layer_count,
        hidden_size=max(1, model.activation_bytes_per_row // 2),
        head_count=kv_values // head_dim,
        kv_head_count=kv_values // head_dim,
        head_dim=head_dim,
        intermediate_size=4 * max(1, model.activation_bytes_per_row // 2),
        vocab_size=VOCABULARY,
        context_length=CONTEXT_TOKENS,
        norm_epsilon=1e-5,
        rope_theta=1e4,
    )


class Undisturbed:
    """One conversation on a device that never fails. Tokens go in, the next one comes out."""

    def __init__(self, layer_count: int) -> None:
        self._prefix = [0] * layer_count

    def feed(self, tokens: Sequence[int], phase: Phase) -> int:
        """The token that follows, after these were appended in one phase."""
        row = 0
        for token in tokens:
            row = next_row(self._prefix, 0, token, phase)
        return choice(row, VOCABULARY)
