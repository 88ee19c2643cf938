"""Child processes that do not outlive the process that starts them, however that one ends.

The kernel sees to it on Linux. It watches the *thread* that starts a child, so that this has to be the main one. A
child elsewhere, or of another thread, has to watch its parent itself (`processes/lifetime.py`).
"""

import ctypes
import os
import signal
import sys
from typing import Any, Final

_PR_SET_PDEATHSIG: Final = 1


def ending_with_us(by: signal.Signals) -> dict[str, Any]:
    """What to start a child with, as keyword arguments of `subprocess`, so that it gets this signal when we end."""
    if sys.platform != "linux":
        return {}
    libc = ctypes.CDLL(None)  # loaded before the fork: the child must not import
    parent = os.getpid()

    def in_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, by)
        if os.getppid() != parent:
            os._exit(1)

    return {"preexec_fn": in_child}
