"""`fallow status`: who is there, what each device holds, and how the models fare; as tables or as JSON."""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fallow.cli.options import ConfigFile, StateDir, console, settings
from fallow.cli.plain import one_line
from fallow.config import Config
from fallow.domain.fleet import (
    CoordinatorReport,
    FleetStatus,
    Heartbeat,
    HostedStage,
    ModelEntry,
    QuarantinedDevice,
    StageStatus,
)
from fallow.domain.ids import Digest, NodeId

REFRESH_S: Final = 1.0
SHORT_ID_CHARS: Final = 8
SILENT_WARN_S: Final = 2.5
NAMED_MAX: Final = 8
"""Devices of a cell that has outgrown itself, named as those that should go."""

_STATUS_STYLES = {
    StageStatus.READY: "green",
    StageStatus.FETCHING: "yellow",
    StageStatus.LOADING: "yellow",
    StageStatus.FAILED: "red",
}


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, for scripts.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep showing it until Ctrl-C.")] = False,
    bus: Annotated[
        str | None,
        typer.Option("--bus", help="The bus of a service elsewhere; this machine's otherwise.", metavar="URL"),
    ] = None,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Show devices, models, gateways, and who coordinates them.

    A device's layers are half-open spans: [0,15) holds layers 0 to 14. A model is servable when devices that are here
    hold all of its layers.

    Examples:

          fallow status
          fallow status --watch
          fallow status --json | jq .nodes
    """
    loaded = settings(config, {"bus.url": bus, "state_dir": state_dir}).config
    asyncio.run(_show(loaded, as_json, watch))


async def _show(config: Config, as_json: bool, watch: bool) -> None:
    from fallow import wiring
    from fallow.domain.errors import BusTimeout, BusUnavailable
    from fallow.gateway.questions import Questions
    from fallow.processes.party import open_console

    bus, subjects = await open_console(config)
    questions = Questions(bus, subjects, wiring.clock())
    await questions.start()

    async def ask() -> FleetStatus:
        try:
            return msgspec.json.decode(await questions.ask(subjects.status, b""), type=FleetStatus)
        except (BusTimeout, BusUnavailable) as error:
            raise type(error)(f"The coordinator does not answer ({error.message}); it may be starting.") from error

    try:
        if as_json:
            console.out(msgspec.json.encode(await ask()).decode())
        elif watch:
            with Live(console=console, auto_refresh=False, screen=True) as live:
                while True:
                    live.update(tables(await ask()), refresh=True)
                    await asyncio.sleep(REFRESH_S)
        else:
            console.print(tables(await ask()))
    finally:
        await bus.close()


def tables(fleet: FleetStatus) -> RenderableType:
    """What the coordinator knows, for people. Names, urls and reasons are members' words: each is kept to its line."""
    names = {beat.node: one_line(beat.name) for beat in fleet.nodes}
    models = {entry.model: one_line(entry.name) for entry in fleet.models}
    parts: list[RenderableType] = [_devices(fleet, models), Text(), _models(fleet)]
    for gateway in fleet.gateways:
        parts += [Text(), Text(f"Gateway {one_line(gateway.url) or _short(gateway.gateway)}", style="bold")]
        parts.append(Text(f"{_count(gateway.sessions, 'answer')} running, {gateway.tokens_per_s:.1f} tokens/s"))
        parts += [Text("  " + " → ".join(_name(node, names) for node in chain)) for chain in gateway.chains]
    if fleet.coordinators:
        parts += [Text(), _coordinators(fleet.coordinators)]
    parts += _neighbours(fleet)
    parts += _cell_size(fleet, names)
    parts += [_quarantined(each, names) for each in fleet.quarantined]
    if fleet.dropped_messages:
        dropped = ", ".join(f"{count} {one_line(kind)}" for kind, count in sorted(fleet.dropped_messages.items()))
        parts += [Text(), Text(f"Messages that were not believed: {dropped}", style="yellow")]
    return Group(*parts)


def _quarantined(device: QuarantinedDevice, names: dict[NodeId, str]) -> Text:
    name = f"{_name(device.node, names)} ({_short(device.node)})"
    return Text(f"In quarantine for {_duration(device.left_s)}: {name}, because {one_line(device.why)}", style="yellow")


def _coordinators(coordinators: tuple[CoordinatorReport, ...]) -> Text:
    """Who leads, since when, and who would take over."""
    leader, *others = coordinators
    text = Text("Coordinator ", style="bold")
    text.append(
        f"{one_line(leader.name)} leads since {_duration(leader.since_s)} (epoch {leader.epoch})", style="not bold"
    )
    if not leader.lease:
        text.append("; the bus has no JetStream, so no other can take over", style="not bold yellow")
    elif others:
        names = ", ".join(one_line(other.name) for other in others)
        text.append(f"; {names} {'stands' if len(others) == 1 else 'stand'} by", style="not bold")
    else:
        text.append("; none stands by", style="not bold yellow")
    return text


def _duration(duration_s: float) -> str:
    for size_s, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if duration_s >= size_s:
            return f"{duration_s / size_s:.0f} {unit}"
    return f"{duration_s:.0f} s"


def _devices(fleet: FleetStatus, models: Mapping[Digest, str]) -> RenderableType:
    if not fleet.nodes:
        return Text("No device has joined yet. `fallow up` printed the command with which one does.")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("device", "holds", "memory", "KV free", "sessions", "rows/s", "heard"):
        table.add_column(column, justify="left" if column in ("device", "holds") else "right", overflow="fold")
    for beat in sorted(fleet.nodes, key=lambda each: each.name):
        silent_s = fleet.silent_s.get(beat.node, 0.0)
        table.add_row(
            Text(f"{one_line(beat.name)} ({_short(beat.node)})"),
            _holds(beat, models),
            _gib(beat.memory_bytes),
            _gib(beat.kv_free_bytes),
            str(beat.session_count),
            f"{beat.tokens_per_s:.1f}",
            Text(f"{silent_s:.1f} s ago", style="red" if silent_s > SILENT_WARN_S else ""),
        )
    if fleet.nodes_left_out:
        table.add_row(f"and {_count(fleet.nodes_left_out, 'more device')}")
    return table


def _holds(beat: Heartbeat, models: Mapping[Digest, str]) -> Text:
    text = Text("\n").join([_stage(hosted, models) for hosted in beat.hosted]) if beat.hosted else Text("nothing yet")
    return Text("leaving; ", style="yellow") + text if beat.draining else text


def _stage(hosted: HostedStage, models: Mapping[Digest, str]) -> Text:
    spans = " ".join(str(span) for span in hosted.stage.spans())
    model = models.get(hosted.stage.model, _short(hosted.stage.model))
    text = Text(f"{model} {spans} ")
    share = f" {hosted.progress:.0%}" if hosted.status is StageStatus.FETCHING else ""
    text.append(f"{hosted.status}{share}", style=_STATUS_STYLES[hosted.status])
    if hosted.error:
        text.append(f": {one_line(hosted.error)}", style="red")
    return text


def _models(fleet: FleetStatus) -> RenderableType:
    if not fleet.models:
        return Text("No model is served. Add one with `fallow model add default`.")
    table = Table("model", "layers", "stored as", "size", "servable", box=None, pad_edge=False, header_style="bold")
    for entry in fleet.models:
        name, stored_as = Text(one_line(entry.name)), Text(one_line(entry.quantisation))
        table.add_row(name, str(entry.config.layer_count), stored_as, _size(entry), _servable(entry, fleet))
    return table


def _servable(entry: ModelEntry, fleet: FleetStatus) -> Text:
    if entry.servable:
        return Text("yes", style="green")
    return Text(one_line(fleet.unplaceable.get(entry.model, "not yet")), style="yellow")


def _neighbours(fleet: FleetStatus) -> list[RenderableType]:
    """A line for each neighbour cell."""
    lines: list[RenderableType] = []
    for each in fleet.neighbours:
        away = "" if each.rtt_s is None else f", {each.rtt_s * 1000:.0f} ms away"
        told = [item for item in each.digest.models if item.servable]
        load = f", busiest model at {max(item.load for item in told):.0%}" if told else ""
        sent = f", {_count(each.sessions_sent, 'session')} sent there" if each.sessions_sent else ""
        devices = _count(each.digest.devices, "device")
        into = each.digest.dissolves_into
        ends = "" if into is None else f", dissolves into {one_line(into)}"
        serves = f"serves {_count(len(told), 'model')}{load}"
        lines.append(Text(f"Cell {one_line(each.digest.cell)}: {devices}{away}, {serves}{sent}{ends}"))
    return [Text(), *lines] if lines else []


def _cell_size(fleet: FleetStatus, names: dict[NodeId, str]) -> list[RenderableType]:
    """What is to be done about a cell that has too few devices, or too many."""
    size = fleet.size
    if size is None:
        return []
    if size.dissolves_into is not None:
        words = (
            f"This cell has fewer than {size.devices_min} devices for long, and dissolves into "
            f"{one_line(size.dissolves_into)}: devices that may choose their cell (node.nearest_cell) go there."
        )
        return [Text(), Text(words, style="yellow")]
    if not size.outgrown:
        return []
    text = Text(
        f"This cell has outgrown itself: more than {_count(size.devices_max, 'device')}. It takes nobody new who may "
        "choose; start a coordinator of another cell. ",
        style="yellow",
    )
    if size.should_go:
        some = ", ".join(_name(node, names) for node in size.should_go[:NAMED_MAX])
        left_out = len(size.should_go) - NAMED_MAX
        more = f" and {left_out} more (`--json` has all)" if left_out > 0 else ""
        text.append(f"By their round trips, {_count(len(size.should_go), 'device')} belong there: {some}{more}.")
    return [Text(), text]


def _size(entry: ModelEntry) -> str:
    embedding, head, layers = entry.weights_bytes
    return f"{(embedding + head + sum(layers)) / 1e6:.0f} MB"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.2f} GiB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _name(node: NodeId, names: dict[NodeId, str]) -> str:
    return names.get(node, _short(node))


def _short(key: str) -> str:
    """The beginning of a key or digest, as it was told."""
    return one_line(key[:SHORT_ID_CHARS])
