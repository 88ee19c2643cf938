"""The GGUF container: metadata and tensor positions, parsed with a bound on everything.

Fallow parses it itself because the `gguf` package's reader trusts lengths and counts, and needs seconds for a large
vocabulary. Only versions 2 and 3, little-endian. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
Values are returned as Python objects; arrays of numbers as numpy arrays, arrays of strings as lists.
"""

import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from fallow.domain.errors import ModelError
from fallow.models.source import stored_bytes

GGUF_MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 4
MAX_STRING_BYTES = 16 << 20
MAX_ARRAY_ITEMS = 8 << 20
MAX_METADATA_BYTES = 512 << 20

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip


class GgufTensor(msgspec.Struct, frozen=True):
    """Position of a tensor. `shape` is row-major (`[out, in]`); `start` and `end` count from the start of the file."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    end: int


class GgufFile(msgspec.Struct, frozen=True):
    """A parsed and checked file; `mapped` are its bytes, uint8 `[file size]`, read-only."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    mapped: NDArray[np.uint8]


def open_gguf(path: Path) -> GgufFile:
    """Parse a GGUF file's header and map it. Raises `ModelError` that names what is wrong and where."""
    try:
        if path.stat().st_size < 24:
            raise ModelError(f"{path.name}: expected a GGUF file, got {path.stat().st_size} bytes")
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise ModelError(f"{path.name}: cannot be read: {error.strerror}") from error
    cursor = _Cursor(path.name, mapped.data)
    if cursor.take(4) != GGUF_MAGIC:
        raise ModelError(f"{path.name}: expected a GGUF file, but it does not start with 'GGUF'")
    version = cursor.integer("<I")
    if version not in VERSIONS:
        raise ModelError(f"{path.name}: expected GGUF version 2 or 3 (little-endian), got {version}")
    tensor_count = cursor.count("tensors", MAX_TENSORS)
    key_count = cursor.count("metadata keys", MAX_KEYS)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string()
        if key in metadata:
            raise ModelError(f"{path.name}: metadata key {key[:120]!r} occurs twice")
        metadata[key] = cursor.value(cursor.integer("<I"))
    tensors = _read_tensors(cursor, tensor_count, _alignment(path.name, metadata), len(mapped))
    return GgufFile(path, metadata, tensors, mapped)


class _Cursor:
    """Reads forward through the header; every read is checked against the end and against a bound."""

    def __init__(self, file_name: str, data: memoryview) -> None:
        self.file_name = file_name
        self.at = 0
        self._data = data

    def take(self, size_bytes: int) -> memoryview:
        end = self.at + size_bytes
        if end > min(len(self._data), MAX_METADATA_BYTES):
            raise ModelError(f"{self.file_name}: it ends inside its header, at byte {self.at}; is it truncated?")
        taken = self._data[self.at : end]
        self.at = end
        return taken

    def integer(self, layout: str) -> int:
        value: int = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        return value

    def count(self, what: str, limit: int) -> int:
        count = self.integer("<Q")
        if count > limit:
            raise ModelError(f"{self.file_name}: it claims {count} {what}; expected at most {limit}")
        return count

    def string(self) -> str:
        raw = self.take(self.count("bytes in a string", MAX_STRING_BYTES))
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.file_name}: a string before byte {self.at} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        value = self._numbers(kind, 1)[0].item()
        return bool(value) if kind == _BOOL else value

    def _array(self) -> list[str] | NDArray[Any]:
        kind = self.integer("<I")
        count = self.count("array items", MAX_ARRAY_ITEMS)
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        return self._numbers(kind, count).copy()

    def _numbers(self, kind: int, count: int) -> NDArray[Any]:
        layout = _SCALARS.get(kind)
        if layout is None:
            raise ModelError(f"{self.file_name}: unknown metadata type {kind} before byte {self.at}")
        dtype = np.dtype(layout)
        return np.frombuffer(self.take(count * dtype.itemsize), dtype=dtype)


def _alignment(file_name: str, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ModelError(f"{file_name}: general.alignment: expected a power of two, got {alignment!r}")
    return alignment


def _read_tensors(cursor: _Cursor, count: int, alignment: int, file_bytes: int) -> dict[str, GgufTensor]:
    found: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int]] = []
    for _ in range(count):
        name = cursor.string()
        dimensions = cursor.integer("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ModelError(f"{cursor.file_name}: tensor {name[:120]!r} claims {dimensions} dimensions")
        shape = tuple(cursor.integer("<Q") for _ in range(dimensions))[::-1]
        found.append((name, _kind(cursor, name), shape, cursor.integer("<Q")))
    data_start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in found:
        if name in tensors:
            raise ModelError(f"{cursor.file_name}: tensor {name[:120]!r} occurs twice")
        start = data_start + offset
        end = start + stored_bytes(name, kind, shape)
        if end > file_bytes:
            raise ModelError(
                f"{cursor.file_name}: tensor {name[:120]!r} ends at byte {end}, but the file has {file_bytes} bytes; "
                "is it truncated?"
            )
        tensors[name] = GgufTensor(name, kind, shape, start, end)
    _check_overlap(cursor.file_name, tensors)
    return tensors


def _kind(cursor: _Cursor, name: str) -> GGMLQuantizationType:
    number = cursor.integer("<I")
    try:
        return GGMLQuantizationType(number)
    except ValueError as error:
        raise ModelError(f"{cursor.file_name}: tensor {name[:120]!r} has the unknown type {number}") from error


def _check_overlap(file_name: str, tensors: dict[str, GgufTensor]) -> None:
    at, before = 0, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        if tensor.start < at:
            raise ModelError(f"{file_name}: tensors {before[:120]!r} and {tensor.name[:120]!r} overlap")
        at, before = tensor.end, tensor.name
