"""Measures, at import, what hidden rows are like at each cut point of a model, for `Manifest.activations`.

The rows come from texts of both kinds that are built in, from random tokens, and from many short sequences, since the
first token of a sequence is unlike all others. Six hundred rows, layer after layer in NumPy (`layerwise.py`): some
seconds for a small model, and time in proportion for a large one. The same model gives the same bounds up to rounding.
"""

from pathlib import Path

import numpy as np

from fallow.domain.ids import Digest
from fallow.domain.model import CutBounds, Manifest, Quantisation, cut_points
from fallow.models.check_text import ANSWERS, PROSE
from fallow.models.layerwise import Floats, Sequences, through_layers
from fallow.models.manifest import row_bounds
from fallow.models.quantise import dequantise
from fallow.models.store import Store
from fallow.models.tensors import Part, matrix_quantisation, open_tensors
from fallow.models.tokenizer import load_tokenizer
from fallow.policy.activations import measure

TEXT_TOKENS = 160
"""Of each text, in one sequence."""
RANDOM_TOKENS = 128
SHORT_SEQUENCES, SHORT_TOKENS = 40, 3
REPEATED_SEQUENCES, REPEATED_TOKENS = 2, 32


def measure_activations(manifest: Manifest, store: Store) -> tuple[CutBounds, ...]:
    """The bounds for a model whose files are in the store. Raises `ModelError`."""
    config = manifest.config
    cuts = cut_points(config.layer_count)
    if not cuts:
        return ()
    sequences = _sequences(manifest, store)
    ids = np.concatenate(sequences)
    rows = _embedded(manifest, store, ids)
    paths = [_path(store, ref.digest) for ref in manifest.layers[: cuts[-1]]]
    shape = Sequences(config, [len(tokens) for tokens in sequences])
    bounds = []
    for layer, leaving in enumerate(through_layers(config, manifest.quantisation, paths, rows, shape), 1):
        if layer in cuts:
            kinds = tuple(row_bounds(kind) for kind in measure(leaving))
            bounds.append(CutBounds(layer=layer, kinds=kinds))
    return tuple(bounds)


def _sequences(manifest: Manifest, store: Store) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    config = manifest.config
    tokenizer = load_tokenizer(_path(store, manifest.tokenizer.digest))
    longest, vocabulary = config.context_length, config.vocab_size
    texts = [tokenizer.encode(text, add_special_tokens=False).ids for text in (PROSE, ANSWERS)]
    drawn = np.random.default_rng(0)
    random = [drawn.integers(vocabulary, size=RANDOM_TOKENS)]
    short = [drawn.integers(vocabulary, size=SHORT_TOKENS) for _ in range(SHORT_SEQUENCES)]
    repeated = [np.full(REPEATED_TOKENS, drawn.integers(vocabulary)) for _ in range(REPEATED_SEQUENCES)]
    known = [np.array([token for token in ids if token < vocabulary][:TEXT_TOKENS], np.int64) for ids in texts]
    return [tokens[:longest] for tokens in (*known, *random, *short, *repeated) if len(tokens)]


def _embedded(manifest: Manifest, store: Store, ids: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Floats:
    tensors = open_tensors(
        _path(store, manifest.embedding.digest), manifest.config, manifest.quantisation, Part.EMBEDDING
    )
    stored = matrix_quantisation(manifest.quantisation, Part.EMBEDDING)
    if stored is Quantisation.F32:
        plain: Floats = tensors["embedding"][ids]
        return plain
    return dequantise(tensors[f"embedding.{stored}"][ids], tensors["embedding.scales"][ids], stored)


def _path(store: Store, digest: Digest) -> Path:
    path = store.blob_path(digest)
    assert path is not None, "an import has just written it"
    return path
