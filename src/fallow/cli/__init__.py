"""The `fallow` command: parsing, help and exit codes. What commands do is in the modules that they call.

Exit codes: 0 done, 1 a named failure (one sentence on stderr), 2 wrong usage.
"""

import os
import sys

from fallow.domain.errors import FallowError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def main() -> None:
    """Entry point of the `fallow` script."""
    from fallow.cli.app import app

    try:
        app(prog_name="fallow")
    except FallowError as error:
        _fail(error.message)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe has gone: nothing is left to say, and Python must not complain while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
    except OSError as error:
        _fail(f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}.")


def _fail(message: str) -> None:
    from fallow.cli.plain import one_line

    # It may hold what a stranger said: a break in it would begin a line that looks like ours.
    sys.stderr.write(f"fallow: {one_line(' '.join(message.splitlines()))}\n")
    sys.exit(EXIT_FAILED)
