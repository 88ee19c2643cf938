"""A stranger's model: files that lie, and texts that want to be code.

The real importer, store, tensors and template sandbox, on a small checkpoint of the test fixtures. What a *running*
service does with such models is in tests/system/test_hostile_models.py.
"""

import asyncio
import json
import time
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from fallow.domain.errors import BadRequest, BlobCorrupt, FallowError, ModelError
from fallow.domain.ids import Digest, ModelName
from fallow.domain.model import Manifest
from fallow.gateway.templates import ChatTemplate
from fallow.gateway.text import TextModel
from fallow.models.importer import import_model
from fallow.models.manifest import decode_manifest, encode_manifest
from fallow.models.store import Store
from fallow.models.tensors import Part, open_tensors
from fallow.models.tokenizer import load_tokenizer

SMALL = Path(__file__).parents[1] / "fixtures" / "families" / "llama"
BOUND_S = 5.0
"""What an attack on time may cost at most; it is orders of magnitude below what it would like to cost."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def honest(store: Store) -> Manifest:
    return import_model(SMALL, store, name=ModelName("honest")).manifest


def still_served(store: Store) -> None:
    """The honest model beside the attack is whole."""
    [(digest, manifest)] = store.models()
    assert manifest.name == "honest"
    assert store.holds(manifest)
    assert store.manifest(digest) == manifest


def test_a_poisoned_layer_file(store: Store, honest: Manifest) -> None:
    """
    Attack: a source of files changes one bit of a layer in transit.
    Expected: the chunk is refused by its digest, `BlobCorrupt`, and nothing of it is kept.
    Unharmed: the transfer goes on with the right bytes from another source.
    """
    ref = honest.layers[0]
    path = store.blob_path(ref.digest)
    assert path is not None
    content = path.read_bytes()
    other = Store(store.root.parent / "device")
    partial = other.partial(ref)
    poisoned = bytearray(content[: 1 << 20])
    poisoned[1000] ^= 4
    with pytest.raises(BlobCorrupt):
        partial.write_chunk(0, bytes(poisoned))
    for index in range(len(ref.chunk_digests)):
        partial.write_chunk(index, content[index << 20 : (index + 1) << 20])
    partial.complete()
    assert other.blob_path(ref.digest) is not None


def test_a_manifest_with_a_path_in_its_name(store: Store, honest: Manifest) -> None:
    """
    Attack: a model is called `../../.ssh/authorized_keys`.
    Expected: `ModelError`; no file of that name is made.
    Unharmed: the store and everything beside it.
    """
    before = sorted(store.root.parent.rglob("*"))
    evil = msgspec.structs.replace(honest, name=ModelName("../../.ssh/authorized_keys"))
    with pytest.raises(ModelError, match="name"):
        store.put_manifest(evil)
    assert sorted(store.root.parent.rglob("*")) == before
    still_served(store)


def test_a_manifest_with_a_path_for_a_digest(store: Store, honest: Manifest) -> None:
    """
    Attack: a layer's digest is `../../../etc/passwd`, so that the store would read or serve that file.
    Expected: `ModelError` when the manifest is read; the store finds no such blob.
    Unharmed: the store serves what it has.
    """
    evil = msgspec.structs.replace(honest.layers[0], digest=Digest("../../../etc/passwd"))
    with pytest.raises(ModelError):
        decode_manifest(encode_manifest(msgspec.structs.replace(honest, layers=(evil, *honest.layers[1:]))))
    assert store.read_chunk(Digest("../../../etc/passwd"), 0) is None
    still_served(store)


def test_a_gigantic_header(store: Store, honest: Manifest, tmp_path: Path) -> None:
    """
    Attack: a safetensors header claims 2^60 bytes, to have the device allocate them.
    Expected: `ModelError` that names the claim, before anything is allocated.
    Unharmed: the honest file beside it opens.
    """
    path = tmp_path / "layer"
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match="1152921504606846976"):
        open_tensors(path, honest.config, honest.quantisation, Part.LAYER)
    right = store.blob_path(honest.layers[0].digest)
    assert right is not None
    open_tensors(right, honest.config, honest.quantisation, Part.LAYER)


def test_a_zip_bomb_for_a_checkpoint(store: Store, honest: Manifest, tmp_path: Path) -> None:
    """
    Attack: a checkpoint's weights are a zip archive (PyTorch's pickle format) that unpacks to 10 GB.
    Expected: `ModelError` by name; pickles and archives are never opened.
    Unharmed: the disk, and the store.
    """
    folder = tmp_path / "bomb"
    folder.mkdir()
    (folder / "config.json").write_bytes((SMALL / "config.json").read_bytes())
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x00" * (10 << 20))
    began_s = time.monotonic()
    with pytest.raises(ModelError, match="safetensors"):
        import_model(folder, store, name=ModelName("bomb"))
    assert time.monotonic() - began_s < BOUND_S
    still_served(store)


def test_a_shard_outside_the_folder(store: Store, honest: Manifest, tmp_path: Path) -> None:
    """
    Attack: the index of a checkpoint's shards points at `../../secret.safetensors`.
    Expected: `ModelError`; nothing outside the folder is opened.
    Unharmed: the file that it points at is not in the store.
    """
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "config.json").write_bytes((SMALL / "config.json").read_bytes())
    index = {"weight_map": {"model.embed_tokens.weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "secret.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match="secret"):
        import_model(folder, store, name=ModelName("shards"))
    still_served(store)


ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a helper": "{{ raise_exception.__globals__ }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "attribute filter": "{{ messages|attr('__class__') }}",
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_that_wants_out_of_its_sandbox(escape: str) -> None:
    """
    Attack: a chat template reaches for Python's classes, globals or files.
    Expected: a named error, or nothing of what it reached for in the text.
    Unharmed: an honest template renders in the same process afterwards.
    """
    try:
        template = ChatTemplate(ESCAPES[escape], {}, lambda: datetime.now(UTC))
        text = template.render([{"role": "user", "content": "x"}])
    except FallowError:
        text = ""
    assert not any(word in text for word in ("<class", "module", "root:", "builtins", "<function"))
    assert ChatTemplate("{{ messages[0]['content'] }}", {}, lambda: datetime.now(UTC)).render([{"content": "x"}]) == "x"


BOMBS = {
    "a huge text": "{{ 'a' * 10**10 }}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
    "a doubling": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a wide format": "{{ '%099999999d' % 1 }}",
    "a huge number": "{{ 10 ** (10 ** 9) }}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_that_wants_all_time_or_memory(bomb: str) -> None:
    """
    Attack: a chat template asks for a text, a number or loops without an end.
    Expected: `ModelError` or `BadRequest` within seconds, by the template's budget.
    Unharmed: the thread that it ran on, which every other request shares.
    """
    began_s = time.monotonic()
    with pytest.raises(FallowError):
        ChatTemplate(BOMBS[bomb], {}, lambda: datetime.now(UTC)).render([{"role": "user", "content": "x"}])
    assert time.monotonic() - began_s < BOUND_S


ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}

TOKENIZERS = {
    "no json": b"\x00" * 100,
    "deep": b"[" * 100_000,
    "an unknown kind": b'{"version":"1.0","model":{"type":"Exec","command":"true"}}',
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_tokenizer_that_is_none(tokenizer: str) -> None:
    """
    Attack: a tokenizer file that is garbage, nested without end, or of a kind that does not exist.
    Expected: `ModelError` by name, from the library's own parser, in bounded time.
    Unharmed: the process, which goes on to load an honest one.
    """
    began_s = time.monotonic()
    with pytest.raises(ModelError):
        load_tokenizer(TOKENIZERS[tokenizer])
    assert time.monotonic() - began_s < BOUND_S
    load_tokenizer((SMALL / "tokenizer.json").read_bytes())


def test_a_tokenizer_with_ids_beyond_the_model(honest: Manifest) -> None:
    """
    Attack: a tokenizer file gives a common word the id 2^31, beyond the embedding's rows and beyond 32 bits.
    Expected: `BadRequest` for a prompt with that word; no such id reaches a device.
    Unharmed: prompts without it.
    """
    file = json.loads((SMALL / "tokenizer.json").read_bytes())
    file["added_tokens"] = [*file.get("added_tokens", []), {**ADDED, "id": 1 << 31, "content": "evil"}]
    model = TextModel(honest, Digest("0" * 64), json.dumps(file).encode(), lambda: datetime.now(UTC))
    assert asyncio.run(model.encode_completion("good"))
    with pytest.raises(BadRequest, match="vocabulary"):
        asyncio.run(model.encode_completion("good and evil"))
