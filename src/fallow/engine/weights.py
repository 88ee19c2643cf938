"""A stage's weights: memory-mapped files in, arrays by initialiser name out. Nothing is copied, nothing is computed.

A session that has packed its weights does not need the file's pages any more: `release_pages` gives them back to the
system (they come again from disk when touched). The arrays must outlive the session that was given them.
"""

import contextlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fallow.domain.errors import ModelError
from fallow.domain.ids import Digest
from fallow.domain.model import BlobRef, Manifest, ModelConfig, Span
from fallow.engine.graph import rope_tables, wire_dtype
from fallow.models.tensors import Part, Tensors, open_tensors

Files = Mapping[Digest, Path]


class Weights:
    """Arrays of one graph, by initialiser name, and the mappings under them."""

    def __init__(self) -> None:
        self.arrays: dict[str, NDArray[Any]] = {}
        self.sizes_bytes: dict[Digest, int] = {}
        self._mappings: list[mmap.mmap] = []

    def add_file(self, files: Files, ref: BlobRef, manifest: Manifest, part: Part, prefix: str = "") -> None:
        """Map a file and take its tensors, named as the graphs name them. Raises `ModelError`."""
        tensors, mapping = _open(files, ref, manifest, part)
        for name, array in _initialisers(tensors, manifest.config).items():
            self.arrays[prefix + name] = array
        self.sizes_bytes[ref.digest] = ref.size_bytes
        self._mappings.append(mapping)

    @property
    def mapped(self) -> list[tuple[Digest, mmap.mmap]]:
        """The files that are mapped, whole."""
        return list(zip(self.sizes_bytes, self._mappings, strict=True))

    def release_pages(self) -> None:
        """Give the files' pages back. The mappings stay, and so do the arrays."""
        for mapping in self._mappings:
            _release(mapping)


class Embedding:
    """Token ids to hidden rows, straight from the mapped (quantised) matrix: only rows that are used are ever read."""

    def __init__(self, files: Files, manifest: Manifest) -> None:
        tensors, self._mapping = _open(files, manifest.embedding, manifest, Part.EMBEDDING)
        self.sizes_bytes = {manifest.embedding.digest: manifest.embedding.size_bytes}
        self.vocab_size = manifest.config.vocab_size
        self._wire = wire_dtype(manifest.quantisation)
        self._plain = tensors.get("embedding")
        self._codes = tensors.get("embedding.q8")
        self._scales = tensors.get("embedding.scales")

    @property
    def mapped(self) -> list[tuple[Digest, mmap.mmap]]:
        """The file that is mapped, whole."""
        return [(digest, self._mapping) for digest in self.sizes_bytes]

    def rows(self, ids: NDArray[np.int32]) -> NDArray[Any]:
        """Hidden rows `[N, H]` in the wire type for ids `[N]`, which must be inside the vocabulary."""
        if self._plain is not None:
            return np.asarray(self._plain[ids])
        assert self._codes is not None and self._scales is not None
        codes = self._codes[ids].astype(np.float32)
        codes -= 128.0
        codes *= self._scales[ids][:, :, None]
        return codes.reshape(len(ids), -1).astype(self._wire)

    def release_pages(self) -> None:
        _release(self._mapping)


def piece_weights(files: Files, manifest: Manifest, piece: Span, max_len: int) -> Weights:
    """The weights of layers `piece`, and the rotary tables. Raises `ModelError`."""
    weights = Weights()
    for layer in range(piece.first, piece.last):
        weights.add_file(files, manifest.layers[layer], manifest, Part.LAYER, f"l{layer}.")
    weights.arrays["rope.cos"], weights.arrays["rope.sin"] = rope_tables(manifest.config, max_len)
    return weights


def head_weights(files: Files, manifest: Manifest) -> Weights:
    """Final norm and output matrix; a tied head is the embedding. Raises `ModelError`."""
    weights = Weights()
    weights.add_file(files, manifest.head, manifest, Part.HEAD)
    if manifest.config.tied_head:
        weights.add_file(files, manifest.embedding, manifest, Part.EMBEDDING)
        for suffix in ("", ".q", ".scales"):
            if f"embedding{suffix}" in weights.arrays:
                weights.arrays[f"head{suffix}"] = weights.arrays.pop(f"embedding{suffix}")
    return weights


def kv_bytes_per_token(config: ModelConfig, layers: int) -> int:
    """Keys and values, float32."""
    return 2 * 4 * config.kv_head_count * config.head_dim * layers


def _open(files: Files, ref: BlobRef, manifest: Manifest, part: Part) -> tuple[Tensors, mmap.mmap]:
    path = files.get(ref.digest)
    if path is None:
        raise ModelError(f"the {part} file {ref.digest[:16]} was not given to the engine")
    try:
        tensors = open_tensors(path, manifest.config, manifest.quantisation, part)
    except OSError as error:
        raise ModelError(f"the {part} file {ref.digest[:16]} cannot be opened: {error.strerror}") from error
    mapping = next(iter(tensors.values()))._mmap  # type: ignore[attr-defined]
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}, mapping


def _initialisers(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Stored names to graph names; `gate_up` becomes two views, which spares a Split of its product."""
    named: Tensors = {}
    for stored, array in tensors.items():
        name = stored.removesuffix(".q8").removesuffix(".q4")
        suffix = ".q" if name != stored else ""
        if name.startswith("gate_up"):
            rest = name.removeprefix("gate_up") + suffix
            named["gate" + rest], named["up" + rest] = (
                array[: config.intermediate_size],
                array[config.intermediate_size :],
            )
        else:
            named[name + suffix] = array
    return named


def _release(mapping: mmap.mmap) -> None:
    with contextlib.suppress(AttributeError, OSError):  # no madvise on this system: the pages stay until reclaimed
        mapping.madvise(mmap.MADV_DONTNEED)
