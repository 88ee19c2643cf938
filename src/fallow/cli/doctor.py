"""`fallow doctor`: what keeps the engine away from the rest of this device, tried from inside, in words."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from fallow.cli.options import ConfigFile, StateDir, console, notes, say, settings
from fallow.config import Config

_KEYS = ("identity", "passport", "lease.json")
_UNTRIED = "not tried"


def doctor(
    config: ConfigFile = None,
    state_dir: StateDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what confines the engine on this device, try it from inside, and say what it does not cover.

    The engine computes what strangers ask for, so it runs in a process that should reach nothing but its model files.
    Ends with 1 when it can reach more than that.

    Examples:

      fallow doctor
    """
    from fallow.engine.sandbox import COVERED, UNCOVERED, strongest
    from fallow.engine.sandbox_probe import FORKS_MAX, Findings
    from fallow.engine.settings import Confinement, EngineSettings

    chosen = settings(config, {"state_dir": state_dir}).config
    development = chosen.trust.insecure_development
    kind = Confinement.NONE if development else strongest()
    with notes.status("Trying to get out of the sandbox …"):
        found = _probe(kind, chosen)
    escapes = found.escapes if isinstance(found, Findings) else ()
    works = isinstance(found, Findings) and not escapes
    if as_json:
        console.print_json(
            data={
                "confinement": kind.value,
                "covers": COVERED[kind],
                "does_not_cover": list(UNCOVERED[kind]),
                "tried": isinstance(found, Findings),
                "escapes": list(escapes),
            }
        )
    else:
        say(f"The engine's process is confined by: {kind.value}{' (development)' if development else ''}")
        say(f"  {COVERED[kind]}")
        if isinstance(found, Findings):
            say("Tried from inside: connecting, reading this device's keys and settings, writing to the model files,")
            say(f"  starting programs, up to {FORKS_MAX} processes, signals to and memory of this process.")
            say("  Nothing of it worked." if works else "  These WORKED, and must not:")
        else:
            say(f"It could not be tried: {found}")
        for escape in escapes:
            say(f"    {escape}")
        say("Not covered:")
        for what in UNCOVERED[kind]:
            say(f"  {what}")
        defaults = EngineSettings()
        say(
            f"While it runs, every part of a model answers a known question every {defaults.canary_interval_s:.0f} s, "
            f"and its files are hashed again with {defaults.rehash_share:.1%} of a core."
        )
    if not works:
        raise typer.Exit(1)


def _probe(kind: object, config: Config) -> object:
    """Findings, or why there are none."""
    from fallow.engine.sandbox_probe import Attempts, probe
    from fallow.engine.settings import Confinement

    assert isinstance(kind, Confinement)
    secrets = [config.device_dir / name for name in _KEYS] + [config.state_dir, *Path.home().glob(".ssh")]
    with (
        tempfile.TemporaryDirectory(prefix="fallow-doctor-") as folder,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        models = Path(folder) / "models"
        models.mkdir()
        (models / "blob").write_bytes(b"weights")
        secret = Path(folder) / "secret"
        secret.write_text("secret")
        attempts = Attempts(
            secrets=(str(secret), *(str(path) for path in secrets if path.exists())),
            models=str(models),
            model_file=str(models / "blob"),
            address=listener.getsockname(),
            neighbour=os.getpid(),
        )
        try:
            return probe(kind, attempts)
        except (OSError, subprocess.SubprocessError) as error:
            return str(error) if sys.platform != "win32" else _UNTRIED
