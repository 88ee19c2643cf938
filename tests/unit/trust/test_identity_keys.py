"""The identity file: made once, private, checked."""

import os
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fallow.domain.errors import ConfigError, SignatureInvalid
from fallow.trust.keys import Identity, identity_of, load_or_create, verify

LIMIT_S = 20.0
AT_ONCE = 6
KILLED = """
import os, pathlib, signal, sys
from fallow.trust.keys import load_or_create
os.fdopen = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # a file is open, and nothing written
load_or_create(pathlib.Path(sys.argv[1]))
"""


def test_it_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "node.key"
    first = load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create(path) == first
    assert load_or_create(tmp_path / "other.key") != first


def test_of_many_that_start_at_once_all_have_the_key_of_one(tmp_path: Path) -> None:
    barrier = threading.Barrier(AT_ONCE)

    def start(path: Path) -> Identity:
        barrier.wait(LIMIT_S)
        return load_or_create(path)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for turn in range(10):
            path = tmp_path / str(turn) / "node.key"
            identities = set(pool.map(start, [path] * AT_ONCE))
            assert len(identities) == 1
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert list(path.parent.iterdir()) == [path]


def test_who_is_slow_to_make_a_key_takes_the_one_that_was_made_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "node.key"
    opened, may_write = threading.Event(), threading.Event()
    fdopen = os.fdopen

    def wait_and_open(*arguments: Any) -> Any:
        opened.set()
        assert may_write.wait(LIMIT_S)
        return fdopen(*arguments)

    monkeypatch.setattr(os, "fdopen", wait_and_open)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(load_or_create, path)
        assert opened.wait(LIMIT_S)
        monkeypatch.setattr(os, "fdopen", fdopen)
        quick = load_or_create(path)
        may_write.set()
        assert slow.result(LIMIT_S) == quick == load_or_create(path)


def test_who_is_killed_half_way_leaves_nothing_that_is_taken_for_a_key(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=LIMIT_S, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1, "what it had begun"
    assert load_or_create(path) == load_or_create(path)


def test_the_node_id_is_the_public_key_of_rfc_8032() -> None:
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    assert identity_of(seed).node == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    load_or_create(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_or_create(path)


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 33])
def test_a_file_that_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="32 bytes"):
        load_or_create(path)


def test_the_seed_is_not_printed() -> None:
    assert "ff" * 8 not in repr(identity_of(b"\xff" * 32))


@pytest.mark.parametrize("asked", [b"DSSEv1 12 fallow/grant 2 {}", b"", b"short", b"x" * 65, b"with space"])
def test_a_bus_gets_no_signature_under_anything_but_a_nonce(asked: bytes) -> None:
    with pytest.raises(SignatureInvalid, match="nonce"):
        identity_of(b"\x01" * 32).sign_nonce(asked)


def test_a_nonce_as_a_server_draws_it_is_signed() -> None:
    who = identity_of(b"\x01" * 32)
    verify(who.node, who.sign_nonce(b"Zx8kP0_-aQ1vB3c"), b"Zx8kP0_-aQ1vB3c")
