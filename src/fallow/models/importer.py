"""Import a checkpoint into the store: read, reorder, quantise and write one file per layer, embedding and head.

One row block is in memory at a time, whatever the checkpoint's size. Q8_0 and Q4_0 tensors carry over exactly; what
else is quantised gets a loss in the report. The manifest is written last, so that a half-done import is never a model.
"""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
from gguf import GGMLQuantizationType

from fallow.domain.errors import ModelError
from fallow.domain.ids import Digest, ModelName
from fallow.domain.model import MANIFEST_FORMAT, BlobRef, Manifest, Quantisation
from fallow.models import quantise
from fallow.models.calibrate import measure_activations
from fallow.models.gguf_reader import GgufSource
from fallow.models.huggingface_reader import HuggingFaceSource
from fallow.models.manifest import check_manifest, check_name, check_quantisable
from fallow.models.safetensors_header import build_header
from fallow.models.source import QUERY_KEY_VALUE, SourceTensor, WeightSource
from fallow.models.store import BlobWriter, Store
from fallow.models.tensors import (
    Part,
    check_finite,
    expected_matrices,
    expected_tensors,
    expected_vectors,
    matrix_quantisation,
)

BLOCK_ELEMENTS = 1 << 21
"""Matrix elements that are quantised at once: enough for numpy to be fast, little enough for a small device."""

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in total, what was just done)."""


class ImportReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an import made. `loss` is the relative root-mean-square error per kind of matrix; 0 where it was exact."""

    manifest: Manifest
    digest: Digest
    loss: dict[str, float]
    notes: tuple[str, ...] = ()


def import_model(
    source: Path,
    store: Store,
    quantisation: Quantisation = Quantisation.Q8,
    name: ModelName | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """Import a GGUF file or a Hugging Face folder. Raises `ModelError` that says what the matter is."""
    return import_source(open_source(source), store, quantisation, name, progress)


def open_source(path: Path) -> WeightSource:
    """Open whichever kind of checkpoint lies at `path`. Raises `ModelError`."""
    if path.is_dir():
        return HuggingFaceSource(path)
    if path.is_file():
        return GgufSource(path)
    raise ModelError(f"there is no file or folder {path.name!r} to import")


def import_source(
    source: WeightSource,
    store: Store,
    quantisation: Quantisation,
    name: ModelName | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """Import an open checkpoint."""
    config = source.config
    check_quantisable(config, quantisation)
    if name is not None:
        check_name(name)
    details = source.details()
    tell = progress or (lambda done, total, what: None)
    steps = config.layer_count + 3
    writer = _PartWriter(source, store, quantisation)

    embedding = writer.write(Part.EMBEDDING)
    tell(1, steps, "embedding")
    layers: list[BlobRef] = []
    for layer in range(config.layer_count):
        layers.append(writer.write(Part.LAYER, layer))
        tell(layer + 2, steps, f"layer {layer + 1} of {config.layer_count}")
    head = writer.write(Part.HEAD)
    tell(steps - 1, steps, "head")
    manifest = Manifest(
        format=MANIFEST_FORMAT,
        name=name or slug(details.name),
        config=config,
        quantisation=quantisation,
        embedding=embedding,
        layers=tuple(layers),
        head=head,
        tokenizer=store.add_bytes(details.tokenizer_json),
        chat_template=details.chat_template,
        bos_token_id=details.bos_token_id,
        eos_token_ids=details.eos_token_ids,
        special_tokens=details.special_tokens,
        licence=details.licence,
        source=details.source,
    )
    check_manifest(manifest)
    manifest = msgspec.structs.replace(manifest, activations=measure_activations(manifest, store))
    digest = store.put_manifest(manifest)
    tell(steps, steps, "manifest")
    return ImportReport(manifest=manifest, digest=digest, loss=writer.losses(), notes=details.notes)


def slug(text: str) -> ModelName:
    """A model name out of what a checkpoint calls itself."""
    return ModelName(re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:96] or "model")


class _PartWriter:
    """Writes a model's files, and sums up squared errors and squares per kind of matrix."""

    def __init__(self, source: WeightSource, store: Store, quantisation: Quantisation) -> None:
        self._source = source
        self._store = store
        self._quantisation = quantisation
        self._losses: dict[str, tuple[float, float]] = {}

    def write(self, part: Part, layer: int | None = None) -> BlobRef:
        """Write one file, in the order that `expected_tensors` gives."""
        config = self._source.config
        specs = expected_tensors(config, self._quantisation, part)
        stored = matrix_quantisation(self._quantisation, part)
        with self._store.writer() as writer:
            writer.write(build_header([(name, spec.dtype, spec.shape) for name, spec in specs.items()]))
            for name in expected_matrices(config, part):
                pieces = [self._source.tensor(role, layer) for role in _matrix_roles(name)]
                if stored is Quantisation.F32:
                    for piece, first, last in _row_blocks(pieces):
                        writer.write(piece.values(first, last).data)
                else:
                    self._write_quantised(writer, name, pieces, stored)
            for name in expected_vectors(config, part):
                for role in _vector_roles(name):
                    writer.write(self._source.tensor(role, layer).vector().tobytes())
            return writer.commit()

    def losses(self) -> dict[str, float]:
        """Relative root-mean-square error per kind of matrix."""
        return {kind: math.sqrt(error / total) if total else 0.0 for kind, (error, total) in self._losses.items()}

    def _write_quantised(
        self, writer: BlobWriter, name: str, pieces: list[SourceTensor], quantisation: Quantisation
    ) -> None:
        all_scales: list[quantise.Floats] = []
        for piece, first, last in _row_blocks(pieces):
            quantised, scales = _carry_over(piece, first, last, quantisation) or self._quantise(
                name, piece, first, last, quantisation
            )
            check_finite(f"scales of tensor {piece.name!r}", scales)
            writer.write(np.ascontiguousarray(quantised).data)
            all_scales.append(scales)
        self._losses.setdefault(name, (0.0, 0.0))
        for scales in all_scales:
            writer.write(scales.tobytes())

    def _quantise(
        self, name: str, piece: SourceTensor, first: int, last: int, quantisation: Quantisation
    ) -> quantise.Quantised:
        values = piece.values(first, last)
        if quantisation is Quantisation.Q4:
            quantised, scales = quantise.q4_from_values(values)
        elif piece.kind is GGMLQuantizationType.Q4_1:
            quantised, scales = quantise.q8_from_gguf_q4_1(piece.raw_rows(first, last))
        else:
            quantised, scales = quantise.q8_from_values(values)
        difference = quantise.dequantise(quantised, scales, quantisation) - values
        error, total = self._losses.get(name, (0.0, 0.0))
        self._losses[name] = (
            error + float(np.vdot(difference, difference)),
            total + float(np.vdot(values, values)),
        )
        return quantised, scales


def _matrix_roles(matrix: str) -> tuple[str, ...]:
    """The projections that are stacked in a stored matrix."""
    return {"qkv": QUERY_KEY_VALUE, "gate_up": ("gate", "up")}.get(matrix, (matrix,))


def _vector_roles(vector: str) -> tuple[str, ...]:
    return tuple(f"{role}_bias" for role in QUERY_KEY_VALUE) if vector == "qkv_bias" else (vector,)


def _row_blocks(pieces: list[SourceTensor]) -> Iterator[tuple[SourceTensor, int, int]]:
    for piece in pieces:
        rows, columns = piece.shape
        step = max(1, BLOCK_ELEMENTS // columns)
        for first in range(0, rows, step):
            yield piece, first, min(first + step, rows)


def _carry_over(piece: SourceTensor, first: int, last: int, quantisation: Quantisation) -> quantise.Quantised | None:
    """The stored blocks themselves, when the source has the same arithmetic."""
    if piece.kind is GGMLQuantizationType.Q4_0:
        convert = quantise.q4_from_gguf_q4_0 if quantisation is Quantisation.Q4 else quantise.q8_from_gguf_q4_0
        return convert(piece.raw_rows(first, last))
    if piece.kind is GGMLQuantizationType.Q8_0 and quantisation is Quantisation.Q8:
        return quantise.q8_from_gguf_q8_0(piece.raw_rows(first, last))
    return None
