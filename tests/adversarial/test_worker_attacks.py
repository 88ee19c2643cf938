"""Attacks from inside the engine's process: code of a stranger's making runs there, and wants out.

The attacks are `engine/sandbox_probe.py`'s, in a process that is started as a worker is. Each test states the attack,
what is expected, and what stayed unharmed.
"""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fallow.engine.confined import filter_is_known, landlock_version
from fallow.engine.sandbox import bubblewrap_works
from fallow.engine.sandbox_probe import Attempts, Findings, probe
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
SECRETS = ("identity", "passport", "fallow.toml")


@pytest.fixture(scope="module", params=KINDS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Findings, Path]]:
    """What the attacks came to, and the device's folder."""
    home = tmp_path_factory.mktemp("device")
    models = home / "models"
    models.mkdir()
    (models / "blob").write_bytes(b"weights")
    for name in SECRETS:
        (home / name).write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        attempts = Attempts(
            secrets=tuple(str(home / name) for name in SECRETS),
            models=str(models),
            model_file=str(models / "blob"),
            address=listener.getsockname(),
            neighbour=os.getpid(),
        )
        yield probe(request.param, attempts), home


def test_calling_home(found: tuple[Findings, Path]) -> None:
    """
    Attack: connect to an address on the same machine, look up a name, make a socket of any kind.
    Expected: each is refused by the system.
    Unharmed: the process still computes: threads start, and it can answer on its channel.
    """
    findings, _ = found
    assert findings.connects and findings.resolves and findings.unix_socket
    assert findings.threads is None


def test_reading_the_devices_key(found: tuple[Findings, Path]) -> None:
    """
    Attack: open the device's key, its passport and its settings, which lie beside the models.
    Expected: each is refused, or not there at all.
    Unharmed: the model files can be read.
    """
    findings, _ = found
    assert len(findings.reads_secrets) == len(SECRETS) and all(findings.reads_secrets.values())
    assert findings.reads_models is None


def test_poisoning_the_model_files(found: tuple[Findings, Path]) -> None:
    """
    Attack: write into the folder of model files, which other processes load.
    Expected: refused.
    Unharmed: the folder holds what it held.
    """
    findings, home = found
    assert findings.writes_models and findings.writes_temporary
    assert [entry.name for entry in (home / "models").iterdir()] == ["blob"]


def test_taking_over_the_agent(found: tuple[Findings, Path]) -> None:
    """
    Attack: signal the agent, directly or through a pipe's owner, and open its memory.
    Expected: refused, or there is no such process.
    Unharmed: the agent, which is this process.
    """
    findings, _ = found
    assert findings.signals_neighbour and findings.traces_neighbour


def test_a_fork_bomb(found: tuple[Findings, Path]) -> None:
    """
    Attack: start processes until there is no more room, and start a program.
    Expected: not one.
    Unharmed: threads, which the engine needs.
    """
    findings, _ = found
    assert findings.forks == 0 and findings.starts_program and findings.threads is None


def test_finding_secrets_that_were_left_lying(found: tuple[Findings, Path]) -> None:
    """
    Attack: look through the environment and every descriptor that was inherited.
    Expected: nothing of the agent's is there.
    Unharmed: what the engine needs to be fast.
    """
    findings, _ = found
    assert findings.descriptors == ()
    assert set(findings.environment) <= {
        "LANG",
        "GLIBC_TUNABLES",
        "OPENBLAS_NUM_THREADS",
        "ORT_DISABLE_TELEMETRY",
        "PYTHONPATH",
        "PWD",
    }
    assert "GLIBC_TUNABLES" in findings.environment
