"""`fallow audit …`: the journal, checked and given to whoever must see it."""

import datetime
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.table import Table

from fallow.cli.options import ConfigFile, StateDir, console, notes, say, write_out
from fallow.cli.plain import one_line, visible
from fallow.domain.errors import ConfigError, JournalBroken

if TYPE_CHECKING:
    from fallow.trust.registrar.journal import Head

app = typer.Typer(
    no_args_is_help=True,
    help="Check and export the journal: who was invited, admitted and revoked, consents, and what the council decided.",
)

Heads = Annotated[
    list[str] | None,
    typer.Option("--head", help="A head that was noted earlier, as SEQ:HASH, or a file of some.", metavar="HEAD"),
]


@app.command()
def verify(head: Heads = None, state_dir: StateDir = None, config: ConfigFile = None) -> None:
    """Check that no entry was changed, removed, added or moved.

    Whoever holds the registrar's database could cut the journal's end, or write all of it anew. That shows only against
    a head noted elsewhere: members keep some that they were told (`journal-head` beside their passport); those on this
    machine are used, and more are given with --head. Note the head that is printed where nobody else can change it.

    Examples:

          fallow audit verify
          fallow audit verify --head 1042:9f86d081…
    """
    from fallow.cli.registrar_place import noted_heads, place_of
    from fallow.trust.registrar import journal

    place = place_of(state_dir, config)
    noted = (*noted_heads(place.config), *_given(head))
    now = journal.verify(iter(place.entries()), noted)
    say(f"The journal holds: {now.seq} entries, head {now}")
    if noted:
        newest = max(noted, key=lambda each: each.seq)
        say(f"It goes on from {len(noted)} noted heads, the newest of them at entry {newest.seq}.")
    if not head:
        notes.print(
            "A thief of the registrar's database could have written it anew, and the heads on this machine too: "
            "compare with a head that another member kept (--head)."
        )


@app.command()
def export(
    since: Annotated[str | None, typer.Option("--since", help="Entries from that day on, such as 2026-11-01.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A file; stdout otherwise.", metavar="FILE")] = None,
    head: Heads = None,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Give the journal as JSON lines, for a regulator.

    The first line says whose journal it is, its head, and what checking the whole of it gave. Each further line is an
    entry as it is chained; consents hold the words that were agreed to, signed by the device. A journal that does not
    hold is exported all the same, and the command fails.

    Examples:

          fallow audit export > journal.jsonl
          fallow audit export --since 2026-11-01 --out journal.jsonl
    """
    from fallow.cli.registrar_place import noted_heads, place_of
    from fallow.trust.registrar import journal

    since_ms = _day_ms(since) if since is not None else 0
    place = place_of(state_dir, config)
    entries = place.entries()
    broken: JournalBroken | None = None
    try:
        journal.verify(iter(entries), (*noted_heads(place.config), *_given(head)))
    except JournalBroken as error:
        broken = error
    first: dict[str, Any] = {
        "journal_of": _network(place),
        "head": str(journal.Head(entries[-1].seq, entries[-1].hash)) if entries else str(journal.EMPTY),
        "verified": broken is None,
        "problem": broken.message if broken is not None else None,
        "exported_unix_ms": int(time.time() * 1000),
        "since_unix_ms": since_ms,
    }
    lines = [msgspec.json.encode(first), *(msgspec.json.encode(each) for each in entries if each.unix_ms >= since_ms)]
    content = visible((b"\n".join(lines) + b"\n").decode()).encode()  # it is JSON, and says the same
    if out is None:
        typer.get_binary_stream("stdout").write(content)
    else:
        write_out(out, content)
        notes.print(f"{len(lines) - 1} entries are in {out}.")
    if broken is not None:
        raise broken


@app.command()
def members(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """List everybody who was ever admitted, on the registrar's machine."""
    from fallow.cli.registrar_place import Here, place_of, short

    place = place_of(state_dir, config)
    if not isinstance(place, Here):
        raise ConfigError("Members are listed on the registrar's machine; from here, export the journal.")
    found = place.registrar.members()
    if as_json:
        say(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    table = Table("key", "name", "role", "tier", "cell", "admitted", "last seen", "now", box=None)
    for who in found:
        now = "member"
        if who.revoked_unix_s is not None:
            now = f"revoked: {who.revoked_why[:60]}"
        elif who.left_unix_s is not None:
            now = "left"
        times = (_when(who.enrolled_unix_s), _when(who.seen_unix_s))
        row = (short(who.node), who.name, who.role, who.tier.name.lower(), who.cell, *times, now)
        table.add_row(*map(one_line, row))
    console.print(table)


def _given(texts: list[str] | None) -> "list[Head]":
    """The heads in `--head`: each a head, or a file of some."""
    from fallow.cli.registrar_place import heads_in
    from fallow.trust.registrar.journal import parse_head

    found: list[Head] = []
    for text in texts or ():
        is_file = ":" not in text and Path(text).is_file()
        found += heads_in(Path(text)) if is_file else [parse_head(text.partition(" ")[0])]
    return found


def _network(place: Any) -> dict[str, str]:
    from fallow.cli.registrar_place import Here
    from fallow.processes.party import CONSOLE
    from fallow.trust.registrar.state import NETWORK_FILE, digest_of, read_network

    if isinstance(place, Here):
        content = place.registrar.state.network_json
    else:
        content = (place.config.state_dir / CONSOLE / NETWORK_FILE).read_bytes()
    network = read_network(content)
    return {"name": network.name, "digest": digest_of(content), "registrar": network.registrar}


def _day_ms(text: str) -> int:
    try:
        return int(datetime.datetime.fromisoformat(text).astimezone().timestamp() * 1000)
    except (ValueError, OverflowError):
        raise ConfigError(f"Expected a day such as 2026-11-01, got {text[:40]!r}.") from None


def _when(unix_s: float) -> str:
    return f"{datetime.datetime.fromtimestamp(unix_s).astimezone():%Y-%m-%d %H:%M}"
