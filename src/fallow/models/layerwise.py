"""Layers in plain NumPy, straight from their files, over many sequences at once and in little memory.

`reference.py` is a whole model with a cache, to be read; this is a run of layers without one, to be used where a model
may be large: a matrix is dequantised `BLOCK_ELEMENTS` at a time. Two independent parts of Fallow rest on it: the known
answers of the engine's canary, and the bounds of activations that an import measures. Float32 throughout; every
sequence starts at position 0.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fallow.domain.model import ModelConfig, Quantisation
from fallow.models.quantise import dequantise
from fallow.models.reference import attend, rms_norm, rope_frequencies, rotate, split_heads
from fallow.models.tensors import Part, Tensors, matrix_quantisation, open_tensors

BLOCK_ELEMENTS = 1 << 21
"""Elements of a matrix that are float32 at once: 8 MiB, whatever the model's size."""

Floats = NDArray[np.float32]


class Sequences:
    """Rows of sequences, one after the other: which rows belong together, and at which angles they are rotated."""

    def __init__(self, config: ModelConfig, lengths: Sequence[int]) -> None:
        self.edges = tuple(pairwise(np.concatenate(([0], np.cumsum(lengths))).tolist()))
        positions = np.concatenate([np.arange(length, dtype=np.float64) for length in lengths])
        angles = np.outer(positions, rope_frequencies(config))[:, None, :]
        self.cosine, self.sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def through_layers(
    config: ModelConfig, quantisation: Quantisation, paths: Sequence[Path], rows: Floats, sequences: Sequences
) -> Iterator[Floats]:
    """Rows `[n, hidden]` through these layers' files; yields what leaves each. Raises `ModelError` for a bad file."""
    stored = matrix_quantisation(quantisation, Part.LAYER)
    for path in paths:
        tensors = open_tensors(path, config, quantisation, Part.LAYER)
        rows = rows + _attention(config, tensors, stored, rows, sequences)
        normed = rms_norm(rows, tensors["mlp_norm"], config.norm_epsilon)
        gate, up = np.split(product(tensors, "gate_up", stored, normed), 2, axis=-1)
        with np.errstate(over="ignore"):  # exp(-gate) may overflow to infinity, which gives the right limit, 0
            active: Floats = gate / (1 + np.exp(-gate)) * up
        rows = rows + product(tensors, "down", stored, active)
        yield rows


def product(tensors: Tensors, name: str, stored: Quantisation, x: Floats) -> Floats:
    """`x @ W.T`, the matrix dequantised a part at a time."""
    if stored is Quantisation.F32:
        plain: Floats = x @ tensors[name].T
        return plain
    codes, scales = tensors[f"{name}.{stored}"], tensors[f"{name}.scales"]
    step = max(1, BLOCK_ELEMENTS // x.shape[1])
    starts = range(0, len(codes), step)
    return np.concatenate(
        [x @ dequantise(codes[at : at + step], scales[at : at + step], stored).T for at in starts], axis=1
    )


def _attention(
    config: ModelConfig, tensors: Tensors, stored: Quantisation, rows: Floats, sequences: Sequences
) -> Floats:
    normed = rms_norm(rows, tensors["attention_norm"], config.norm_epsilon)
    query, key, value = split_heads(config, tensors, product(tensors, "qkv", stored, normed))
    query, key = (rotate(part, sequences.cosine, sequences.sine) for part in (query, key))
    mixed = [attend(query[a:b], key[a:b], value[a:b]) for a, b in sequences.edges]
    return product(tensors, "attention_out", stored, np.concatenate(mixed).reshape(len(rows), -1))
