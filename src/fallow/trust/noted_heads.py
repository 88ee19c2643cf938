"""The journal's heads that a member noted, in a file: a line `seq:hash unix_s` for each, the oldest first.

Which are kept is decided in `policy/noted_heads.py`; what they prove, in `registrar/journal.py`.
"""

import logging
from pathlib import Path
from typing import Final

from fallow.policy.noted_heads import NOTED_MAX, NotedHead, goes_on, with_head
from fallow.private_file import write_durably
from fallow.trust.registrar.journal import EMPTY, parse_head

LINE_MAX_CHARS: Final = 120
FILE_MAX_CHARS: Final = NOTED_MAX * LINE_MAX_CHARS

log = logging.getLogger(__name__)


def note(file: Path, told: str, now_unix_s: float) -> None:
    """Note a head `seq:hash` that the registrar told. One that cannot follow what was noted is logged, and not noted.

    Raises `OSError`, and `JournalBroken` for what is no head, or a file that holds none; the file stays as it is.
    """
    head, kept = parse_head(told), read_noted(file)
    if not goes_on(kept, head.seq, head.hash):
        newest = max(kept, key=lambda each: each.seq)
        log.error(
            "the registrar says that its journal is at %s, but it was at %d:%s before: it was cut or written anew. "
            "`fallow audit verify --head %s` shows it",
            head, newest.seq, newest.hash, file,
        )  # fmt: skip
        return
    noted = with_head(kept, NotedHead(head.seq, head.hash, now_unix_s))
    if noted != kept and head != EMPTY:
        lines = (f"{each.seq}:{each.hash} {each.noted_unix_s:.0f}\n" for each in noted)
        write_durably(file, "".join(lines).encode())


def read_noted(file: Path) -> tuple[NotedHead, ...]:
    """The heads in a file; none without one. Raises `JournalBroken` for lines that are none, and `OSError`."""
    try:
        with file.open(encoding="ascii", errors="replace") as lines:
            text = lines.read(FILE_MAX_CHARS)
    except FileNotFoundError:
        return ()
    return tuple(noted_in(line) for line in text.splitlines())


def noted_in(line: str) -> NotedHead:
    """The head in a line of such a file, or in what people write down: `seq:hash`. Raises `JournalBroken`."""
    told, _, noted = line.strip().partition(" ")
    head = parse_head(told)
    return NotedHead(head.seq, head.hash, float(noted) if noted.isdigit() and len(noted) < LINE_MAX_CHARS else 0.0)
