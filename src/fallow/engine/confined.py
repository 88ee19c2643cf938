"""The first code of a confined process: `python -m fallow.engine.confined POLICY MODULE ARGUMENT…`.

Rules
- It gives up its rights before anything large is imported: before a thread exists that would keep them, and before
  a byte of a model or of a peer is read. Then it runs `main(arguments)` of the module.
- What cannot be given up although the policy says so ends the process. Missing evidence means no.
- Given up on Linux: gaining rights (`no_new_privs`), being traced and dumped, core files; all calls to the kernel that
  a worker has no use for (`SYSCALLS`): sockets, other processes, new processes, writing to any file; and with Landlock
  every file but those below `readable`.

The filter is a list of what is refused, not of what is allowed, so that a new version of a library does not end a
worker. It is a second wall in bubblewrap, and half of the only one with Landlock. x86-64 and arm64.
"""

import ctypes
import errno
import importlib
import os
import platform
import resource
import struct
import sys
from collections.abc import Iterator, Sequence

import msgspec

from fallow.engine.settings import Confinement

FILES_MAX = 4096
"""Open files: one or two for each layer of a model."""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What the process keeps. Decided by the agent (`sandbox.py`), carried out here."""

    confinement: Confinement
    readable: tuple[str, ...]
    """Files, and folders with all below them."""


def main() -> None:
    """The process: a policy as JSON, a module with a `main(arguments)`, and its arguments."""
    policy = msgspec.json.decode(sys.argv[1], type=Policy)
    give_up_rights(policy)
    importlib.import_module(sys.argv[2]).main(sys.argv[3:])


def give_up_rights(policy: Policy) -> None:
    """Raises `OSError` when the system refuses what the policy wants."""
    if policy.confinement is Confinement.NONE:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = FILES_MAX if hard == resource.RLIM_INFINITY else min(FILES_MAX, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    if sys.platform == "linux":
        _prctl(_PR_SET_DUMPABLE, 0)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        if policy.confinement is Confinement.LANDLOCK:
            restrict_files(policy.readable)
        if filter_is_known():
            filter_calls()


# --- Landlock -----------------------------------------------------------------------------------

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH, _CREATE_RULESET_VERSION = 1, 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
"""All rights about files that a version of Landlock knows; from 5 on the same."""
_NET_RIGHTS = 0b11
"""TCP bind and connect, from version 4 on."""
_SCOPES = 0b11
"""Abstract Unix sockets and signals to outside, from version 6 on."""


def landlock_version() -> int:
    """The version that the kernel speaks; 0 for none."""
    if sys.platform != "linux":
        return 0
    return max(0, int(_libc().syscall(_LANDLOCK_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)))


def restrict_files(readable: Sequence[str]) -> None:
    """Only what lies at or below `readable` can be opened, and only for reading. Raises `OSError`."""
    version = landlock_version()
    if version < 1:
        raise OSError(errno.ENOSYS, "this kernel has no Landlock")
    fields = [_FILE_RIGHTS[min(version, 5)], _NET_RIGHTS if version >= 4 else 0, _SCOPES if version >= 6 else 0]
    attributes = struct.pack("<3Q", *fields)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _checked(_libc().syscall(_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0))
    try:
        for path in readable:
            _allow_reading(ruleset, path)
        _checked(_libc().syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _allow_reading(ruleset: int, path: str) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        rights = _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0)  # noqa: PTH112
        rule = struct.pack("<Qi", rights, descriptor)
        _checked(_libc().syscall(_LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0))
    finally:
        os.close(descriptor)


# --- the system-call filter ---------------------------------------------------------------------

SYSCALLS: dict[str, tuple[int | None, int | None]] = {
    # name: number on x86-64, number on arm64
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "accept4": (288, 242), "bind": (49, 200),
    "listen": (50, 201), "socketpair": (53, 199), "fork": (57, None), "vfork": (58, None), "execve": (59, 221),
    "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "kcmp": (312, 272),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "mount_setattr": (442, 442), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60), "personality": (135, 92),
    "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "sendmsg": (46, 211), "sendmmsg": (307, 269), "recvmsg": (47, 212), "fanotify_init": (300, 262),
    "truncate": (76, 45), "creat": (85, None), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "mknod": (133, None), "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "utimensat": (280, 88), "futimesat": (261, None),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "sched_setscheduler": (144, 119),
    "setuid": (105, 146), "setgid": (106, 144), "setgroups": (116, 159), "capset": (126, 91),
}  # fmt: skip
"""Refused with `EPERM`, whatever their arguments."""
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of `SYSCALLS`, and the kernel's number for the architecture."""
_OPEN, _OPENAT, _OPENAT2 = (2, None), (257, 56), (437, 437)
_CLONE, _CLONE3 = (56, 220), (435, 435)
_TGKILL, _PRLIMIT, _SETPRIORITY = (234, 131), (302, 261), (141, 140)
_FCNTL = (72, 25)
_FCNTL_REFUSED = (8, 10, 15)
"""`F_SETOWN`, `F_SETSIG`, `F_SETOWN_EX`: a descriptor that becomes ready would signal whatever process it is given."""
_CLONE_THREAD = 0x10000
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_LOAD, _EQUALS, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_SECCOMP_SET_MODE_FILTER, _TSYNC = 1, 1
_SECCOMP = (317, 277)
_X32 = 0x40000000

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, operand (`struct sock_filter`)."""


def filter_is_known() -> bool:
    """Whether the numbers of system calls are known for this machine."""
    return sys.platform == "linux" and platform.machine() in _ARCHITECTURES


def filter_calls() -> None:
    """Refuse `SYSCALLS`, for this thread and all that exist or will. Cannot be undone. Raises `OSError`."""
    column, _ = _ARCHITECTURES[platform.machine()]
    program = b"".join(struct.pack("<HBBI", *line) for line in _program())
    buffer = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    described = Program(len(program) // 8, ctypes.addressof(buffer))
    _checked(_libc().syscall(_SECCOMP[column], _SECCOMP_SET_MODE_FILTER, _TSYNC, ctypes.byref(described)))


def _program() -> Iterator[Instruction]:
    column, architecture = _ARCHITECTURES[platform.machine()]
    yield from ((_LOAD, 0, 0, 4), (_EQUALS, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0))
    if column == 0:
        yield from ((_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL))
    refused = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    for numbers in SYSCALLS.values():
        if (number := numbers[column]) is not None:
            yield from ((_EQUALS, 0, 1, number), refused)
    for numbers in (_CLONE3, _OPENAT2):  # their arguments lie in memory, where a filter cannot look
        yield from ((_EQUALS, 0, 1, numbers[column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS))
    yield from _unless(_CLONE[column], 0, (_ANY_BIT, 1, 0, _CLONE_THREAD), refused)
    yield from _unless(_TGKILL[column], 0, (_EQUALS, 1, 0, os.getpid()), refused)
    yield from _unless(_PRLIMIT[column], 0, (_EQUALS, 1, 0, 0), refused)
    yield from _unless(_SETPRIORITY[column], 1, (_EQUALS, 1, 0, 0), refused)
    yield from _unless(_OPENAT[column], 2, (_ANY_BIT, 0, 1, _WRITES), refused)
    yield from ((_EQUALS, 0, 2 * len(_FCNTL_REFUSED) + 2, _FCNTL[column]), (_LOAD, 0, 0, 16 + 8))
    for command in _FCNTL_REFUSED:
        yield from ((_EQUALS, 0, 1, command), refused)
    yield (_RETURN, 0, 0, _ALLOW)
    if (number := _OPEN[column]) is not None:
        yield from _unless(number, 1, (_ANY_BIT, 0, 1, _WRITES), refused)
    yield (_RETURN, 0, 0, _ALLOW)


def _unless(number: int, argument: int, test: Instruction, refused: Instruction) -> Iterator[Instruction]:
    """For one call: look at the low half of an argument; `test` jumps over the refusal (by 1) or into it (by 0)."""
    yield from ((_EQUALS, 0, 4, number), (_LOAD, 0, 0, 16 + 8 * argument), test, refused)
    yield (_RETURN, 0, 0, _ALLOW)


# --- the kernel ---------------------------------------------------------------------------------


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    _checked(_libc().prctl(option, value, 0, 0, 0))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


if __name__ == "__main__":
    main()
