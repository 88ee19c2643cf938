"""`fallow model check` in words: are the files what the manifest says, and what did storing them cost in quality?

The measuring itself is `models/check.py`'s.
"""

import hashlib
from pathlib import Path

from fallow.cli.options import notes, say
from fallow.cli.plain import one_line
from fallow.domain.errors import BlobCorrupt, ModelError
from fallow.domain.model import Manifest
from fallow.models.check import AGREEMENT_MIN, PERPLEXITY_CHANGE_MAX, CheckReport
from fallow.models.check import check_model as measure
from fallow.models.check_text import ANSWERS, PROSE
from fallow.models.default import DEFAULT_MODEL, cached_gguf
from fallow.models.manifest import blob_refs
from fallow.models.store import Store


def check_model(store: Store, name: str, against: Path | None, text: Path | None) -> None:
    """Check files, then quality when the original is there. Raises `BlobCorrupt`, `ModelError`, `UnknownModel`."""
    _, manifest = store.by_name(name)
    with notes.status("Reading every file …"):
        check_files(store, manifest)
    say(f"All {len(blob_refs(manifest))} files of {one_line(manifest.name)} are here and unchanged.")
    original = against or (cached_gguf() if manifest.name == DEFAULT_MODEL else None)
    if original is None:
        say("Name the file that it was imported from with --against to compare it with the original at 32 bits.")
        return
    texts = {"prose": PROSE, "a model's answers": ANSWERS} if text is None else {text.name: _read(text)}
    for kind, content in texts.items():
        with notes.status("Comparing with the original at 32 bits; this may take a minute …"):
            report = measure(manifest, store, original, content)
        _tell(report, kind)


def check_files(store: Store, manifest: Manifest) -> None:
    """Raises `BlobCorrupt` for a file that is missing or has changed."""
    for ref in blob_refs(manifest):
        path = store.blob_path(ref.digest)
        if path is None:
            raise BlobCorrupt(f"A file of {manifest.name} is missing ({ref.digest[:12]}). Add the model again.")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != ref.digest:
                raise BlobCorrupt(f"A file of {manifest.name} has changed on disk ({ref.digest[:12]}). Add it again.")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path.name} is not a text in UTF-8; give another with --text.") from error


def _tell(report: CheckReport, kind: str) -> None:
    say(f"Over {report.tokens} tokens of {kind}, at {report.quantisation}, with the engine that serves it:")
    say(f"  the most likely next token is the original's in {report.agreement:.1%} of positions")
    change = f"{report.perplexity_change:+.2%}"
    say(f"  perplexity {report.perplexity:.2f}, the original's is {report.reference_perplexity:.2f} ({change})")
    if not report.within_bounds:
        aim = f"{AGREEMENT_MIN:.0%} and {PERPLEXITY_CHANGE_MAX:.0%}"
        say(f"  8 bits aim at {aim}; this is outside of that.")
