"""Who was revoked, left or came back, in the registrar's database; the number of the list that says so.

Rules
- Functions here read and write rows inside a caller's transaction and decide nothing; times are seconds since 1970.
"""

import sqlalchemy as sql

from fallow.domain.credentials import Departure, Revocation
from fallow.domain.ids import NodeId
from fallow.trust.registrar.database import enrolments, readmissions, set_setting, setting


def revocations_sequence(connection: sql.Connection) -> int:
    """The number of the present list of revocations."""
    return int(setting(connection, "revocations") or 0)


def raise_revocations_sequence(connection: sql.Connection, now_unix_s: float) -> None:
    """There is something new for the list of revocations to tell."""
    # From the time, so that a database restored from a copy gives out no number that members know already.
    number = max(revocations_sequence(connection) + 1, int(now_unix_s * 1000))
    set_setting(connection, "revocations", str(number))


def departures(connection: sql.Connection, revoked_since_s: float, left_since_s: float) -> list[Revocation]:
    """Who was revoked after a time; then who left after one and came back, then who left; the newest of each first.

    Who came back is before who left: there are only as many as somebody invited again. Who left, or was retired,
    without having been given a passport since then has nothing to revoke.
    """
    columns, back = enrolments.c, readmissions.c
    revoked = sql.select(columns.node, columns.revoked_unix_s).where(columns.revoked_unix_s > revoked_since_s)
    returned = (
        sql.select(back.node, back.void_unix_s)
        .join(enrolments, columns.node == back.node)
        .where(back.void_unix_s > left_since_s, columns.revoked_unix_s.is_(None), columns.left_unix_s.is_(None))
    )
    left = sql.select(columns.node, columns.left_unix_s).where(
        columns.revoked_unix_s.is_(None), columns.left_unix_s > left_since_s, columns.seen_unix_s > left_since_s
    )
    found: list[Revocation] = []
    for wanted, departure in ((revoked, Departure.REVOKED), (returned, Departure.RETURNED), (left, Departure.LEFT)):
        rows = connection.execute(wanted.order_by(sql.desc(wanted.selected_columns[1])))
        found += [Revocation(node=NodeId(node), revoked_unix_s=at_s, departure=departure) for node, at_s in rows]
    return found


def last_revoked_unix_s(connection: sql.Connection) -> float | None:
    """The time of the newest revocation; `None` when nobody was revoked ever."""
    newest: float | None = connection.execute(sql.select(sql.func.max(enrolments.c.revoked_unix_s))).scalar_one()
    return newest


def readmit(connection: sql.Connection, node: str, void_unix_s: float) -> None:
    """Remember up to when the passports of a key are void that left, and comes back."""
    kept = readmissions.c.node == node
    if connection.execute(sql.update(readmissions).where(kept).values(void_unix_s=void_unix_s)).rowcount == 0:
        connection.execute(sql.insert(readmissions).values(node=node, void_unix_s=void_unix_s))


def void_unix_s(connection: sql.Connection, node: str) -> float | None:
    """Up to when the passports of a key are void that left and came back; `None` when it never did."""
    wanted = sql.select(readmissions.c.void_unix_s).where(readmissions.c.node == node)
    return connection.execute(wanted).scalar_one_or_none()
