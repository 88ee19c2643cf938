"""Model files that are broken or lie, in the operator's store of a running service, fetched by real devices.

A device works on the default model and a neighbour streams from it. Meanwhile broken variants of a small model appear
in the store. Each must be refused by the device, with a sentence that names what is wrong (and, for bytes that are not
what was promised, who sent them); the device and the neighbour go on.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from fallow.domain.fleet import StageStatus
from fallow.domain.ids import Digest, ModelName, NodeId
from fallow.domain.model import BLOB_CHUNK_BYTES, BlobRef, Manifest
from fallow.models.importer import import_model
from fallow.models.manifest import manifest_digest
from fallow.models.store import Store
from fallow.processes.local_service import LocalService
from fallow.trust.council.publisher import publish_model
from tests.system.harness import KEYS, MODEL, Answer, OneDevice, ask
from tests.system.hostile import Neighbour

SMALL = Path(__file__).parents[1] / "fixtures" / "families" / "llama"
QUESTION = "Name three colours and say why you like them."
ANSWER_TOKENS = 16
REFUSED_LIMIT_S = 45.0
KEY = KEYS["neighbour"][0]


@pytest.fixture(scope="module")
def fleet(one_device: OneDevice) -> Iterator[LocalService]:
    """Ended afterwards: its store is spoilt."""
    yield one_device.lend()
    one_device.end()


@pytest.fixture(scope="module")
def calm(fleet: LocalService) -> Answer:
    answer = ask(fleet.api_url, QUESTION, ANSWER_TOKENS, KEY)
    assert answer.error is None
    return answer


@pytest.fixture(scope="module")
def neighbour(fleet: LocalService, calm: Answer) -> Iterator[Neighbour]:
    """It streams from the first lie to the last."""
    with Neighbour(fleet.api_url, KEY, QUESTION, ANSWER_TOKENS, calm) as streaming:
        yield streaming


@pytest.fixture
def undisturbed(fleet: LocalService, neighbour: Neighbour) -> Iterator[None]:
    """The neighbour streams during the test, and the device's processes stay the same ones."""
    before = fleet.device_pids("node-1")
    yield
    neighbour.check()
    assert fleet.device_pids("node-1") == before
    logs = "".join(file.read_text(errors="replace") for file in fleet.state_dir.glob("logs/*"))
    assert "Traceback" not in logs


# --- lies ---------------------------------------------------------------------------------------

Lie = Callable[[Store, Manifest], Manifest]


def with_first_layer(change: Callable[[bytes], bytes]) -> Lie:
    """The first layer's file is another one, truthfully referred to."""

    def lie(store: Store, honest: Manifest) -> Manifest:
        path = store.blob_path(honest.layers[0].digest)
        assert path is not None
        other = store.add_bytes(change(path.read_bytes()))
        return msgspec.structs.replace(honest, layers=(other, *honest.layers[1:]))

    return lie


def with_shape(**changes: int) -> Lie:
    return lambda _, honest: msgspec.structs.replace(honest, config=msgspec.structs.replace(honest.config, **changes))


def header_of(content: bytes) -> tuple[dict[str, dict[str, object]], bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(change: Callable[[dict[str, dict[str, object]]], object]) -> Lie:
    def rewrite(content: bytes) -> bytes:
        header, data = header_of(content)
        change(header)
        encoded = json.dumps(header).encode()
        return len(encoded).to_bytes(8, "little") + encoded + data

    return with_first_layer(rewrite)


def swapped_ends(_: Store, honest: Manifest) -> Manifest:
    return msgspec.structs.replace(honest, embedding=honest.layers[0], layers=(honest.embedding, *honest.layers[1:]))


def with_wrong_whole_digest(store: Store, honest: Manifest) -> Manifest:
    """Chunks that are what they should be, in a blob that is not."""
    content = b"chunk by chunk it is right"
    chunk = Digest(hashlib.sha256(content).hexdigest())
    lie = BlobRef(digest=Digest("ab" * 32), size_bytes=len(content), chunk_digests=(chunk,))
    place = store.root / "blobs" / "ab" / "ab" / lie.digest
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return msgspec.structs.replace(honest, layers=(lie, *honest.layers[1:]))


def with_corrupt_disk(store: Store, honest: Manifest) -> Manifest:
    """A file of its own, one bit of which the disk has changed since."""
    lie = with_first_layer(lambda content: content + bytes(64))(store, honest)
    corrupt_on_disk(store, lie.layers[0].digest, lie.layers[0].size_bytes // 2)
    return lie


def corrupt_on_disk(store: Store, digest: Digest, at: int) -> None:
    """Change one bit. The file is written anew, because the session's store shares it by a hard link."""
    path = store.blob_path(digest)
    assert path is not None
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.unlink()
    path.write_bytes(content)


def not_numbers(content: bytes) -> bytes:
    return content[:-256] + b"\xff" * 256  # float32 NaN in the last tensors, which are norms


def first_tensor(header: dict[str, dict[str, object]]) -> dict[str, object]:
    return header[next(name for name in header if name != "__metadata__")]


LIES: dict[str, tuple[Lie, tuple[str, ...]]] = {
    "wider-than-its-files": (with_shape(intermediate_size=1 << 18), ("expected",)),
    "header-of-an-exabyte": (
        with_first_layer(lambda content: (1 << 60).to_bytes(8, "little") + content[8:]),
        ("its header claims 1152921504606846976 bytes",),
    ),
    "header-of-a-megabyte": (
        with_first_layer(lambda _: (1 << 20).to_bytes(8, "little") + b" " * (1 << 20)),
        ("its header claims 1048576 bytes",),
    ),
    "header-nested-deep": (
        with_first_layer(lambda _: (60_000).to_bytes(8, "little") + b"[" * 60_000),
        ("header",),
    ),
    "cut-in-half": (with_first_layer(lambda content: content[: len(content) // 2]), ("bytes",)),
    "a-pickle": (with_first_layer(lambda _: b"\x80\x04\x95" + b"cos\nsystem\n" * 20), ("its header claims",)),
    "offsets-beyond-the-end": (
        with_header(lambda header: first_tensor(header).update(data_offsets=[0, 1 << 50])),
        ("bytes",),
    ),
    "another-shape": (with_header(lambda header: first_tensor(header).update(shape=[1, 1])), ("bytes",)),
    "another-type": (with_header(lambda header: first_tensor(header).update(dtype="I64")), ("bytes",)),
    "norms-that-are-not-numbers": (with_first_layer(not_numbers), ("finite",)),
    "files-in-each-others-place": (swapped_ends, ("tensor",)),
    "whole-digest-lies": (with_wrong_whole_digest, ("as a whole has SHA-256", "its reference is wrong")),
    "bit-flipped-on-disk": (with_corrupt_disk, ("expected SHA-256",)),
}


@pytest.fixture(scope="module")
def refusals(fleet: LocalService, neighbour: Neighbour) -> dict[str, str]:
    """All lies at once, and what the device said about each."""
    store = Store(fleet.state_dir / "models")
    honest = import_model(SMALL, store, name=ModelName("honest")).manifest
    names: dict[Digest, str] = {}
    for name, (lie, _) in LIES.items():
        manifest = msgspec.structs.replace(lie(store, honest), name=ModelName(name))
        names[manifest_digest(manifest)] = name
        store.put_manifest(manifest)
    for digest in (manifest_digest(honest), *names):
        # A publisher vouches for them: what it signs is still not believed to be true.
        publish_model(fleet.state_dir, store.manifest_bytes(digest), time.time())
    said: dict[str, str] = {}
    deadline_s = time.monotonic() + REFUSED_LIMIT_S
    while len(said) < len(LIES) and time.monotonic() < deadline_s:
        for beat in fleet.status().nodes:
            for hosted in beat.hosted:
                name = names.get(hosted.stage.model, "")
                assert not (name and hosted.status is StageStatus.READY), f"{name} was believed"
                if name and hosted.error is not None:
                    said[name] = hosted.error
        time.sleep(0.1)
    neighbour.check()
    return said


@pytest.mark.parametrize("name", LIES)
def test_a_model_that_lies_is_refused_by_name(refusals: dict[str, str], name: str) -> None:
    assert name in refusals, f"the device said nothing about {name}"
    for expected in LIES[name][1]:
        assert expected in refusals[name]


def test_bytes_that_are_not_what_was_promised_name_their_sender(fleet: LocalService, refusals: dict[str, str]) -> None:
    sender = _gateway(fleet)
    assert sender[:8] in refusals["bit-flipped-on-disk"]


def test_an_honest_model_beside_them_is_served(
    fleet: LocalService, refusals: dict[str, str], undisturbed: None
) -> None:
    """And asking for a model that is refused is a named error."""
    small = {"model": "honest", "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0}
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=fleet.api_url, headers=headers, timeout=30.0, trust_env=False) as client:
        deadline_s = time.monotonic() + REFUSED_LIMIT_S
        while (reply := client.post("/v1/completions", json=small)).status_code != httpx.codes.OK:
            assert time.monotonic() < deadline_s, reply.text
            time.sleep(0.2)
        assert reply.json()["usage"]["completion_tokens"] >= 1
        refused = client.post("/v1/completions", json=small | {"model": "cut-in-half"})
        assert refused.status_code == httpx.codes.SERVICE_UNAVAILABLE
        assert refused.json()["error"]["code"] == "no_capacity"
        assert refused.json()["error"]["message"]


def test_a_manifest_that_the_disk_changed_is_not_served(
    fleet: LocalService, refusals: dict[str, str], undisturbed: None
) -> None:
    store = Store(fleet.state_dir / "models")
    digest, _ = store.by_name("honest")
    corrupt_on_disk(store, digest, 100)

    def gone(status: object) -> bool:
        return all(entry.model != digest for entry in status.models)  # type: ignore[attr-defined]

    fleet.wait_for(gone, 20.0, "the catalogue without the corrupt manifest")
    reply = httpx.post(
        f"{fleet.api_url}/v1/completions",
        json={"model": "honest", "prompt": "a"},
        headers={"authorization": f"Bearer {KEY}"},
        timeout=30.0,
        trust_env=False,
    )
    assert reply.status_code in {httpx.codes.NOT_FOUND, httpx.codes.SERVICE_UNAVAILABLE}
    assert reply.json()["error"]["code"] in {"model_not_found", "no_capacity"}


def test_a_good_source_is_used_when_another_is_corrupt(fleet: LocalService, calm: Answer, undisturbed: None) -> None:
    """The operator's copy of a file is damaged after the first device fetched it; a second device gets a good one."""
    store = Store(fleet.state_dir / "models")
    _, manifest = store.by_name(MODEL)
    big = max(manifest.layers, key=lambda ref: ref.size_bytes)
    assert big.size_bytes > BLOB_CHUNK_BYTES
    for index in range(len(big.chunk_digests)):
        corrupt_on_disk(store, big.digest, index * BLOB_CHUNK_BYTES)
    fleet.join("second", "--memory", "1GiB")
    fleet.wait_for(_ready_on("second", manifest_digest(manifest)), 60.0, "the second device to hold the model")
    log = (fleet.folder / "second.output").read_text()
    dropped = [line for line in log.splitlines() if "is dropped as a source" in line]
    assert any(_gateway(fleet)[:8] in line and "expected SHA-256" in line for line in dropped), log


def _ready_on(name: str, model: Digest) -> Callable[[object], bool]:
    def ready(status: object) -> bool:
        return any(
            hosted.status is StageStatus.READY and hosted.stage.model == model
            for beat in status.nodes  # type: ignore[attr-defined]
            if beat.name == name
            for hosted in beat.hosted
        )

    return ready


def _gateway(fleet: LocalService) -> NodeId:
    return fleet.wait_for(lambda status: bool(status.gateways), 20.0, "a gateway").gateways[0].gateway
