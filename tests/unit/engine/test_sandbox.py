"""What confines a worker: its environment, what it is shown, and what it cannot do. The real thing runs, or is skipped
with the reason; whole workers in a sandbox are in tests/system/test_containment.py."""

import os
import socket
import sys
from pathlib import Path

import pytest

from fallow.engine.confined import SYSCALLS, filter_is_known, landlock_version
from fallow.engine.sandbox import COVERED, UNCOVERED, bare_environment, bubblewrap_works, launch, software, strongest
from fallow.engine.sandbox_probe import Attempts, probe
from fallow.engine.settings import Confinement

KINDS = [
    pytest.param(
        Confinement.BUBBLEWRAP,
        marks=pytest.mark.skipif(not bubblewrap_works(), reason="bubblewrap is not installed, or may not work here"),
    ),
    pytest.param(
        Confinement.LANDLOCK,
        marks=pytest.mark.skipif(
            landlock_version() < 1 or not filter_is_known(), reason="this kernel has no Landlock, or is not known"
        ),
    ),
]


@pytest.fixture
def attempts(tmp_path):
    """A model folder beside secrets, and somebody who listens."""
    models, home = tmp_path / "models", tmp_path / "home"
    models.mkdir()
    home.mkdir()
    (models / "blob").write_bytes(b"weights")
    for name in ("identity", "keys.toml"):
        (home / name).write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield Attempts(
            secrets=(str(home), str(home / "identity"), str(home / "keys.toml"), __file__),
            models=str(models),
            model_file=str(models / "blob"),
            address=listener.getsockname(),
            neighbour=os.getpid(),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_a_worker_must_not_do_succeeds(kind, attempts):
    found = probe(kind, attempts)
    assert found.escapes == ()
    assert found.connects is not None and found.writes_models is not None
    assert all(error is not None for error in found.reads_secrets.values())
    assert (found.reads_models, found.threads, found.forks) == (None, None, 0), "it can still work"
    assert found.descriptors == ()
    assert list(Path(attempts.models).iterdir()) == [Path(attempts.model_file)]


@pytest.mark.parametrize("kind", [*KINDS, Confinement.NONE])
def test_no_environment_of_the_agent_reaches_it(kind, attempts, monkeypatch):
    for name in ("FALLOW_API_KEY", "AWS_SECRET_ACCESS_KEY", "HOME", "LD_PRELOAD_NOT", "PYTHONSTARTUP"):
        monkeypatch.setenv(name, "a secret")
    found = probe(kind, attempts)
    assert set(found.environment) <= {*bare_environment(), "PWD"}
    assert set(bare_environment()) <= {
        "LANG",
        "GLIBC_TUNABLES",
        "OPENBLAS_NUM_THREADS",
        "ORT_DISABLE_TELEMETRY",
        "PYTHONPATH",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="forks are counted on Linux")
def test_the_probe_tells_when_nothing_confines_it(attempts):
    found = probe(Confinement.NONE, attempts)
    assert {"connect to an address", "write to the model files", "start processes"} <= set(found.escapes)
    assert found.reads_secrets[attempts.secrets[1]] is None


def test_every_kind_says_what_it_covers_and_what_not():
    for kind in Confinement:
        assert COVERED[kind] and UNCOVERED[kind]
    assert strongest() in Confinement


def test_it_is_shown_software_and_models_only(tmp_path):
    shown = [Path(path) for path in software()]
    assert shown and all(path.exists() for path in shown)
    forbidden = [Path.home(), Path("/etc"), Path("/"), Path("/tmp"), Path("/usr/bin"), Path("/root"), Path("/home")]
    assert not set(shown) & set(forbidden)
    command = launch(Confinement.BUBBLEWRAP, "fallow.engine.worker", ["3", "{}"], [tmp_path], 4).command
    bound = [command[i + 1] for i, word in enumerate(command) if word in ("--ro-bind", "--dev-bind", "--bind")]
    assert str(tmp_path) in bound and "--bind" not in command
    assert {"--unshare-net", "--unshare-pid", "--die-with-parent", "--new-session"} <= set(command)


def test_numbers_of_system_calls_are_not_given_twice():
    for column in (0, 1):
        numbers = [both[column] for both in SYSCALLS.values() if both[column] is not None]
        assert len(numbers) == len(set(numbers))
