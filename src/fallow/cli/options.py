"""Options that several commands share, and how settings are loaded for a command."""

import logging
import logging.handlers
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fallow.config import Loaded, load

LOG_FILE_BYTES_MAX = 10 << 20
LOG_FILES_KEPT = 2

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", help="A TOML file with settings. Without it: ./fallow.toml, else the user's.", metavar="FILE"
    ),
]
StateDir = Annotated[
    Path | None,
    typer.Option("--state-dir", help="Folder for identities, models and passwords.", metavar="DIR"),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens to stderr.")]
LogFile = Annotated[Path | None, typer.Option("--log-file", help="Log there, with rotation.", metavar="FILE")]
Insecure = Annotated[
    bool | None,
    typer.Option(
        "--insecure-development",
        help="For work on Fallow itself: believe everybody, encrypt nothing on the bus, check nothing. Loopback only.",
    ),
]
ParentPid = Annotated[int | None, typer.Option("--parent", hidden=True, help="Stop when this process is gone.")]

console = Console()
"""Where results go."""
notes = Console(stderr=True)
"""Where progress and remarks go, so that results can be piped."""


def settings(file: Path | None, flags: dict[str, Any]) -> Loaded:
    """The settings for a command, its flags on top. Raises `ConfigError`."""
    return load(flags, file=file)


def set_up_logging(verbose: bool, log_file: Path | None = None) -> None:
    """Log to stderr: all of it when asked, warnings else; or to a file of bounded size."""
    handler: logging.Handler
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(
            log_file, maxBytes=LOG_FILE_BYTES_MAX, backupCount=LOG_FILES_KEPT, encoding="utf-8"
        )
    else:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose or log_file else logging.WARNING, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)


def say(sentence: str) -> None:
    """A sentence for the person who watches, exactly as it is: urls must survive copying."""
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)
