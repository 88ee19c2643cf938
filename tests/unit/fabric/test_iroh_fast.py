"""The patch of iroh's binding is refused, whole, wherever something is not as it was when it was written."""

import subprocess
import sys

import pytest

SETUPS = {
    "another version": "import importlib.metadata as m; m.version = lambda name: '1.3.0'",
    "another source": "F._UniffiFfiConverterBytes.write = staticmethod(lambda value, buf: None)",
    "another name": "del F._UNIFFI_RUST_FUTURE_POLL_READY",
    "a failing self-test": "from fallow.fabric import iroh_fast; iroh_fast._self_test = lambda ffi: False",
}


@pytest.mark.parametrize("setup", SETUPS)
def test_it_refuses_what_it_does_not_know_and_changes_nothing(setup: str) -> None:
    # A process of its own, because the patch is for the life of one.
    code = f"""
import iroh.iroh_ffi as F
write = F._UniffiRustBufferBuilder.write
{SETUPS[setup]}
from fallow.fabric import iroh_fast
assert iroh_fast.enable() is False
assert iroh_fast.enable() is False
assert F._UniffiRustBufferBuilder.write is write
assert "lower" not in vars(F._UniffiFfiConverterBytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("iroh's fast path is off") == 1
