"""Manifests at the edge: canonical bytes out, validated values in.

A manifest's digest names the model everywhere, so its bytes are canonical: ASCII JSON with sorted keys and no space.
What comes from outside is decoded strictly and checked against bounds before any size in it is believed. This module
does no I/O and looks at no weights.
"""

import base64
import hashlib
import json
import math
import re

import msgspec
import numpy as np
from numpy.typing import NDArray

from fallow.domain.errors import ModelError
from fallow.domain.ids import Digest, ModelName
from fallow.domain.model import (
    BLOB_CHUNK_BYTES,
    MANIFEST_FORMAT,
    BlobRef,
    Family,
    Manifest,
    ModelConfig,
    Quantisation,
    RowBounds,
    StageSpec,
    cut_points,
)
from fallow.policy.activations import RowKind, RowRules

MAX_MANIFEST_BYTES = 32 << 20
MAX_LAYERS = 1024
MAX_VOCABULARY = 4 << 20
MAX_HIDDEN_SIZE = 1 << 17
MAX_INTERMEDIATE_SIZE = 1 << 20
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_CONTEXT_LENGTH = 1 << 24
MAX_BLOB_BYTES = 64 << 30
MAX_CHAT_TEMPLATE_CHARS = 1 << 20
MAX_EOS_TOKENS = 64
MAX_SPECIAL_TOKENS = 64
MAX_TEXT_CHARS = 4096
MAX_ROW_KINDS = 2

_NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")
_DIGEST_PATTERN = re.compile(r"[0-9a-f]{64}")


def encode_manifest(manifest: Manifest) -> bytes:
    """Canonical JSON, by the standard library: its number format is the same in every version.

    A manifest without bounds of activations is encoded as it was before there were any, so that its digest stays.
    """
    fields = msgspec.to_builtins(manifest)
    if not manifest.activations:
        del fields["activations"]
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")


def manifest_digest(manifest: Manifest) -> Digest:
    """The model's digest: SHA-256 of its canonical bytes."""
    return Digest(hashlib.sha256(encode_manifest(manifest)).hexdigest())


def decode_manifest(encoded: bytes | bytearray | memoryview) -> Manifest:
    """Parse and check a manifest. Raises `ModelError` that says what was expected and what came."""
    if len(encoded) > MAX_MANIFEST_BYTES:
        raise ModelError(f"manifest: expected at most {MAX_MANIFEST_BYTES} bytes, got {len(encoded)}")
    try:
        manifest = msgspec.json.decode(encoded, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"manifest: not a valid manifest: {error}") from error
    if manifest.format != MANIFEST_FORMAT:
        raise ModelError(f"manifest: expected format {MANIFEST_FORMAT}, got {manifest.format}; update Fallow")
    if encode_manifest(manifest) != bytes(encoded):
        raise ModelError("manifest: its JSON is not canonical, or it has fields that this version does not know")
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Raise `ModelError` unless every size, name, digest and count is sane and they agree with each other."""
    check_name(manifest.name)
    check_config(manifest.config)
    check_quantisable(manifest.config, manifest.quantisation)
    config = manifest.config
    if len(manifest.layers) != config.layer_count:
        raise ModelError(f"manifest: expected {config.layer_count} layer files, got {len(manifest.layers)}")
    for what, ref in _named_refs(manifest):
        check_blob_ref(ref, what)
    _check_duplicates(manifest)
    _check_tokens(manifest)
    row_rules(manifest)
    _check_text("licence", manifest.licence or "", MAX_TEXT_CHARS)
    _check_text("source", manifest.source, MAX_TEXT_CHARS)
    _check_text("chat_template", manifest.chat_template or "", MAX_CHAT_TEMPLATE_CHARS)


def row_rules(manifest: Manifest) -> dict[int, RowRules]:
    """The rules for rows at each cut point that has some, by layer. Raises `ModelError` for what cannot be bounds."""
    rules: dict[int, RowRules] = {}
    cuts = cut_points(manifest.config.layer_count)
    for cut in manifest.activations:
        if cut.layer not in cuts or cut.layer in rules or not 0 < len(cut.kinds) <= MAX_ROW_KINDS:
            raise ModelError(f"activations at layer {cut.layer}: expected each cut point once, with 1 or 2 kinds")
        rules[cut.layer] = RowRules([_row_kind(bounds, manifest.config.hidden_size) for bounds in cut.kinds])
    return rules


def row_bounds(kind: RowKind) -> RowBounds:
    """A kind of row as a manifest keeps it."""
    return RowBounds(
        centre=_packed(kind.centre),
        spread=_packed(kind.spread),
        reach=kind.reach,
        energy_min=kind.energy_min,
        energy_max=kind.energy_max,
    )


def _row_kind(bounds: RowBounds, hidden_size: int) -> RowKind:
    centre, spread = (_unpacked(text, hidden_size) for text in (bounds.centre, bounds.spread))
    if not (spread > 0).all():
        raise ModelError("activations: expected every spread above 0")
    _check_positive("activations.reach", bounds.reach, 1e6)
    _check_positive("activations.energy_max", bounds.energy_max, 1e6)
    if not 0.0 <= bounds.energy_min <= bounds.energy_max:
        raise ModelError(f"activations: expected energy_min from 0 to energy_max, got {bounds.energy_min}")
    return RowKind(centre, spread, bounds.reach, bounds.energy_min, bounds.energy_max)


def _packed(values: NDArray[np.float32]) -> str:
    return base64.b64encode(values.astype("<f2").tobytes()).decode("ascii")


def _unpacked(text: str, count: int) -> NDArray[np.float32]:
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ModelError(f"activations: not base64: {error}") from error
    if len(raw) != 2 * count:
        raise ModelError(f"activations: expected {2 * count} bytes for {count} channels, got {len(raw)}")
    values = np.frombuffer(raw, "<f2").astype(np.float32)
    if not np.isfinite(values).all():
        raise ModelError("activations: expected finite values, got NaN or infinity")
    return values


def check_name(name: str) -> ModelName:
    """A model's name is also a file name and part of an API: a lower-case slug. Raises `ModelError`."""
    if not _NAME_PATTERN.fullmatch(name):
        raise ModelError(
            f"model name {name[:100]!r}: expected 1 to 96 characters of a-z, 0-9, '.', '_' and '-', "
            "starting with a letter or digit"
        )
    return ModelName(name)


def check_blob_ref(ref: BlobRef, what: str) -> None:
    """Raise `ModelError` unless the digests are digests and there is one chunk digest per chunk."""
    _check_range(f"{what}.size_bytes", ref.size_bytes, 1, MAX_BLOB_BYTES)
    for digest in (ref.digest, *ref.chunk_digests):
        if not _DIGEST_PATTERN.fullmatch(digest):
            raise ModelError(f"{what}: expected a digest of 64 lower-case hex digits, got {digest[:80]!r}")
    chunks = -(-ref.size_bytes // BLOB_CHUNK_BYTES)
    if len(ref.chunk_digests) != chunks:
        raise ModelError(
            f"{what}: {ref.size_bytes} bytes are {chunks} chunks, but there are {len(ref.chunk_digests)} chunk digests"
        )


def check_config(config: ModelConfig) -> None:
    """Raise `ModelError` unless the shape is one that an engine can build."""
    _check_range("layer_count", config.layer_count, 1, MAX_LAYERS)
    _check_range("hidden_size", config.hidden_size, 1, MAX_HIDDEN_SIZE)
    _check_range("head_count", config.head_count, 1, MAX_HEADS)
    _check_range("kv_head_count", config.kv_head_count, 1, config.head_count)
    _check_range("head_dim", config.head_dim, 2, MAX_HEAD_DIM)
    _check_range("intermediate_size", config.intermediate_size, 1, MAX_INTERMEDIATE_SIZE)
    _check_range("vocab_size", config.vocab_size, 1, MAX_VOCABULARY)
    _check_range("context_length", config.context_length, 1, MAX_CONTEXT_LENGTH)
    if config.head_count % config.kv_head_count:
        raise ModelError(
            f"config: {config.head_count} heads cannot share {config.kv_head_count} key/value heads evenly"
        )
    if config.head_dim % 2:
        raise ModelError(f"config: expected an even head_dim for rotary embedding, got {config.head_dim}")
    if config.qk_norm != (config.family is Family.QWEN3):
        raise ModelError(f"config: qk_norm is {config.qk_norm}, which family {config.family} does not have")
    _check_positive("norm_epsilon", config.norm_epsilon, 1.0)
    _check_positive("rope_theta", config.rope_theta, 1e12)
    scaling = config.rope_scaling
    if scaling is not None:
        _check_positive("rope_scaling.factor", scaling.factor, 1e6)
        _check_positive("rope_scaling.low_freq_factor", scaling.low_freq_factor, 1e6)
        _check_positive("rope_scaling.high_freq_factor", scaling.high_freq_factor, 1e6)
        _check_range("rope_scaling.original_context_length", scaling.original_context_length, 1, MAX_CONTEXT_LENGTH)
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise ModelError("config: rope_scaling: expected high_freq_factor above low_freq_factor")


def check_quantisable(config: ModelConfig, quantisation: Quantisation) -> None:
    """Raise `ModelError` when a matrix's input size does not divide into blocks of 32."""
    if quantisation is Quantisation.F32:
        return
    inputs = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "head_count * head_dim": config.head_count * config.head_dim,
    }
    for what, size in inputs.items():
        if size % 32:
            raise ModelError(
                f"{quantisation} needs input sizes that divide by 32, but {what} is {size}; import it with f32"
            )


def blob_refs(manifest: Manifest) -> tuple[BlobRef, ...]:
    """Every file of a model: embedding, layers, head, tokenizer."""
    return tuple(ref for _, ref in _named_refs(manifest))


def layer_files(manifest: Manifest, spec: StageSpec) -> tuple[BlobRef, ...]:
    """The files that hosting `spec` needs, each once, in the order of the layers.

    The embedding comes with a piece from 0; the head, and the embedding when it is tied, with one that ends at
    `layer_count`. Raises `ModelError` for a piece outside the model.
    """
    count = manifest.config.layer_count
    needed: dict[Digest, BlobRef] = {}
    for piece in spec.pieces:
        if not 0 <= piece.first < piece.last <= count:
            raise ModelError(f"stage piece {piece} is not inside the model's {count} layers")
        refs = list(manifest.layers[piece.first : piece.last])
        if piece.first == 0:
            refs.insert(0, manifest.embedding)
        if piece.last == count:
            refs.append(manifest.head)
            if manifest.config.tied_head:
                refs.append(manifest.embedding)
        needed.update((ref.digest, ref) for ref in refs)
    return tuple(needed.values())


def _named_refs(manifest: Manifest) -> list[tuple[str, BlobRef]]:
    layers = [(f"layers[{index}]", ref) for index, ref in enumerate(manifest.layers)]
    return [("embedding", manifest.embedding), *layers, ("head", manifest.head), ("tokenizer", manifest.tokenizer)]


def _check_duplicates(manifest: Manifest) -> None:
    """One file may not be two layers: a manifest that says so repeats a layer instead of describing a model."""
    seen: dict[Digest, str] = {}
    for what, ref in _named_refs(manifest):
        if ref.digest in seen:
            raise ModelError(f"manifest: {what} and {seen[ref.digest]} are the same file {ref.digest}")
        seen[ref.digest] = what


def _check_tokens(manifest: Manifest) -> None:
    vocabulary = manifest.config.vocab_size
    if len(manifest.eos_token_ids) > MAX_EOS_TOKENS:
        raise ModelError(
            f"manifest: expected at most {MAX_EOS_TOKENS} eos_token_ids, got {len(manifest.eos_token_ids)}"
        )
    for token in (*manifest.eos_token_ids, *(() if manifest.bos_token_id is None else (manifest.bos_token_id,))):
        _check_range("token id", token, 0, vocabulary - 1)
    if len(manifest.special_tokens) > MAX_SPECIAL_TOKENS:
        raise ModelError(f"manifest: expected at most {MAX_SPECIAL_TOKENS} special tokens")
    for name, text in manifest.special_tokens.items():
        _check_text("special_tokens", name + text, MAX_TEXT_CHARS)


def _check_range(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ModelError(f"{what}: expected {low} to {high}, got {value}")


def _check_positive(what: str, value: float, high: float) -> None:
    if not (math.isfinite(value) and 0.0 < value <= high):
        raise ModelError(f"{what}: expected a number above 0 and at most {high}, got {value}")


def _check_text(what: str, text: str, limit: int) -> None:
    if len(text) > limit:
        raise ModelError(f"manifest: {what}: expected at most {limit} characters, got {len(text)}")
