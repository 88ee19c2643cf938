"""How much a stored model lost: perplexity and next-token agreement against the float32 values of its own checkpoint.

The stored model runs in the engine, in this process, as a node would run it; the checkpoint runs in the numpy reference
(`reference.py`). Both read the same built-in text. Blocking; takes some seconds for a small model, and memory for both.

Bounds that an 8-bit import is held to: top-1 agreement of at least 98 % and perplexity within 1 %. 4-bit is reported.
"""

import math
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from fallow.domain.errors import BlobUnavailable, FallowError, ModelError
from fallow.domain.frames import MAX_FRAME_BYTES, MAX_ROWS_PER_FRAME, Phase
from fallow.domain.ids import Digest, SessionId
from fallow.domain.model import Manifest, Quantisation, Span, StageSpec
from fallow.engine.contract import Step, Stepped
from fallow.engine.core import EngineCore
from fallow.engine.settings import EngineSettings
from fallow.models.check_text import PROSE
from fallow.models.importer import open_source
from fallow.models.manifest import layer_files, manifest_digest
from fallow.models.reference import ReferenceModel, SourceWeights
from fallow.models.store import Store
from fallow.models.tokenizer import load_tokenizer

AGREEMENT_MIN = 0.98
PERPLEXITY_CHANGE_MAX = 0.01
TOKENS_MAX = 1024
_SESSION = SessionId("0" * 32)

Floats = NDArray[np.float32]


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """`agreement`: share of positions where both find the same token most likely. Perplexities are per token."""

    quantisation: Quantisation
    tokens: int
    agreement: float
    perplexity: float
    reference_perplexity: float

    @property
    def perplexity_change(self) -> float:
        """Relative to the reference; positive is worse."""
        return self.perplexity / self.reference_perplexity - 1.0

    @property
    def within_bounds(self) -> bool:
        """Whether it keeps what an 8-bit import promises."""
        return self.agreement >= AGREEMENT_MIN and abs(self.perplexity_change) <= PERPLEXITY_CHANGE_MAX


def check_model(manifest: Manifest, store: Store, checkpoint: Path, text: str = PROSE) -> CheckReport:
    """Compare a stored model with the GGUF file or Hugging Face folder that it came from.

    Raises `ModelError` when they are of different shapes, `BlobUnavailable` when files are not in the store.
    """
    source = open_source(checkpoint)
    if _shape(source.config) != _shape(manifest.config):
        raise ModelError(f"{checkpoint.name} is not the checkpoint that {manifest.name} came from: their shapes differ")
    tokens = _tokens(manifest, store, text)
    return compare(_Stored(manifest, store, len(tokens)), ReferenceModel(SourceWeights(source)), tokens)


def compare(stored: "_Stored", reference: ReferenceModel, tokens: list[int]) -> CheckReport:
    """Both models over the same tokens, in chunks, so that logits of one chunk are in memory at a time."""
    agreed, nats, reference_nats = 0, 0.0, 0.0
    for start in range(0, len(tokens) - 1, stored.rows_max):
        inputs = tokens[start : min(start + stored.rows_max, len(tokens) - 1)]
        targets = np.array(tokens[start + 1 : start + 1 + len(inputs)])
        ours, theirs = stored.log_probabilities(start, inputs), _log_softmax(reference.logits(inputs))
        agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        rows = np.arange(len(inputs))
        nats -= float(ours[rows, targets].sum(dtype=np.float64))
        reference_nats -= float(theirs[rows, targets].sum(dtype=np.float64))
    count = len(tokens) - 1
    return CheckReport(
        quantisation=stored.manifest.quantisation,
        tokens=count,
        agreement=agreed / count,
        perplexity=math.exp(nats / count),
        reference_perplexity=math.exp(reference_nats / count),
    )


class _Stored:
    """The model from the store in an engine of its own, with one session."""

    def __init__(self, manifest: Manifest, store: Store, tokens: int) -> None:
        self.manifest = manifest
        vocabulary = manifest.config.vocab_size
        self.rows_max = max(1, min(MAX_ROWS_PER_FRAME, MAX_FRAME_BYTES // (8 * vocabulary)))
        digest, whole = manifest_digest(manifest), Span(0, manifest.config.layer_count)
        stage = StageSpec(model=digest, pieces=(whole,))
        self._core = EngineCore(EngineSettings(slots_max=1, kv_budget_bytes=1 << 40))
        self._core.load(stage, manifest, _files(manifest, store, stage))
        self._core.open(_SESSION, digest, whole, tokens)

    def log_probabilities(self, position: int, tokens: list[int]) -> Floats:
        """`[n, vocab]`, continuing where the last call ended."""
        step = Step(
            session=_SESSION,
            position=position,
            count=len(tokens),
            phase=Phase.PREFILL,
            logits_from=position,
            top_k=None,
            payload=np.asarray(tokens, np.int32).tobytes(),
        )
        self._core.step(0, step)
        while self._core.has_work:
            self._core.turn()
        [(_, outcome)] = self._core.outcomes()
        if isinstance(outcome, FallowError):
            raise outcome
        assert isinstance(outcome, Stepped)
        return np.frombuffer(outcome.payload, np.float32).reshape(len(tokens), -1)


def _tokens(manifest: Manifest, store: Store, text: str) -> list[int]:
    path = store.blob_path(manifest.tokenizer.digest)
    if path is None:
        raise BlobUnavailable(f"the tokenizer of {manifest.name} is not in the store")
    limit = min(TOKENS_MAX, manifest.config.context_length)
    tokens: list[int] = load_tokenizer(path).encode(text, add_special_tokens=False).ids[:limit]
    if len(tokens) < 2:
        raise ModelError(f"the tokenizer of {manifest.name} makes fewer than two tokens of the text")
    return tokens


def _files(manifest: Manifest, store: Store, stage: StageSpec) -> dict[Digest, Path]:
    files: dict[Digest, Path] = {}
    for ref in layer_files(manifest, stage):
        path = store.blob_path(ref.digest)
        if path is None:
            raise BlobUnavailable(f"file {ref.digest[:16]} of {manifest.name} is not in the store")
        files[ref.digest] = path
    return files


def _shape(config: msgspec.Struct) -> tuple[object, ...]:
    return msgspec.structs.astuple(config)


def _log_softmax(logits: Floats) -> Floats:
    shifted: Floats = logits - logits.max(-1, keepdims=True)
    normalised: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalised
