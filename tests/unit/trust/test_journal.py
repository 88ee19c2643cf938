"""The journal: every way to tamper with it that its rules say is found, found; and what they say is not, not."""

import multiprocessing
from pathlib import Path

import pytest
import sqlalchemy as sql
from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.errors import ConfigError, JournalBroken
from fallow.trust.registrar import database as db
from fallow.trust.registrar.journal import EMPTY, FIRST_PREVIOUS, Entry, Head, Kind, entry_hash, parse_head, verify
from fallow.trust.registrar.journal_db import append, read, read_all, read_head

PROCESSES = 2
APPENDS_EACH = 15


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registrar.db"


def filled(path: Path, count: int) -> db.RegistryDb:
    database = db.open_database(path)
    with database.writing() as connection:
        for index in range(count):
            append(connection, 1000.0 + index, Kind.ENROLLED, f"node{index}", {"name": f"Büro {index}"})
    return database


def check(database: db.RegistryDb, *noted: Head) -> Head:
    with database.reading() as connection:
        return verify(read_all(connection), noted)


def alter(database: db.RegistryDb, statement: sql.Executable) -> None:
    """As somebody with the database in hand, who knows SQL but not the rules."""
    with database.writing() as connection:
        connection.execute(statement)


def test_an_untouched_journal_holds_and_goes_on_from_every_head_that_was_noted(path: Path) -> None:
    database = filled(path, 12)
    with database.reading() as connection:
        heads = [Head(entry.seq, entry.hash) for entry in read_all(connection)]
        assert read_head(connection) == heads[-1]
    assert check(database, *heads) == heads[-1]
    assert check(filled(path.with_name("empty.db"), 0)) == EMPTY


@pytest.mark.parametrize("column", ["unix_ms", "kind", "who", "body", "previous", "hash"])
@pytest.mark.parametrize("seq", [1, 5, 9])
def test_a_changed_entry_is_found(path: Path, column: str, seq: int) -> None:
    database = filled(path, 9)
    value = 7 if column == "unix_ms" else "a" * 64
    alter(database, sql.update(db.journal).where(db.journal.c.seq == seq).values({column: value}))
    with pytest.raises(JournalBroken, match=rf"Entry ({seq}|{seq + 1}) "):
        check(database)


@pytest.mark.parametrize("seq", [1, 5])
def test_a_removed_entry_is_found(path: Path, seq: int) -> None:
    database = filled(path, 9)
    alter(database, sql.delete(db.journal).where(db.journal.c.seq == seq))
    with pytest.raises(JournalBroken, match=f"Entry {seq} is missing"):
        check(database)


def test_entries_that_changed_places_are_found(path: Path) -> None:
    database = filled(path, 9)
    for was, becomes in ((3, 100), (4, 3), (100, 4)):
        alter(database, sql.update(db.journal).where(db.journal.c.seq == was).values(seq=becomes))
    with pytest.raises(JournalBroken, match="Entry 3 does not follow"):
        check(database)


def test_an_entry_put_in_before_the_first_is_found(path: Path) -> None:
    database = filled(path, 3)
    digest = entry_hash(0, 1, "enrolled", "x", "{}", FIRST_PREVIOUS)
    forged = Entry(seq=0, unix_ms=1, kind="enrolled", who="x", body="{}", previous=FIRST_PREVIOUS, hash=digest)
    values = {field: getattr(forged, field) for field in forged.__struct_fields__}
    alter(database, sql.insert(db.journal).values(values))
    with pytest.raises(JournalBroken, match="Entry 1 is missing: after 0 comes 0"):
        check(database)


def test_a_journal_cut_at_its_end_is_found_by_a_noted_head_and_only_by_that(path: Path) -> None:
    database = filled(path, 9)
    noted = check(database)
    alter(database, sql.delete(db.journal).where(db.journal.c.seq > 6))
    assert check(database).seq == 6
    with pytest.raises(JournalBroken, match=r"ends at entry 6, but entry 9 was noted earlier: it was cut"):
        check(database, noted)


def test_a_journal_written_anew_is_found_by_a_noted_head_and_only_by_that(path: Path) -> None:
    """A thief of the database who knows the rules: the chain is right, and another."""
    database = filled(path, 9)
    noted = check(database)
    alter(database, sql.delete(db.journal).where(db.journal.c.seq > 4))
    with database.writing() as connection:
        for index in range(6):
            append(connection, 2000.0 + index, Kind.ENROLLED, "mallory", {})
    assert check(database).seq == 10
    with pytest.raises(JournalBroken, match="Entry 9 is not the one that was noted: the journal was written anew"):
        check(database, noted)


def test_two_noted_heads_that_contradict_each_other_show_a_fork(path: Path) -> None:
    database = filled(path, 3)
    with pytest.raises(JournalBroken, match="forked"):
        check(database, check(database), Head(3, "b" * 64))


def test_what_is_not_committed_is_not_in_the_journal(path: Path) -> None:
    database = filled(path, 2)
    with pytest.raises(ZeroDivisionError), database.writing() as connection:
        append(connection, 1.0, Kind.REVOKED, "x", {})
        _ = 1 // 0
    assert check(database).seq == 2


def test_several_processes_append_to_one_chain(path: Path) -> None:
    filled(path, 1).close()
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=append_many, args=(path, index)) for index in range(PROCESSES)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * PROCESSES
    database = db.open_database(path)
    assert check(database).seq == 1 + PROCESSES * APPENDS_EACH
    with database.reading() as connection:
        by_process = [[entry.body for entry in read_all(connection) if entry.who == str(i)] for i in range(PROCESSES)]
    assert all(bodies == [f'{{"n":{n}}}' for n in range(APPENDS_EACH)] for bodies in by_process)


def append_many(path: Path, index: int) -> None:
    database = db.open_database(path)
    for n in range(APPENDS_EACH):
        with database.writing() as connection:
            append(connection, 5.0, Kind.ENROLLED, str(index), {"n": n})


def test_pages_join_without_a_gap(path: Path) -> None:
    database = filled(path, 7)
    with database.reading() as connection:
        assert [entry.seq for entry in read(connection, 3, 2)] == [4, 5]
        assert [entry.seq for entry in read_all(connection, since_unix_s=1004.0)] == [5, 6, 7]


@given(st.text(max_size=100))
def test_no_text_but_a_head_is_read_as_a_head(text: str) -> None:
    try:
        head = parse_head(text)
    except JournalBroken:
        return
    assert parse_head(str(head)) == head


@given(st.integers(0, 10**15), st.binary(min_size=32, max_size=32))
def test_a_head_is_read_back(seq: int, digest: bytes) -> None:
    assert parse_head(str(Head(seq, digest.hex()))) == Head(seq, digest.hex())


def test_a_database_of_another_schema_version_is_refused_by_name(path: Path) -> None:
    database = db.open_database(path)
    with database.writing() as connection:
        db.set_setting(connection, "schema", "999")
    database.close()
    with pytest.raises(ConfigError, match="schema version 999"):
        db.open_database(path)


def test_a_file_that_is_no_database_is_refused_by_name(path: Path) -> None:
    path.write_bytes(b"certainly no database" * 100)
    with pytest.raises(ConfigError, match=r"cannot be opened"):
        db.open_database(path)


def test_the_database_is_flushed_at_every_commit_and_private(path: Path) -> None:
    database = db.open_database(path)
    with database.reading() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    assert path.stat().st_mode & 0o077 == 0


def test_a_database_that_is_opened_twice_here_survives_another_process_that_closes_it(path: Path) -> None:
    """SQLite's locks belong to the process: who closes the file by another way drops them (once seen: I/O errors)."""
    first, again = db.open_database(path), db.open_database(path)
    for index in range(2):
        writer = multiprocessing.get_context("spawn").Process(target=append_many, args=(path, index))
        writer.start()
        writer.join()
        for database in (again, first):
            with database.writing() as connection:
                append(connection, 6.0, Kind.ENROLLED, "here", {})
    writer = multiprocessing.get_context("spawn").Process(target=append_many, args=(path, 9))
    writer.start()
    writer.join()
    assert writer.exitcode == 0
    assert check(db.open_database(path)).seq == 3 * APPENDS_EACH + 4
