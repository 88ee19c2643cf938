"""Layer files: written as the manifest promises, opened without copying, and never believed without a check."""

import json
import struct

import numpy as np
import pytest
from checkpoints import FIXTURES, TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fallow.domain.errors import ModelError
from fallow.domain.model import Quantisation
from fallow.models.importer import import_model
from fallow.models.safetensors_header import build_header, read_header
from fallow.models.store import Store
from fallow.models.tensors import Part, expected_tensors, open_tensors

LAYER = expected_tensors(TINY, Quantisation.Q8, Part.LAYER)


def layer_file(path, specs=LAYER, fill=0, header=None):
    """A file with the given tensors, every byte `fill`."""
    header = header or build_header([(name, spec.dtype, spec.shape) for name, spec in specs.items()])
    sizes = [int(np.prod(spec.shape)) * (4 if spec.dtype == "F32" else 1) for spec in specs.values()]
    path.write_bytes(header + bytes([fill]) * sum(sizes))
    return path


def open_layer(path):
    return open_tensors(path, TINY, Quantisation.Q8, Part.LAYER)


@pytest.mark.parametrize("quantisation", list(Quantisation))
def test_files_are_what_the_manifest_promises(tmp_path, quantisation):
    store = Store(tmp_path)
    manifest = import_model(FIXTURES / "qwen2", store, quantisation).manifest
    parts = [(Part.EMBEDDING, manifest.embedding), (Part.HEAD, manifest.head)]
    parts += [(Part.LAYER, ref) for ref in manifest.layers]
    for part, ref in parts:
        path = store.blob_path(ref.digest)
        tensors = open_tensors(path, manifest.config, quantisation, part)
        by_library = load_file(path)
        assert list(tensors) == list(expected_tensors(manifest.config, quantisation, part))
        assert tensors.keys() == by_library.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, by_library[name])
            assert tensor.dtype == by_library[name].dtype
            assert tensor.shape == by_library[name].shape


def test_views_are_mapped_aligned_and_read_only(tmp_path):
    tensors = open_layer(layer_file(tmp_path / "layer"))
    addresses = [tensor.ctypes.data for tensor in tensors.values()]
    assert addresses[0] % 64 == 0
    for name, tensor in tensors.items():
        assert not tensor.flags.owndata
        assert not tensor.flags.writeable
        assert tensor.flags.c_contiguous
        assert tensor.ctypes.data % tensor.itemsize == 0
        assert LAYER[name].shape == tensor.shape
    with pytest.raises(ValueError, match="read-only"):
        tensors["mlp_norm"][0] = 1.0


def test_four_bit_models_keep_embedding_and_head_in_eight():
    assert list(expected_tensors(TINY, Quantisation.Q4, Part.EMBEDDING)) == ["embedding.q8", "embedding.scales"]
    assert list(expected_tensors(TINY, Quantisation.Q4, Part.HEAD)) == ["head.q8", "head.scales", "final_norm"]
    assert expected_tensors(TINY, Quantisation.Q4, Part.LAYER)["down.q4"].shape == (32, 2, 16)


# --- files that lie -----------------------------------------------------------------------------


def header_of(entries) -> bytes:
    encoded = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(encoded)) + encoded


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "expected a safetensors file, got 0 bytes"),
        (b"\x01\x02", "got 2 bytes"),
        (struct.pack("<Q", 1 << 62) + b"{}", "claims 4611686018427387904 bytes"),
        (struct.pack("<Q", 70_000) + b" " * 80_000, "claims 70000 bytes, more than 65536"),
        (header_of(b"not json"), "not valid JSON"),
        (header_of(b"[" * 60_000), "not valid JSON"),
        (header_of(b"\xff"), "not valid JSON"),
        (header_of(b"[]"), "not a JSON object"),
        (header_of(b'{"a":1,"a":2}'), "a name occurs twice"),
        (header_of({"a": 7}), "expected an object, got int"),
        (header_of({"a": entry(dtype="X9")}) + b"1234", "unknown dtype"),
        (header_of({"a": entry(shape=(-1,))}) + b"1234", "not a list of sizes"),
        (header_of({"a": entry(shape=(True,))}) + b"1234", "not a list of sizes"),
        (header_of({"a": entry(shape=(2,))}) + b"1234", "needs 8 bytes, but it has 4"),
        (header_of({"a": entry(shape=(1 << 61, 1 << 61))}) + b"1234", "needs"),
        (header_of({"a": entry(offsets=(4, 0))}) + b"1234", "needs 4 bytes, but it has -4"),
        (header_of({"a": entry(offsets=(1, 5))}) + b"12345", "leaves a gap"),
        (header_of({"a": entry(offsets=(400, 404))}) + b"1234", "leaves a gap"),
        (header_of({"a": entry(), "b": entry()}) + b"1234", "overlaps"),
        (header_of({"a": entry()}) + b"12", "but the file has"),
        (header_of({"a": entry()}) + b"123456", "but the file has"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, content, complaint):
    path = tmp_path / "layer"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=complaint):
        open_layer(path)


def test_tensors_that_do_not_fit_the_config_are_refused_by_name(tmp_path):
    without = {name: spec for name, spec in LAYER.items() if name != "down.q8"}
    with pytest.raises(ModelError, match=r"'down.q8': expected U8 \[32, 2, 32\], got nothing"):
        open_layer(layer_file(tmp_path / "missing", without))
    more = LAYER | {"evil": LAYER["mlp_norm"]}
    with pytest.raises(ModelError, match="'evil': not expected in a layer file"):
        open_layer(layer_file(tmp_path / "extra", more))
    transposed = LAYER | {"qkv.scales": type(LAYER["qkv.scales"])("F32", LAYER["qkv.scales"].shape[::-1])}
    with pytest.raises(ModelError, match=r"'qkv.scales': expected F32 \[64, 1\], got F32 \[1, 64\]"):
        open_layer(layer_file(tmp_path / "shape", transposed))
    retyped = LAYER | {"qkv.q8": type(LAYER["qkv.q8"])("I8", LAYER["qkv.q8"].shape)}
    with pytest.raises(ModelError, match=r"'qkv.q8': expected U8 \[64, 1, 32\], got I8"):
        open_layer(layer_file(tmp_path / "dtype", retyped))
    with pytest.raises(ModelError, match="cannot be read"):
        open_layer(tmp_path / "absent")


def test_scales_and_norms_that_are_not_numbers_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"qkv.scales.*expected finite values"):
        open_layer(layer_file(tmp_path / "nan", fill=0xFF))
    path = layer_file(tmp_path / "infinite")
    norm = read_header(path, 1 << 16)["mlp_norm"]
    content = bytearray(path.read_bytes())
    content[norm.end - 4 : norm.end] = struct.pack("<f", float("-inf"))
    path.write_bytes(content)
    with pytest.raises(ModelError, match="'mlp_norm': expected finite values"):
        open_layer(path)


def test_float32_that_is_not_aligned_is_refused(tmp_path):
    header = build_header([(name, spec.dtype, spec.shape) for name, spec in LAYER.items()])
    unaligned = struct.pack("<Q", len(header) - 8 + 1) + header[8:] + b" "
    with pytest.raises(ModelError, match="aligned to 4 bytes"):
        open_layer(layer_file(tmp_path / "layer", header=unaligned))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_mutated_header_opens_right_or_raises_a_named_error(tmp_path_factory, data):
    path = layer_file(tmp_path_factory.mktemp("files") / "layer")
    content = bytearray(path.read_bytes())
    header_bytes = 8 + struct.unpack("<Q", content[:8])[0]
    at = data.draw(st.integers(0, header_bytes - 1))
    content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) - 1, header_bytes, at]))])
    try:
        tensors = open_layer(path)
    except ModelError:
        return
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: spec.shape for n, spec in LAYER.items()}
