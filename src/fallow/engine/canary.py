"""Known answers: does what is loaded still compute what it computed, and did it ever compute the right thing?

A runtime keeps packed copies of the weights that no digest describes. So every piece, and the head, is given the same
`CANARY_ROWS` rows again and again. Two rules:

- When it is loaded, the answer must be that of a plain NumPy computation from the files (`reference_rows`), within
  `TOLERANCE`: the kernels round activations to 8 bits, and are not expected to agree further.
- From then on the answer must be the one from then, bit for bit: the same rows, on the same kernels, in the same
  process. Any other bit means that weights or code changed in memory.

The rows go through a slot that no session ever has. What later answers are compared by holds the keys and values that
the rows left in the cache, in float32, besides what came out, which is rounded to 16 bits: a change that the rounding
hides is seen there. `benchmarks/bitflips.py` measures what is still missed.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fallow.domain.errors import EngineError
from fallow.domain.model import Manifest, ModelConfig, Span
from fallow.engine.weights import Files
from fallow.models.layerwise import Sequences, product, through_layers
from fallow.models.reference import rms_norm
from fallow.models.tensors import Part, matrix_quantisation, open_tensors

CANARY_ROWS = 8
ROW_SIZE = np.float32(16.0)
"""Root mean square of the rows. Small rows are at the mercy of what the layers add to them: a rounding can decide
whether one becomes an attention sink, and the distance says nothing then."""
TOLERANCE = 0.2
"""Distance between engine and reference (L2, in proportion to what the layers change in a row; the median of the rows)
above which a piece is refused. Over all pieces that the default model can be cut into it is 0.017 at most with 8 bits
and 0.033 with 4; two neighbouring layers exchanged make it 0.1, anything worse much more."""

Floats = NDArray[np.float32]


def canary_rows(config: ModelConfig) -> Floats:
    """The rows that every piece of such a model is asked about, `[CANARY_ROWS, hidden]`, exact in float16."""
    drawn = np.random.default_rng(0).standard_normal((CANARY_ROWS, config.hidden_size), np.float32) * ROW_SIZE
    return drawn.astype(np.float16).astype(np.float32)


def fingerprint(leaving: NDArray[Any], kept: Iterable[NDArray[Any]] = ()) -> bytes:
    """What an answer is remembered by: all its bits, and those of what it left in the cache."""
    digest = hashlib.sha256(np.ascontiguousarray(leaving).data)
    for array in kept:
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def check_answer(what: str, answer: Floats, reference: Floats, entered: Floats | float = 0.0) -> None:
    """Raise `EngineError` unless the answer at load is the reference's, within `TOLERANCE`, for rows that entered."""
    change = np.maximum(np.linalg.norm(reference - entered, axis=-1), np.finfo(np.float32).tiny)
    distance = float(np.median(np.linalg.norm(answer - reference, axis=-1) / change))
    if not distance <= TOLERANCE:  # NaN is not within anything
        raise EngineError(
            f"{what} does not compute what its files say: {distance:.3f} from the reference, where {TOLERANCE} is "
            "allowed; this device's processor, memory or runtime is not sound"
        )


# --- the reference ------------------------------------------------------------------------------


def reference_rows(files: Files, manifest: Manifest, span: Span, rows: Floats) -> Floats:
    """Rows `[n, hidden]` of one sequence from position 0 through the layers of `span`, in float32.

    Raises `ModelError` for a file that is not what the manifest says.
    """
    paths = [files[ref.digest] for ref in manifest.layers[span.first : span.last]]
    sequences = Sequences(manifest.config, [len(rows)])
    for leaving in through_layers(manifest.config, manifest.quantisation, paths, rows, sequences):
        rows = leaving
    return rows


def reference_logits(files: Files, manifest: Manifest, rows: Floats) -> Floats:
    """Logits `[n, vocab]` of final rows `[n, hidden]`, in float32."""
    config = manifest.config
    tensors = open_tensors(files[manifest.head.digest], config, manifest.quantisation, Part.HEAD)
    normed = rms_norm(rows, tensors["final_norm"], config.norm_epsilon)
    name, part = "head", Part.HEAD
    if config.tied_head:
        name, part = "embedding", Part.EMBEDDING
        tensors = open_tensors(files[manifest.embedding.digest], config, manifest.quantisation, part)
    return product(tensors, name, matrix_quantisation(manifest.quantisation, part), normed)
