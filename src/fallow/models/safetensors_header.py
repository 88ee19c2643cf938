"""The safetensors container: header in, header out. Eight bytes of length, JSON, then tensors without gaps.

Parsed here rather than by the library because the file may come from a stranger: the header's size, every offset and
every name is checked before anything is mapped, and duplicate JSON keys are an error instead of the last one winning.
The format is described at https://huggingface.co/docs/safetensors.
"""

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from fallow.domain.errors import ModelError

DATA_ALIGNMENT_BYTES = 64
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 8

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


class TensorEntry(msgspec.Struct, frozen=True):
    """One tensor of a file. `start` and `end` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path, max_header_bytes: int) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file. Raises `ModelError` for anything that is not exactly in order."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise ModelError(f"{path.name}: expected a safetensors file, got {file_bytes} bytes")
            (header_bytes,) = struct.unpack("<Q", prefix)
            limit = min(max_header_bytes, file_bytes - 8)
            if header_bytes > limit:
                raise ModelError(f"{path.name}: its header claims {header_bytes} bytes, more than {limit}")
            raw = file.read(header_bytes)
    except OSError as error:
        raise ModelError(f"{path.name}: cannot be read: {error.strerror}") from error
    entries = _parse(path.name, raw, 8 + header_bytes)
    _check_coverage(path.name, entries, 8 + header_bytes, file_bytes)
    return {entry.name: entry for entry in entries}


def build_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The bytes in front of tensors `(name, dtype, shape)` that follow in this order; padded to align the data."""
    header: dict[str, Any] = {}
    at = 0
    for name, dtype, shape in tensors:
        size_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size_bytes]}
        at += size_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-(8 + len(encoded)) % DATA_ALIGNMENT_BYTES)
    return struct.pack("<Q", len(encoded)) + encoded


def _parse(file_name: str, raw: bytes, data_start: int) -> list[TensorEntry]:
    try:
        header = json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file_name}: its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{file_name}: its header is not a JSON object")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise ModelError(f"{file_name}: expected at most {MAX_TENSORS} tensors, got {len(header)}")
    return [_entry(file_name, name, fields, data_start) for name, fields in header.items()]


def _entry(file_name: str, name: str, fields: object, data_start: int) -> TensorEntry:
    what = f"{file_name}: tensor {name[:120]!r}"
    if not isinstance(fields, dict):
        raise ModelError(f"{what}: expected an object, got {type(fields).__name__}")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ModelError(f"{what}: unknown dtype {str(dtype)[:40]!r}")
    sizes, bounds = _sizes(shape), _sizes(offsets)
    if sizes is None or len(sizes) > MAX_DIMENSIONS:
        raise ModelError(f"{what}: its shape is not a list of sizes")
    if bounds is None or len(bounds) != 2:
        raise ModelError(f"{what}: its data_offsets are not two offsets")
    start, end = bounds
    expected_bytes = math.prod(sizes) * DTYPE_BYTES[dtype]
    if end - start != expected_bytes:
        raise ModelError(f"{what}: {dtype} {list(sizes)} needs {expected_bytes} bytes, but it has {end - start}")
    return TensorEntry(name, dtype, sizes, data_start + start, data_start + end)


def _check_coverage(file_name: str, entries: list[TensorEntry], data_start: int, file_bytes: int) -> None:
    """Tensors must fill the file exactly: no overlap, no gap, nothing beyond the end."""
    at = data_start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start != at:
            relation = "overlaps another" if entry.start < at else "leaves a gap before it"
            raise ModelError(f"{file_name}: tensor {entry.name[:120]!r}: {relation} at byte {entry.start}")
        at = entry.end
    if at != file_bytes:
        raise ModelError(f"{file_name}: its tensors end at byte {at}, but the file has {file_bytes} bytes")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a name occurs twice")
    return unique


def _sizes(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value):
        return tuple(value)
    return None
