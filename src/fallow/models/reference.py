"""The float32 reference: a small, plain numpy forward pass of every family, with a KV cache.

It is what `model check` and the tests compare the engine with, so it is written to be read, not to be fast: one
sequence, one layer after the other, no fusion. Weights come from a checkpoint's reader (the original values) or from a
model in the store (what its quantisation made of them), one layer at a time.

Formulas follow the Llama architecture as transformers implements it: RMSNorm, half-split rotary embedding, grouped
query attention, SwiGLU; Qwen2 adds q/k/v biases, Qwen3 a norm of each query and key head before the rotation.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fallow.domain.errors import BlobUnavailable, ModelError
from fallow.domain.model import BlobRef, Manifest, ModelConfig, Quantisation
from fallow.models.quantise import dequantise
from fallow.models.rope_factors import llama3_factors
from fallow.models.source import QUERY_KEY_VALUE, WeightSource
from fallow.models.store import Store
from fallow.models.tensors import Part, Tensors, expected_matrices, matrix_quantisation, open_tensors

Floats = NDArray[np.float32]
LayerWeights = dict[str, Floats]
"""Names and shapes as in `Manifest`, matrices as float32 `[out, in]`."""


class Weights(Protocol):
    """Float32 weights, read when asked for."""

    @property
    def config(self) -> ModelConfig: ...

    def embedding(self) -> Floats:
        """`[vocab, hidden]`"""
        ...

    def layer(self, index: int) -> LayerWeights: ...

    def head(self) -> tuple[Floats, Floats]:
        """The final norm `[hidden]` and the head `[vocab, hidden]`."""
        ...


class SourceWeights:
    """The original values of a checkpoint."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    @property
    def config(self) -> ModelConfig:
        return self._source.config

    def embedding(self) -> Floats:
        return self._matrix("embedding")

    def layer(self, index: int) -> LayerWeights:
        config = self.config
        weights: LayerWeights = {
            "qkv": np.concatenate([self._matrix(role, index) for role in QUERY_KEY_VALUE]),
            "attention_out": self._matrix("attention_out", index),
            "gate_up": np.concatenate([self._matrix("gate", index), self._matrix("up", index)]),
            "down": self._matrix("down", index),
        }
        if config.qkv_bias:
            weights["qkv_bias"] = np.concatenate([self._vector(f"{role}_bias", index) for role in QUERY_KEY_VALUE])
        norms = ("attention_norm", "mlp_norm", "q_norm", "k_norm") if config.qk_norm else ("attention_norm", "mlp_norm")
        return weights | {name: self._vector(name, index) for name in norms}

    def head(self) -> tuple[Floats, Floats]:
        matrix = self._matrix("embedding" if self.config.tied_head else "head")
        return self._source.tensor("final_norm").vector(), matrix

    def _matrix(self, role: str, layer: int | None = None) -> Floats:
        tensor = self._source.tensor(role, layer)
        return tensor.values(0, tensor.shape[0])

    def _vector(self, role: str, layer: int) -> Floats:
        return self._source.tensor(role, layer).vector()


class StoredWeights:
    """The dequantised values of a model in the store. Raises `BlobUnavailable` for a file that is not there."""

    def __init__(self, manifest: Manifest, store: Store) -> None:
        self._manifest = manifest
        self._store = store

    @property
    def config(self) -> ModelConfig:
        return self._manifest.config

    def embedding(self) -> Floats:
        return self._part(Part.EMBEDDING, self._manifest.embedding)["embedding"]

    def layer(self, index: int) -> LayerWeights:
        return self._part(Part.LAYER, self._manifest.layers[index])

    def head(self) -> tuple[Floats, Floats]:
        tensors = self._part(Part.HEAD, self._manifest.head)
        return tensors["final_norm"], self.embedding() if self.config.tied_head else tensors["head"]

    def _part(self, part: Part, ref: BlobRef) -> LayerWeights:
        tensors = open_tensors(self._path(ref), self.config, self._manifest.quantisation, part)
        stored = matrix_quantisation(self._manifest.quantisation, part)
        matrices = expected_matrices(self.config, part)
        weights = {name: tensors[name] for name in tensors if name.partition(".")[0] not in matrices}
        return weights | {name: _matrix(tensors, name, stored) for name in matrices}

    def _path(self, ref: BlobRef) -> Path:
        path = self._store.blob_path(ref.digest)
        if path is None:
            raise BlobUnavailable(f"file {ref.digest} of model {self._manifest.name} is not in the store")
        return path


class ReferenceModel:
    """One sequence through a whole model. Each `logits` call continues where the last one ended.

    `cached_layers` bounds how many layers' weights stay in memory between calls.
    """

    def __init__(self, weights: Weights, cached_layers: int = 64) -> None:
        self.config = weights.config
        self._layer = lru_cache(maxsize=cached_layers)(weights.layer)
        self._embedding = weights.embedding()
        self._final_norm, self._head = weights.head()
        self._frequencies = rope_frequencies(self.config)
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        empty = np.zeros((0, self.config.kv_head_count, self.config.head_dim), dtype=np.float32)
        self._keys = [empty] * self.config.layer_count
        self._values = [empty] * self.config.layer_count

    @property
    def position(self) -> int:
        """Tokens so far."""
        return len(self._keys[0])

    def hidden(self, tokens: Sequence[int] | NDArray[np.int32]) -> Floats:
        """The residual stream after the last layer, before the final norm, `[n, hidden]`. Raises `ModelError`."""
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.ndim != 1 or ids.size == 0 or ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ModelError(f"expected one or more token ids below {self.config.vocab_size}")
        if self.position + len(ids) > self.config.context_length:
            raise ModelError(f"the context of {self.config.context_length} tokens is full")
        rows: Floats = self._embedding[ids]
        cosine, sine = self._rotation(len(ids))
        for index in range(self.config.layer_count):
            weights = self._layer(index)
            rows = rows + self._attention(index, weights, rows, cosine, sine)
            normed = rms_norm(rows, weights["mlp_norm"], self.config.norm_epsilon)
            rows = rows + _mlp(weights, normed)
        return rows

    def logits(self, tokens: Sequence[int] | NDArray[np.int32]) -> Floats:
        """Logits after each of these tokens, float32 `[n, vocab]`. Raises `ModelError` for ids out of range."""
        normed = rms_norm(self.hidden(tokens), self._final_norm, self.config.norm_epsilon)
        return normed @ self._head.T

    def _rotation(self, count: int) -> tuple[Floats, Floats]:
        positions = np.arange(self.position, self.position + count, dtype=np.float64)
        angles = np.outer(positions, self._frequencies)[:, None, :]
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def _attention(self, index: int, weights: LayerWeights, rows: Floats, cosine: Floats, sine: Floats) -> Floats:
        config = self.config
        normed = rms_norm(rows, weights["attention_norm"], config.norm_epsilon)
        query, key, value = split_heads(config, weights, normed @ weights["qkv"].T)
        self._keys[index] = np.concatenate((self._keys[index], rotate(key, cosine, sine)))
        self._values[index] = np.concatenate((self._values[index], value))
        mixed = attend(rotate(query, cosine, sine), self._keys[index], self._values[index])
        return mixed.reshape(len(rows), -1) @ weights["attention_out"].T


def rms_norm(rows: Floats, weight: Floats, epsilon: float) -> Floats:
    """Rows over their root mean square, times `weight`; along the last axis."""
    mean_square = np.mean(np.square(rows), axis=-1, keepdims=True)
    normed: Floats = rows / np.sqrt(mean_square + np.float32(epsilon)) * weight
    return normed


def split_heads(config: ModelConfig, weights: Mapping[str, Floats], qkv: Floats) -> tuple[Floats, Floats, Floats]:
    """Query, key and value, `[rows, heads of each, D]`, of the products `[rows, all heads x D]`: with their biases and
    norms, where the family has them, and not rotated yet."""
    if config.qkv_bias:
        qkv = qkv + weights["qkv_bias"]
    heads = qkv.reshape(len(qkv), -1, config.head_dim)
    query, key, value = np.split(heads, [config.head_count, config.head_count + config.kv_head_count], axis=1)
    if config.qk_norm:
        query = rms_norm(query, weights["q_norm"], config.norm_epsilon)
        key = rms_norm(key, weights["k_norm"], config.norm_epsilon)
    return query, key, value


def rotate(heads: Floats, cosine: Floats, sine: Floats) -> Floats:
    """Half-split rotary embedding of `[n, heads, head_dim]` by angles `[n, 1, head_dim / 2]`."""
    first, second = np.split(heads, 2, axis=-1)
    return np.concatenate((first * cosine - second * sine, second * cosine + first * sine), axis=-1)


def attend(query: Floats, keys: Floats, values: Floats) -> Floats:
    """Causal grouped-query attention: `[n, heads, d]` over `[t, kv_heads, d]`; queries are the last n positions."""
    count, heads, head_dim = query.shape
    total, groups = len(keys), heads // keys.shape[1]
    grouped = query.reshape(count, keys.shape[1], groups, head_dim)
    scores = np.einsum("nhgd,thd->hgnt", grouped, keys, optimize=True) / np.float32(math.sqrt(head_dim))
    future = np.arange(total)[None, :] > np.arange(total - count, total)[:, None]
    scores = np.where(future, np.float32(-np.inf), scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed: Floats = np.einsum("hgnt,thd->nhgd", weights, values, optimize=True)
    return mixed.reshape(count, heads, head_dim)


def rope_frequencies(config: ModelConfig) -> NDArray[np.float64]:
    """Rotary frequencies with scaling applied, float64 `[head_dim / 2]`."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies: NDArray[np.float64] = config.rope_theta**-exponents
    if config.rope_scaling is None:
        return frequencies
    return frequencies / llama3_factors(config.rope_scaling, config.head_dim, config.rope_theta)


def _mlp(weights: LayerWeights, normed: Floats) -> Floats:
    gate, up = np.split(normed @ weights["gate_up"].T, 2, axis=-1)
    with np.errstate(over="ignore"):  # exp(-gate) may overflow to infinity, which gives the right limit, 0
        activated: Floats = gate / (1 + np.exp(-gate)) * up
    return activated @ weights["down"].T


def _matrix(tensors: Tensors, name: str, stored: Quantisation) -> Floats:
    if stored is Quantisation.F32:
        return tensors[name]
    return dequantise(tensors[f"{name}.{stored}"], tensors[f"{name}.scales"], stored)
