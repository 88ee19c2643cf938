"""Options that several commands share, how settings are loaded for a command, and where its results go.

Everything that is printed goes through `console`, `notes` or `say`, so that words from outside are only words
(`plain.py`); what is written where a person asked, through `write_out`, so that nobody else reads it.
"""

import logging
import logging.handlers
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fallow.cli.plain import PlainConsole, one_line, visible
from fallow.config import Loaded, load
from fallow.domain.errors import ConfigError

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

console = PlainConsole()
"""Where results go."""
notes = PlainConsole(stderr=True)
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
    handler.setFormatter(_PlainFormatter("%(asctime)s %(levelname).1s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose or log_file else logging.WARNING, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)


class _PlainFormatter(logging.Formatter):
    """Peers' words are in what is logged: they begin no line of their own, and act on no terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def say(sentence: str) -> None:
    """A sentence for the person who watches, in one piece: urls must survive copying."""
    console.print(sentence, soft_wrap=True)


def write_out(path: Path, data: bytes) -> None:
    """Write a result where a person asked for it, whole, for them alone to read. Raises `ConfigError`."""
    from fallow.private_file import write_durably

    there = path.resolve()  # what a link leads to is replaced, not the link
    if not there.parent.is_dir():
        raise ConfigError(f"There is no folder {there.parent}: make it, or name another file than {path}.")
    if there.exists() and not there.is_file():
        raise ConfigError(f"{path} is no file, and cannot be replaced by one: name another.")
    try:
        write_durably(there, data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from None
