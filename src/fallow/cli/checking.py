"""`fallow model check`: are the files what the manifest says, and how much did storing them cost in quality?

What is measured is what is served: the real engine, with its 8-bit activations, against the float32 reference of the
original file, over the same text, position by position. Perplexity is exp of the mean negative log-probability of the
text's own tokens; agreement is the share of positions where both name the same most likely token.
"""

import asyncio
import hashlib
import sys
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from fallow.cli.options import notes, say
from fallow.domain.errors import BlobCorrupt, ModelError
from fallow.domain.frames import MAX_FRAME_BYTES, Phase
from fallow.domain.ids import Digest, SessionId
from fallow.domain.model import BlobRef, Manifest, Span, StageSpec
from fallow.engine.contract import PREFILL_CHUNK_ROWS, Step
from fallow.models.manifest import blob_refs
from fallow.models.store import Store

TEXT_TOKENS_MAX: Final = 512
CHECK_SESSION: Final = SessionId("0" * 32)

LogProbs = NDArray[np.float32]


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """How close the stored model comes to the original."""

    tokens: int
    perplexity: float
    reference_perplexity: float
    top_1: float


def check_files(store: Store, manifest: Manifest) -> None:
    """Raises `BlobCorrupt` for a file that is missing or has changed."""
    for ref in blob_refs(manifest):
        path = store.blob_path(ref.digest)
        if path is None:
            raise BlobCorrupt(f"A file of {manifest.name} is missing ({ref.digest[:12]}). Add the model again.")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != ref.digest:
                raise BlobCorrupt(f"A file of {manifest.name} has changed on disk ({ref.digest[:12]}). Add it again.")


def check_model(store: Store, name: str, against: Path | None, text: Path | None) -> None:
    """Check files, then quality when the original is there. Raises `BlobCorrupt`, `ModelError`, `UnknownModel`."""
    digest, manifest = store.by_name(name)
    with notes.status("Reading every file …"):
        check_files(store, manifest)
    say(f"All {len(blob_refs(manifest))} files of {manifest.name} are here and unchanged.")
    original = against or _original(manifest)
    if original is None:
        say("Name the file that it was imported from with --against to compare it with the original at 32 bits.")
        return
    with notes.status("Comparing with the original at 32 bits; this takes a minute …"):
        found = compare(store, digest, manifest, original, text)
    change = found.perplexity / found.reference_perplexity - 1
    say(f"Over {found.tokens} tokens of text, with the engine that serves it:")
    say(f"  perplexity {found.perplexity:.2f}, original {found.reference_perplexity:.2f} ({change:+.2%})")
    say(f"  most likely token the same in {found.top_1:.1%} of positions")


def compare(store: Store, digest: Digest, manifest: Manifest, original: Path, text: Path | None) -> Agreement:
    """Measure the stored model against its original. Raises `ModelError` when the two are not the same model."""
    from fallow.models.importer import open_source
    from fallow.models.reference import ReferenceModel, SourceWeights
    from fallow.models.tokenizer import load_tokenizer

    source = open_source(original)
    if source.config != manifest.config:
        raise ModelError(f"{original.name} has another architecture than {manifest.name}; it is not its original.")
    words = (text or _default_text()).read_text(encoding="utf-8")
    tokenizer = load_tokenizer(_path(store, manifest.tokenizer))
    tokens = list(tokenizer.encode(words).ids)[: min(TEXT_TOKENS_MAX, manifest.config.context_length - 1)]
    if len(tokens) < 2:
        raise ModelError("The text has fewer than two tokens; there is nothing to predict.")
    reference = _log_softmax(ReferenceModel(SourceWeights(source)).logits(tokens))
    served = asyncio.run(_served(store, digest, manifest, tokens))
    return agreement(served, reference, tokens)


def agreement(served: LogProbs, reference: LogProbs, tokens: list[int]) -> Agreement:
    """From log-probabilities `[n, vocab]` after each of `n` tokens, as served and as the original has them."""
    following = np.asarray(tokens[1:])
    rows = np.arange(len(following))
    return Agreement(
        tokens=len(tokens),
        perplexity=float(np.exp(-served[rows, following].mean())),
        reference_perplexity=float(np.exp(-reference[rows, following].mean())),
        top_1=float((served.argmax(axis=1) == reference.argmax(axis=1)).mean()),
    )


async def _served(store: Store, digest: Digest, manifest: Manifest, tokens: list[int]) -> LogProbs:
    """Log-probabilities `[n, vocab]` from the engine, prefilled in chunks as a prompt is."""
    from fallow import wiring

    whole = Span(0, manifest.config.layer_count)
    engine = wiring.engine(kv_budget_bytes=1 << 30, threads=1)
    files = {ref.digest: _path(store, ref) for ref in blob_refs(manifest)}
    parts: list[LogProbs] = []
    try:
        await engine.start()
        await engine.load(StageSpec(model=digest, pieces=(whole,)), manifest, files)
        await engine.open(CHECK_SESSION, digest, whole, len(tokens) + 1)
        # A frame with the whole vocabulary of every row must stay within the wire's bound.
        rows = max(1, min(PREFILL_CHUNK_ROWS, MAX_FRAME_BYTES // 2 // (4 * manifest.config.vocab_size)))
        for first in range(0, len(tokens), rows):
            chunk = tokens[first : first + rows]
            step = Step(
                session=CHECK_SESSION,
                position=first,
                count=len(chunk),
                phase=Phase.PREFILL,
                logits_from=first,
                top_k=None,
                payload=np.asarray(chunk, dtype=np.int32).tobytes(),
            )
            stepped = await engine.step(step)
            parts.append(np.frombuffer(stepped.payload, dtype=np.float32).reshape(len(chunk), -1).copy())
    finally:
        await engine.close()
    return np.concatenate(parts)


def _path(store: Store, ref: BlobRef) -> Path:
    path = store.blob_path(ref.digest)
    if path is None:
        raise BlobCorrupt(f"The file {ref.digest[:12]} is missing from the store.")
    return path


def _original(manifest: Manifest) -> Path | None:
    """The default model's file, which is cached; other originals must be named."""
    from fallow.models.default import DEFAULT_MODEL, cached_gguf

    return cached_gguf() if manifest.name == DEFAULT_MODEL else None


def _default_text() -> Path:
    return Path(sys.modules["fallow"].__file__ or "").parent / "models" / "check_text.txt"


def _log_softmax(logits: LogProbs) -> LogProbs:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: LogProbs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
