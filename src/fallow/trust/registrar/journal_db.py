"""The journal's rows: appended, and read in pages. What they must look like is `journal.py`'s.

Rules
- Entries are appended inside the transaction of what they record: neither exists without the other.
- Nothing here changes or removes a row.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec
import sqlalchemy as sql

from fallow.trust.registrar.database import journal
from fallow.trust.registrar.journal import EMPTY, Entry, Head, Kind, entry_hash

BODY_MAX_CHARS: Final = 16 * 1024
PAGE_ENTRIES: Final = 500


def append(connection: sql.Connection, unix_s: float, kind: Kind, who: str, body: Mapping[str, Any]) -> Entry:
    """Add an entry, in a `RegistryDb.writing` transaction."""
    head = read_head(connection)
    text = msgspec.json.encode(body).decode()
    assert len(text) <= BODY_MAX_CHARS, "a journal entry is a record, not a store"
    unix_ms = int(unix_s * 1000)
    digest = entry_hash(head.seq + 1, unix_ms, kind.value, who, text, head.hash)
    entry = Entry(
        seq=head.seq + 1, unix_ms=unix_ms, kind=kind.value, who=who, body=text, previous=head.hash, hash=digest
    )
    connection.execute(sql.insert(journal).values(msgspec.structs.asdict(entry)))
    return entry


def read_head(connection: sql.Connection) -> Head:
    """The newest entry's place and hash."""
    newest = sql.select(journal.c.seq, journal.c.hash).order_by(journal.c.seq.desc()).limit(1)
    row = connection.execute(newest).one_or_none()
    return EMPTY if row is None else Head(row.seq, row.hash)


def read(connection: sql.Connection, after_seq: int, count_max: int = PAGE_ENTRIES) -> list[Entry]:
    """Entries in order, from the one after `after_seq`."""
    wanted = sql.select(journal).where(journal.c.seq > after_seq).order_by(journal.c.seq).limit(count_max)
    return [Entry(**row._mapping) for row in connection.execute(wanted)]


def read_all(connection: sql.Connection, since_unix_s: float = 0.0) -> Iterator[Entry]:
    """All entries in order, page by page; those before a time are left out."""
    seq = -(1 << 62)  # an entry below 1 is a forgery, and must be seen
    while page := read(connection, seq):
        seq = page[-1].seq
        yield from (entry for entry in page if entry.unix_ms >= since_unix_s * 1000)
