"""A guarded fast path into the iroh binding (uniffi 0.30-style, iroh 1.2).

Why: the generated Python copies outgoing bytes one at a time (5 MB/s), and each of its async calls costs a coroutine
and one or two passes of the event loop. Here outgoing bytes are copied by `memmove`, and reads and writes are polled
directly: a call that is ready at once costs no pass at all, one that is not costs one.

Rules
- `enable()` changes the binding only if its version and the source of what is replaced are the known ones and a
  self-test passes; otherwise it says why, changes nothing, and `iroh_link.py` uses the binding as it is.
- Reads and writes are driven from the event loop's thread alone. The binding calls back on its own threads; all that
  happens there is `call_soon_threadsafe`.
"""

import asyncio
import atexit
import ctypes
import importlib
import importlib.metadata
import inspect
import itertools
import logging
import struct
import threading
from collections.abc import Callable
from typing import Any, Final

BINDING: Final = "iroh.iroh_ffi"
KNOWN_VERSIONS: Final = ("1.2.",)
READ_BYTES_MIN: Final = 16 * 1024
READS_PER_PASS: Final = 8
"""Reads that one link may do in a row before others get their turn."""

_READY: Final = 0

log = logging.getLogger(__name__)
_state: dict[str, bool] = {}


def enable() -> bool:
    """Switch the fast path on where it is safe. Returns whether it is on. Cheap after the first call."""
    if "on" not in _state:
        problem = _patch()
        _state["on"] = problem is None
        if problem is not None:
            log.warning("iroh's fast path is off (%s): links through iroh will be slow", problem)
    return _state["on"]


# --- outgoing bytes -----------------------------------------------------------------------------


def _patch() -> str | None:
    """Replace the byte-wise copy. Returns why not, or `None` when it is done."""
    try:
        version = importlib.metadata.version("iroh")
        ffi: Any = importlib.import_module(BINDING)
    except ImportError:
        return "iroh is not installed"
    if not version.startswith(KNOWN_VERSIONS):
        return f"iroh {version} is not a known version"
    try:
        builder, converter, buffer = ffi._UniffiRustBufferBuilder, ffi._UniffiFfiConverterBytes, ffi._UniffiRustBuffer
        known = (
            [field[0] for field in buffer._fields_] == ["capacity", "len", "data"]
            and "for i, byte in enumerate(value)" in inspect.getsource(builder.write)
            and "write_i32(len(value))" in inspect.getsource(converter.write)
            and "future_ptr, poll_code" in inspect.getsource(ffi).split("def _uniffi_continuation_callback(")[1][:40]
            and ffi._UNIFFI_RUST_FUTURE_POLL_READY == _READY
        )
    except (AttributeError, OSError, TypeError, IndexError):
        return "the binding's source is not the known one"
    if not known:
        return "the binding's source is not the known one"
    write, lower = _fast_converters(ffi)
    saved = builder.write
    builder.write, converter.lower = write, classmethod(lower)
    if not _self_test(ffi):
        builder.write = saved
        del converter.lower
        return "its self-test failed"
    return None


def _fast_converters(ffi: Any) -> tuple[Callable[..., None], Callable[..., Any]]:
    buffer, make_status = ffi._UniffiRustBuffer, ffi._UniffiRustCallStatus
    alloc = ffi._UniffiLib.ffi_iroh_ffi_rustbuffer_alloc
    pack = struct.Struct(">i").pack
    memmove, addressof = ctypes.memmove, ctypes.addressof

    def write(self: Any, value: bytes | bytearray | memoryview) -> None:
        data, size = _contiguous(value)
        rbuf = self.rbuf
        if rbuf.len + size > rbuf.capacity:
            rbuf = self.rbuf = buffer.reserve(rbuf, size)
        if size:
            memmove(addressof(rbuf.data.contents) + rbuf.len, data, size)
        rbuf.len += size

    def lower(cls: Any, value: bytes | bytearray | memoryview) -> Any:
        data, size = _contiguous(value)
        if size > 0x7FFFFFFF - 4:
            raise ValueError("too many bytes for one call")
        status = make_status()
        rbuf = alloc(size + 4, ctypes.byref(status))
        if status.code:
            raise MemoryError("iroh could not allocate a buffer")
        start = addressof(rbuf.data.contents)
        memmove(start, pack(size), 4)
        if size:
            memmove(start + 4, data, size)
        rbuf.len = size + 4
        return rbuf

    return write, lower


def _contiguous(value: bytes | bytearray | memoryview) -> tuple[Any, int]:
    """Something that memmove can read from, and its size in bytes."""
    if type(value) is bytes:
        return value, len(value)
    view = memoryview(value)
    if view.readonly or not view.c_contiguous:
        return bytes(view), view.nbytes
    return (ctypes.c_char * view.nbytes).from_buffer(view), view.nbytes


def _lifted(rbuf: Any) -> bytes:
    """The bytes in a buffer that Rust returned: a big-endian i32 length, then as many bytes. Does not free it."""
    size: int = rbuf.len - 4
    start = ctypes.addressof(rbuf.data.contents)
    if size < 0 or int.from_bytes(ctypes.string_at(start, 4), "big") != size:
        raise ValueError("iroh returned a malformed buffer")
    return ctypes.string_at(start + 4, size)


def _self_test(ffi: Any) -> bool:
    converter, buffer = ffi._UniffiFfiConverterBytes, ffi._UniffiRustBuffer
    samples = (b"", b"x", bytes(range(256)) * 300, bytearray(b"abc"), memoryview(b"xyz"))
    for sample in samples:
        lowered = converter.lower(sample)
        if _lifted(lowered) != bytes(sample) or converter.lift(lowered) != bytes(sample):
            return False
        with buffer.alloc_with_builder() as made:
            converter.write(sample, made)
            built = made.finalize()
        if converter.lift(built) != bytes(sample):
            return False
    return True


# --- direct polling -----------------------------------------------------------------------------

_slots: dict[int, "_Slot"] = {}
_keys = itertools.count(1)
_callback: list[Any] = []


def _poll_callback(ffi: Any) -> Any:
    """The one C callback that every poll is given; kept for the life of the process."""
    if not _callback:

        def on_poll(key: int, code: int) -> None:
            slot = _slots.get(key)
            if slot is None:
                return  # stopped meanwhile
            if slot.polling_thread == threading.get_ident():
                slot.answer = code
            else:
                slot.wake()

        _callback.append(ffi._UNIFFI_RUST_FUTURE_CONTINUATION_CALLBACK(on_poll))
        atexit.register(_stop_all)
    return _callback[0]


def _stop_all() -> None:
    """A Rust thread that calls into an interpreter that is going away aborts the process: leave it nothing to call."""
    for slot in list(_slots.values()):
        slot.stop()


class _Slot:
    """One outstanding call into Rust at a time, on behalf of one direction of one stream."""

    def __init__(self, kind: str, on_error: Callable[[Exception], None]) -> None:
        ffi: Any = importlib.import_module(BINDING)
        self._ffi = ffi
        self._loop = asyncio.get_running_loop()
        self._on_error = on_error
        library = ffi._UniffiLib
        self._ffi_poll = getattr(library, f"ffi_iroh_ffi_rust_future_poll_{kind}")
        self._ffi_complete = getattr(library, f"ffi_iroh_ffi_rust_future_complete_{kind}")
        self._ffi_free = getattr(library, f"ffi_iroh_ffi_rust_future_free_{kind}")
        self._make_status = ffi._UniffiRustCallStatus
        self._errors = ffi._UniffiFfiConverterTypeIrohError__as_error
        self._continuation = _poll_callback(ffi)
        self._future: int | None = None
        self._key = next(_keys)
        self.polling_thread = 0
        self.answer: int | None = None
        _slots[self._key] = self

    def wake(self) -> None:
        """On a thread of the binding: there may be something to take."""
        try:
            self._loop.call_soon_threadsafe(self._resume)
        except RuntimeError:
            _slots.pop(self._key, None)  # the loop is closed; nobody waits any more

    def stop(self) -> None:
        """Give up what is outstanding. Idempotent."""
        _slots.pop(self._key, None)
        future, self._future = self._future, None
        if future is not None:
            self._ffi_free(future)

    def _resume(self) -> None:
        raise NotImplementedError

    def _ready(self) -> bool:
        """Poll once. When false, `wake` will come."""
        self.answer = None
        self.polling_thread = threading.get_ident()
        self._ffi_poll(self._future, self._continuation, self._key)
        self.polling_thread = 0
        return self._settle(self.answer)

    def _settle(self, answer: int | None) -> bool:
        """What the callback said while we polled, if it was called."""
        if answer is not None and answer != _READY:
            self._loop.call_soon(self._resume)
        return answer == _READY

    def _result(self) -> Any:
        future, self._future = self._future, None
        try:
            return self._call(self._ffi_complete, future)
        finally:
            self._ffi_free(future)

    def _call(self, function: Any, *arguments: Any) -> Any:
        """A synchronous call into Rust. Raises the binding's own errors."""
        status = self._make_status()
        result = function(*arguments, ctypes.byref(status))
        if status.code:
            self._ffi._uniffi_check_call_status(self._errors, status)
        return result


class FastReader(_Slot):
    """Always has one read outstanding; `on_data(b"")` is the end of the stream. Pausable."""

    def __init__(
        self, stream: Any, size: int, on_data: Callable[[bytes], None], on_error: Callable[[Exception], None]
    ) -> None:
        super().__init__("rust_buffer", on_error)
        self._stream = stream
        self._size = size
        self._asked = min(size, READ_BYTES_MIN)
        self._on_data = on_data
        self._read = self._ffi._UniffiLib.uniffi_iroh_ffi_fn_method_recvstream_read
        self._clone = self._ffi._UniffiLib.uniffi_iroh_ffi_fn_clone_recvstream
        self._release = self._ffi._UniffiLib.ffi_iroh_ffi_rustbuffer_free
        self._paused = False
        self._scheduled = False
        self._over = False

    def start(self) -> None:
        self._schedule()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._schedule()

    def stop(self) -> None:
        self._over = True
        super().stop()

    def _schedule(self) -> None:
        if not self._scheduled and not self._over:
            self._scheduled = True
            self._loop.call_soon(self._resume)

    def _resume(self) -> None:
        self._scheduled = False
        for _ in range(READS_PER_PASS):
            if self._over or (self._paused and self._future is None):
                return
            try:
                if self._future is None:
                    self._future = self._read(self._call(self._clone, self._stream._handle), self._asked)
                if not self._ready():
                    return
                rbuf = self._result()
                data = _lifted(rbuf)
                self._call(self._release, rbuf)
            except Exception as error:
                self._over = True
                self._on_error(error)
                return
            self._over = not data
            # iroh makes a fresh buffer of the asked size for each read: a small one while frames are small.
            self._asked = self._size if len(data) == self._asked else min(self._size, READ_BYTES_MIN)
            self._on_data(data)
        self._schedule()


class FastWriter(_Slot):
    """One write at a time. `write` returns true when it was taken at once; else `on_done` follows."""

    def __init__(self, stream: Any, on_done: Callable[[], None], on_error: Callable[[Exception], None]) -> None:
        super().__init__("void", on_error)
        self._stream = stream
        self._on_done = on_done
        self._write = self._ffi._UniffiLib.uniffi_iroh_ffi_fn_method_sendstream_write_all
        self._clone = self._ffi._UniffiLib.uniffi_iroh_ffi_fn_clone_sendstream
        self._lower = self._ffi._UniffiFfiConverterBytes.lower

    def write(self, data: bytes) -> bool:
        try:
            self._future = self._write(self._call(self._clone, self._stream._handle), self._lower(data))
            if not self._ready():
                return False
            self._result()
        except Exception as error:
            self._on_error(error)
            return False
        return True

    def _resume(self) -> None:
        if self._future is None:
            return
        try:
            if not self._ready():
                return
            self._result()
        except Exception as error:
            self._on_error(error)
            return
        self._on_done()
