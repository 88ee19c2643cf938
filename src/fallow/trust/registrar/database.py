"""The registrar's facts of record in SQL: who is admitted, invitations, used nonces, the journal's rows.

Rules
- Portable SQL through SQLAlchemy: SQLite (WAL, flushed to the disk at every commit) by default, PostgreSQL by its url.
- Whoever writes locks the row `settings['lock']` first (`writing`), so that several processes take turns and a decision
  cannot be overtaken. On SQLite the transaction itself is the lock.
- Functions here read and write rows and decide nothing; times are seconds since 1970 given by the caller.
- A database of another schema version is refused by name.
"""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sql
from sqlalchemy.exc import SQLAlchemyError

from fallow.domain.credentials import Role
from fallow.domain.errors import ConfigError
from fallow.domain.fleet import Tier
from fallow.domain.ids import NodeId
from fallow.policy.enrolment import Enrolment, InvitationRecord

SCHEMA_VERSION: Final = "2"
LOCK_WAIT_S: Final = 15.0
"""How long a process waits for its turn to write."""

metadata = sql.MetaData()

settings = sql.Table(
    "settings",
    metadata,
    sql.Column("key", sql.String(64), primary_key=True),
    sql.Column("value", sql.Text, nullable=False),
)
enrolments = sql.Table(
    "enrolments",
    metadata,
    sql.Column("node", sql.String(64), primary_key=True),
    sql.Column("role", sql.String(32), nullable=False),
    sql.Column("tier", sql.Integer, nullable=False),
    sql.Column("name", sql.String(100), nullable=False),
    sql.Column("cell", sql.String(32), nullable=False),
    sql.Column("enrolled_unix_s", sql.Double, nullable=False),
    sql.Column("seen_unix_s", sql.Double, nullable=False),
    sql.Column("consent", sql.String(64)),
    sql.Column("revoked_unix_s", sql.Double, index=True),
    sql.Column("revoked_why", sql.Text, nullable=False, default=""),
    sql.Column("left_unix_s", sql.Double),
    sql.Column("moved_unix_s", sql.Double),
    sql.Column("refusal_told_unix_s", sql.Double),
    sql.Column("reading_told_unix_s", sql.Double),
)
readmissions = sql.Table(
    "readmissions",
    metadata,
    sql.Column("node", sql.String(64), primary_key=True),
    sql.Column("void_unix_s", sql.Double, nullable=False, index=True),
)
"""Keys that left and were admitted again, with the time up to which their earlier passports are void."""
invitations = sql.Table(
    "invitations",
    metadata,
    sql.Column("id", sql.String(32), primary_key=True),
    sql.Column("secret_sha256", sql.String(64), nullable=False),
    sql.Column("role", sql.String(32), nullable=False),
    sql.Column("tier", sql.Integer, nullable=False),
    sql.Column("name", sql.String(100)),
    sql.Column("cell", sql.String(32), nullable=False),
    sql.Column("made_by", sql.String(64), nullable=False, index=True),
    sql.Column("made_unix_s", sql.Double, nullable=False),
    sql.Column("expires_unix_s", sql.Double, nullable=False),
    sql.Column("used_by", sql.String(64)),
    sql.Column("withdrawn_unix_s", sql.Double),
    sql.Column("refusals", sql.Integer, nullable=False, default=0),
)
nonces = sql.Table(
    "nonces",
    metadata,
    sql.Column("nonce", sql.String(128), primary_key=True),
    sql.Column("expires_unix_s", sql.Double, nullable=False, index=True),
)
journal = sql.Table(
    "journal",
    metadata,
    sql.Column("seq", sql.BigInteger, primary_key=True, autoincrement=False),
    sql.Column("unix_ms", sql.BigInteger, nullable=False),
    sql.Column("kind", sql.String(64), nullable=False),
    sql.Column("who", sql.String(100), nullable=False),
    sql.Column("body", sql.Text, nullable=False),
    sql.Column("previous", sql.String(64), nullable=False),
    sql.Column("hash", sql.String(64), nullable=False),
)


class RegistryDb:
    """The database, opened. Make one in each process; it may be used from several threads."""

    def __init__(self, engine: sql.Engine) -> None:
        self._engine = engine

    @contextmanager
    def writing(self) -> Iterator[sql.Connection]:
        """One transaction, alone: committed when the block ends well, undone when it raises."""
        with self._engine.begin() as connection:
            lock = sql.select(settings.c.value).where(settings.c.key == "lock").with_for_update()
            connection.execute(lock).one()
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sql.Connection]:
        """A consistent view; what is written in it is undone."""
        with self._engine.connect().execution_options(fallow_reads=True) as connection:
            yield connection

    def close(self) -> None:
        self._engine.dispose()


def open_database(place: Path | str) -> RegistryDb:
    """The database in a file, or at an SQLAlchemy url; its tables are made when it is new.

    Raises `ConfigError` when it cannot be opened, or is of another version of Fallow.
    """
    if isinstance(place, Path):
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Only a new file is opened here: to close a database that is in use would drop this process's locks on it.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        url = sql.URL.create("sqlite", database=str(place))
    else:
        url = _url_of(place)
    shown = url.render_as_string(hide_password=True)
    try:
        engine = sql.create_engine(url)
        if engine.dialect.name == "sqlite":
            _tame_sqlite(engine)
        with engine.begin() as connection:
            metadata.create_all(connection)
            if setting(connection, "schema") is None:
                set_setting(connection, "lock", "")
                set_setting(connection, "schema", SCHEMA_VERSION)
            found = setting(connection, "schema")
    except (SQLAlchemyError, TypeError, ValueError) as error:  # the last two: what the driver was given in the url
        raise ConfigError(f"The registrar's database {shown} cannot be opened: {error}.") from error
    except ImportError as error:
        raise ConfigError(
            f"The registrar's database {shown} cannot be opened without its driver: install the Python package "
            f"{error.name or 'that it needs'}."
        ) from error
    if found != SCHEMA_VERSION:
        engine.dispose()
        raise ConfigError(
            f"The registrar's database {shown} has schema version {found}, and this release of Fallow uses "
            f"{SCHEMA_VERSION}. Use the release that wrote it."
        )
    return RegistryDb(engine)


def _url_of(text: str) -> sql.URL:
    """Raises `ConfigError`, which does not show the text: a password is in it."""
    try:
        return sql.make_url(text)
    except (SQLAlchemyError, ValueError):
        raise ConfigError(
            "The registrar's file `database-url` holds no url of a database: expected one such as "
            "postgresql+psycopg://USER:PASSWORD@HOST/NAME, as SQLAlchemy writes it."
        ) from None


def _tame_sqlite(engine: sql.Engine) -> None:
    """Real transactions in place of the driver's, so that a writer holds the lock from its first statement."""

    @sql.event.listens_for(engine, "connect")
    def _configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        connection.execute(f"PRAGMA busy_timeout = {int(LOCK_WAIT_S * 1000)}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")

    @sql.event.listens_for(engine, "begin")
    def _begin(connection: sql.Connection) -> None:
        reads = connection.get_execution_options().get("fallow_reads", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


# --- settings ---------------------------------------------------------------------------------------


def setting(connection: sql.Connection, key: str) -> str | None:
    """A value that all processes share."""
    value = connection.execute(sql.select(settings.c.value).where(settings.c.key == key)).scalar_one_or_none()
    return None if value is None else str(value)


def set_setting(connection: sql.Connection, key: str, value: str) -> None:
    """Keep a value."""
    changed = connection.execute(sql.update(settings).where(settings.c.key == key).values(value=value))
    if changed.rowcount == 0:
        connection.execute(sql.insert(settings).values(key=key, value=value))


# --- enrolments -------------------------------------------------------------------------------------


def enrolment(connection: sql.Connection, node: str) -> Enrolment | None:
    """What is known of a key."""
    row = connection.execute(sql.select(enrolments).where(enrolments.c.node == node)).one_or_none()
    return None if row is None else _enrolment(row)


def all_enrolments(connection: sql.Connection) -> list[Enrolment]:
    """Everybody who was ever admitted, oldest first."""
    order = (enrolments.c.enrolled_unix_s, enrolments.c.node)
    return [_enrolment(row) for row in connection.execute(sql.select(enrolments).order_by(*order))]


def all_cells(connection: sql.Connection) -> list[str]:
    """The cells that members are in."""
    wanted = sql.select(enrolments.c.cell).where(enrolments.c.left_unix_s.is_(None)).distinct()
    return sorted(connection.execute(wanted).scalars())


def enrolments_named(connection: sql.Connection, name_or_node: str) -> list[Enrolment]:
    """Whom a person means: by name, or by the beginning of the key."""
    means = enrolments.c.name == name_or_node
    if len(name_or_node) >= 8 and set(name_or_node) <= set("0123456789abcdef"):
        means = sql.or_(means, enrolments.c.node.startswith(name_or_node))
    return [_enrolment(row) for row in connection.execute(sql.select(enrolments).where(means))]


def enrolments_unseen_since(connection: sql.Connection, since_unix_s: float, count_max: int) -> list[Enrolment]:
    """Members that did not renew since a time, and are neither revoked nor gone."""
    wanted = sql.select(enrolments).where(
        enrolments.c.seen_unix_s < since_unix_s,
        enrolments.c.revoked_unix_s.is_(None),
        enrolments.c.left_unix_s.is_(None),
    )
    return [_enrolment(row) for row in connection.execute(wanted.limit(count_max))]


def save_enrolment(connection: sql.Connection, who: Enrolment) -> None:
    """Write all that is known of a key."""
    values: dict[str, Any] = {field: getattr(who, field) for field in who.__struct_fields__}
    values |= {"role": who.role.value, "tier": int(who.tier)}
    changed = connection.execute(sql.update(enrolments).where(enrolments.c.node == who.node).values(values))
    if changed.rowcount == 0:
        connection.execute(sql.insert(enrolments).values(values))


def told_of_refusal(connection: sql.Connection, node: str, now_unix_s: float, every_s: float) -> bool:
    """Whether a refusal of that key was recorded lately; if not, it counts as recorded now."""
    return _told(connection, enrolments.c.refusal_told_unix_s, node, now_unix_s, every_s)


def told_of_reading(connection: sql.Connection, node: str, now_unix_s: float, every_s: float) -> bool:
    """The same for that key's reading of the journal."""
    return _told(connection, enrolments.c.reading_told_unix_s, node, now_unix_s, every_s)


def _told(connection: sql.Connection, when: sql.Column[Any], node: str, now_unix_s: float, every_s: float) -> bool:
    due = sql.or_(when.is_(None), when <= now_unix_s - every_s)
    told = sql.update(enrolments).where(enrolments.c.node == node, due).values({when.name: now_unix_s})
    return connection.execute(told).rowcount == 0


def _enrolment(row: Any) -> Enrolment:
    return Enrolment(
        node=NodeId(row.node),
        role=Role(row.role),
        tier=Tier(row.tier),
        name=row.name,
        cell=row.cell,
        enrolled_unix_s=row.enrolled_unix_s,
        seen_unix_s=row.seen_unix_s,
        consent=row.consent,
        revoked_unix_s=row.revoked_unix_s,
        revoked_why=row.revoked_why,
        left_unix_s=row.left_unix_s,
        moved_unix_s=row.moved_unix_s,
    )


# --- invitations ------------------------------------------------------------------------------------


def add_invitation(connection: sql.Connection, record: InvitationRecord, secret_sha256: str) -> None:
    """Keep an invitation and the hash of its secret."""
    values: dict[str, Any] = {field: getattr(record, field) for field in record.__struct_fields__}
    values |= {"role": record.role.value, "tier": int(record.tier), "secret_sha256": secret_sha256}
    connection.execute(sql.insert(invitations).values(values))


def invitation(connection: sql.Connection, id_: str) -> tuple[InvitationRecord, str] | None:
    """An invitation and the hash of its secret."""
    row = connection.execute(sql.select(invitations).where(invitations.c.id == id_)).one_or_none()
    if row is None:
        return None
    record = InvitationRecord(
        id=row.id,
        role=Role(row.role),
        tier=Tier(row.tier),
        name=row.name,
        cell=row.cell,
        made_by=row.made_by,
        made_unix_s=row.made_unix_s,
        expires_unix_s=row.expires_unix_s,
        used_by=None if row.used_by is None else NodeId(row.used_by),
        withdrawn_unix_s=row.withdrawn_unix_s,
    )
    return record, row.secret_sha256


def use_invitation(connection: sql.Connection, id_: str, node: NodeId) -> bool:
    """Mark as used; false when somebody else was faster."""
    free = (invitations.c.id == id_) & (sql.or_(invitations.c.used_by.is_(None), invitations.c.used_by == node))
    return connection.execute(sql.update(invitations).where(free).values(used_by=node)).rowcount == 1


def count_refusal(connection: sql.Connection, id_: str, count_max: int) -> bool:
    """Count a refused use; false when that many were counted before, or there is no such invitation."""
    few = (invitations.c.id == id_) & (invitations.c.refusals < count_max)
    counted = sql.update(invitations).where(few).values(refusals=invitations.c.refusals + 1)
    return connection.execute(counted).rowcount == 1


def open_invitations(connection: sql.Connection, made_by: str, now_unix_s: float) -> int:
    """How many invitations of one inviter can still be used."""
    wanted = sql.select(sql.func.count()).where(_open(now_unix_s), invitations.c.made_by == made_by)
    return int(connection.execute(wanted).scalar_one())


def withdraw_invitations(connection: sql.Connection, which: str, now_unix_s: float) -> list[str]:
    """Mark the unused invitations with that id (or its first 8 or more digits) or for that name; their ids."""
    means = invitations.c.name == which
    if len(which) >= 8 and set(which) <= set("0123456789abcdef"):
        means = sql.or_(means, invitations.c.id.startswith(which))
    wanted = sql.select(invitations.c.id).where(_open(now_unix_s), means).order_by(invitations.c.id)
    found = list(connection.execute(wanted).scalars())
    for id_ in found:
        marked = sql.update(invitations).where(invitations.c.id == id_).values(withdrawn_unix_s=now_unix_s)
        connection.execute(marked)
    return found


def _open(now_unix_s: float) -> sql.ColumnElement[bool]:
    columns = invitations.c
    return columns.used_by.is_(None) & columns.withdrawn_unix_s.is_(None) & (columns.expires_unix_s > now_unix_s)


# --- nonces -----------------------------------------------------------------------------------------


def use_nonce(connection: sql.Connection, nonce: str, expires_unix_s: float, now_unix_s: float) -> bool:
    """Remember a nonce until it expires; false when it was used before."""
    connection.execute(sql.delete(nonces).where(nonces.c.expires_unix_s < now_unix_s))
    known = connection.execute(sql.select(nonces.c.nonce).where(nonces.c.nonce == nonce)).one_or_none()
    if known is None:
        connection.execute(sql.insert(nonces).values(nonce=nonce, expires_unix_s=expires_unix_s))
    return known is None
