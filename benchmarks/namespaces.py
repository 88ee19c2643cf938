"""Network namespaces, for networks of our own on one machine: whether they may be made here, and how to be in one.

A thread that has entered a namespace makes its sockets and processes there, so that ordinary code runs unchanged in
`inside`. Linux and root only. The system tests' networks (`tests/system/networks.py`) stand on this as well.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000


def why_not(smallest: Callable[[], AbstractContextManager[object]]) -> str | None:
    """Why no such network can be made here, or `None`. `smallest`: one to try it with."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if shutil.which("ip") is None:
        return "the command `ip` (iproute2) is not installed"
    if os.geteuid() != 0:
        return "making a network namespace needs root"
    try:
        with smallest():
            return None
    except (OSError, RuntimeError) as error:
        return f"no network can be made: {error}"


def inside(name: str, work: Callable[[], T]) -> T:
    """Run `work` in a namespace; the processes that it starts stay there."""
    with ThreadPoolExecutor(1, initializer=enter, initargs=(name,)) as pool:
        return pool.submit(work).result()


def enter(name: str) -> None:
    """Move the calling thread into a namespace. Raises `OSError`."""
    with Path("/run/netns", name).open("rb") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")


def ip(*arguments: str) -> None:
    """The command of that name. Raises `RuntimeError` with what it said."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def remove(names: Iterable[str]) -> None:
    """Those that are there."""
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
