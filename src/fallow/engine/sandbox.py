"""How the worker process is kept away from the rest of the device: which means there are, and how each is started.

Rules
- The strongest that works here is used; whether it works is tried, once a process, not guessed from versions.
- The confined process sees its interpreter, its libraries and the model files, all read-only, and nothing else: no
  home, no keys, no configuration, no shell. It has no network, its environment holds nothing of the agent's, and no
  descriptor but its channel and a pipe for what it has to say.
- What it gives up itself, in every kind, is in `confined.py`.

`COVERED` and `UNCOVERED` say in words what holds and what does not; `fallow doctor` shows them, and `sandbox_probe.py`
tries them from inside.
"""

import contextlib
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from fallow.engine.confined import Policy, filter_is_known, landlock_version
from fallow.engine.settings import Confinement

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Huge pages for the weights where glibc can: 3 % more tokens a second. KV maps opt out."""
PROBE_TIMEOUT_S = 10.0
_LIBRARIES = ("numpy", "onnx", "onnxruntime", "msgspec", "fallow", "gguf", "tokenizers")
"""Whatever folder one of these lies in is one that the worker imports from."""
_SYSTEM = (
    "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/etc/ld.so.cache",
    "/proc/cpuinfo", "/sys/devices/system/cpu", "/sys/kernel/mm/transparent_hugepage",
)  # fmt: skip
"""The loader's libraries, and what tells the runtime about the processor and glibc about huge pages."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

COVERED: dict[Confinement, str] = {
    Confinement.BUBBLEWRAP: (
        "namespaces of its own without network, other processes or files beyond libraries and models (read-only); "
        "no capabilities; a filter on system calls"
    ),
    Confinement.LANDLOCK: (
        "only libraries and models can be read, nothing written; no sockets, no new processes, no signals to others, "
        "by a filter on system calls"
    ),
    Confinement.SEATBELT: "only libraries and models can be read, nothing written; no network, no new processes",
    Confinement.NONE: "an empty environment, and no descriptor but its channel",
}
UNCOVERED: dict[Confinement, tuple[str, ...]] = {
    Confinement.BUBBLEWRAP: (
        "a hole in the kernel itself",
        "what the processor leaks between processes (timing, caches)",
        "memory and threads beyond what the owner allowed, which the agent only measures",
    ),
    Confinement.LANDLOCK: (
        "a hole in the kernel itself",
        "what the processor leaks between processes (timing, caches)",
        "names, sizes and times of files, which can still be asked for; their contents cannot",
        "which processes exist, where the system shows that to everybody",
        "memory and threads beyond what the owner allowed, which the agent only measures",
    ),
    Confinement.SEATBELT: (
        "a hole in the kernel itself",
        "what the processor leaks between processes (timing, caches)",
        "names, sizes and times of files",
        "this profile has not been tried by the project's own tests yet",
    ),
    Confinement.NONE: (
        "files and network: the worker can do whatever its user may do",
        "install bubblewrap, or a Linux kernel with Landlock (5.13 or later), to change that",
    ),
}


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """How to start a confined process."""

    command: tuple[str, ...]
    environment: dict[str, str]
    reports_process: bool
    """Whether `--info-fd N` is understood: the process that is started is not the confined one, and says who is."""


def strongest() -> Confinement:
    """The strongest kind that works here."""
    if sys.platform == "linux":
        if bubblewrap_works():
            return Confinement.BUBBLEWRAP
        if landlock_version() >= 1 and filter_is_known():
            return Confinement.LANDLOCK
    if sys.platform == "darwin" and shutil.which("sandbox-exec"):
        return Confinement.SEATBELT
    return Confinement.NONE


@functools.lru_cache(maxsize=1)
def bubblewrap_works() -> bool:
    """Whether `bwrap` is here and may make namespaces (some systems forbid that to users)."""
    path = shutil.which("bwrap")
    if path is None or not filter_is_known():
        return False
    # Nothing is there to be started, so that a complaint about exactly that is what success looks like.
    command = [path, *_NAMESPACES, "--dev", "/dev", "/nothing"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PROBE_TIMEOUT_S, check=False, env={})
    except (OSError, subprocess.TimeoutExpired):
        return False
    return b"execvp /nothing" in done.stderr


def launch(
    confinement: Confinement, module: str, arguments: Sequence[str], models: Iterable[Path], info: int | None = None
) -> Launch:
    """Start `main(arguments)` of a module of ours, confined. `models`: folders of files that it may read.

    `info`: a descriptor for bubblewrap's report; without one, none is asked for.
    """
    folders = [str(folder.resolve()) for folder in models]
    readable = tuple(dict.fromkeys([*software(), *folders]))
    policy = Policy(confinement=confinement, readable=(*readable, *_DEVICES))
    # -P: no folder of the agent's choosing on the path; -s: nobody's home; -B: nothing is written.
    python = [sys.executable, "-P", "-s", "-B", "-m", "fallow.engine.confined"]
    command = [*python, msgspec.json.encode(policy).decode(), module, *arguments]
    if confinement is Confinement.BUBBLEWRAP:
        command = [*_bubblewrap(readable, info), *command]
    elif confinement is Confinement.SEATBELT:
        command = ["sandbox-exec", "-p", _seatbelt(readable), *command]
    return Launch(
        command=tuple(command),
        environment=bare_environment(),
        reports_process=confinement is Confinement.BUBBLEWRAP,
    )


def bare_environment() -> dict[str, str]:
    """All that a worker finds in its environment: nothing of the agent's."""
    ours = str(Path(__file__).parents[2])
    inside = any(ours.startswith(prefix) for prefix in (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")))
    return {
        "LANG": "C.UTF-8",
        "GLIBC_TUNABLES": HUGE_PAGES,
        "OPENBLAS_NUM_THREADS": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        **({} if inside else {"PYTHONPATH": ours}),
    }


@functools.lru_cache(maxsize=1)
def software() -> tuple[str, ...]:
    """Where the interpreter and its libraries lie: the only files that a worker needs besides models."""
    found = [*_SYSTEM, *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))]
    found += [str(sysconfig.get_config_var("LIBDIR") or ""), *_links_to(Path(sys.executable))]
    if sys.prefix != sys.base_prefix:
        found += [str(Path(sys.prefix) / name) for name in ("pyvenv.cfg", "bin", "lib", "lib64")]
    for name in _LIBRARIES:
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(name)
            for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
                found.append(folder)
                found.append(str(Path(folder).parent / f"{name}.libs"))
    present = sorted({path for path in found if path and os.path.exists(path)})  # noqa: PTH110
    return tuple(path for path in present if not any(_below(path, other) for other in present))


def _below(path: str, other: str) -> bool:
    return path != other and path.startswith(other.rstrip("/") + "/")


def _links_to(path: Path) -> list[str]:
    """An executable and every link on the way to the file itself."""
    chain = [str(path)]
    while path.is_symlink() and len(chain) < 16:
        path = path.parent / path.readlink()
        chain.append(os.path.normpath(path))
    return chain


# --- bubblewrap ---------------------------------------------------------------------------------

_NAMESPACES = (
    "--unshare-user-try", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
    "--as-pid-1", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "worker",
)  # fmt: skip


def _bubblewrap(readable: Sequence[str], info: int | None) -> list[str]:
    arguments = [shutil.which("bwrap") or "bwrap", *_NAMESPACES]
    if info is not None:
        arguments += ["--info-fd", str(info)]
    for path in readable:
        if os.path.islink(path) and os.path.isdir(path):  # noqa: PTH114, PTH112
            arguments += ["--symlink", os.readlink(path), path]  # noqa: PTH115
        else:
            arguments += ["--ro-bind", path, path]
    for device in _DEVICES:
        arguments += ["--dev-bind", device, device]
    return [*arguments, "--remount-ro", "/", "--chdir", "/"]


# --- macOS --------------------------------------------------------------------------------------


def _seatbelt(readable: Sequence[str]) -> str:
    """A profile in the language of `sandbox-exec`: everything is refused but what a worker needs."""
    places = (*readable, "/System/Library", "/Library/Apple", "/private/var/db/dyld", *_DEVICES)
    folders = " ".join(f'(subpath "{_quoted(path)}")' for path in places)
    return (
        "(version 1)(deny default)(deny network*)"
        f"(allow file-read* {folders})(allow file-read-metadata)"
        '(allow process-exec (literal "' + _quoted(str(Path(sys.executable).resolve())) + '"))'
        "(allow sysctl-read)(allow mach-priv-task-port (target self))(allow signal (target self))"
    )


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
