"""`fallow sim …`: run a simulated fleet through a scenario, and show what became of it."""

import logging
import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fallow.cli.options import Verbose, console, notes, say

if TYPE_CHECKING:
    from fallow.simulator.results import RunResult
    from fallow.simulator.scenario import Scenario

app = typer.Typer(no_args_is_help=True, help="Simulate a fleet: days of thousands of devices, replayable from a seed.")

SHOWN_VIOLATIONS = 20


class Detail(StrEnum):
    """How a run is made."""

    DETAILED = "detailed"
    FAST = "fast"


@app.command("list")
def list_scenarios() -> None:
    """Name the scenarios that come with Fallow."""
    from fallow.simulator import shipped

    table = Table("scenario", "what happens")
    for name in shipped.names():
        table.add_row(name, shipped.scenario(name).about.strip())
    console.print(table)


@app.command()
def run(
    scenario: Annotated[str, typer.Argument(metavar="SCENARIO", help="A name from `fallow sim list`, or a TOML file.")],
    seed: Annotated[int, typer.Option("--seed", help="Where all randomness comes from.", min=0)] = 1,
    mode: Annotated[
        Detail,
        typer.Option("--mode", help="detailed: every message of the real parts; fast: whole cells, for millions."),
    ] = Detail.DETAILED,
    devices: Annotated[
        int | None, typer.Option("--devices", help="So many devices instead of the scenario's, in proportion.", min=1)
    ] = None,
    hours: Annotated[float | None, typer.Option("--hours", help="Simulate so much of it.", min=0.01)] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the result there, as JSON.", metavar="FILE")] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write a page with plots there.", metavar="FILE")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Run a scenario. The same scenario, seed and version give the same run, down to its event hash.

    The detailed mode runs the real coordinator, agents and gateway sessions over a modelled network and holds them to
    their invariants at every step. It ends with exit code 1 when one is broken; the run is then kept under
    simulation-failures/, with the command that replays it.

    Examples:

          fallow sim run home-evenings
          fallow sim run correlated-reclaim --seed 7 --devices 200 --report evening.html
          fallow sim run ev-fleet --mode fast --devices 1000000 --out ev.json
    """
    # Before numpy is imported: threads that spin for each other make small matrices slow, and may round differently.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # What a fleet in trouble warns of is the simulation's subject, not news; its figures come at the end.
    logging.basicConfig(level=logging.INFO if verbose else logging.CRITICAL)
    from fallow.simulator import shipped
    from fallow.simulator.keepsake import keep, replay_command
    from fallow.simulator.results import write_result
    from fallow.simulator.scenario import decode_scenario

    text = shipped.read(scenario)
    chosen = decode_scenario(text, scenario)
    result = _run(chosen, seed, mode, devices, hours)
    _summarise(result)
    if out is not None:
        write_result(result, out)
        say(f"The result is in {out}.")
    if report is not None:
        _report([result], report)
    if not result.violations:
        return
    say(f"{len(result.violations)} invariants did not hold:")
    for violation in result.violations[:SHOWN_VIOLATIONS]:
        say(f"  at {violation.at_s:.3f} s, {violation.invariant}: {violation.detail}")
    place = keep(text, result, hours)
    kept = "The folder of kept failures is full." if place is None else f"The run is kept in {place}."
    say(f"{kept} Replay it with: {replay_command(scenario, result, hours)}")
    raise typer.Exit(1)


@app.command("report")
def report_on(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT…", help="Files that `fallow sim run --out` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="Where the page goes.", metavar="FILE")] = Path("simulation.html"),
) -> None:
    """Write one page with plots about one or several runs.

    Example: fallow sim report evening.json night.json --out week.html
    """
    from fallow.simulator.results import read_result

    _report([read_result(path) for path in results], out)


def _report(results: "list[RunResult]", path: Path) -> None:
    from fallow.simulator.report import write_report

    write_report(results, path)
    say(f"The report is in {path}.")


def _run(scenario: "Scenario", seed: int, mode: Detail, devices: int | None, hours: float | None) -> "RunResult":
    if mode is Detail.FAST:
        from fallow.simulator.fast import run_fast

        if hours is not None:
            scenario = msgspec.structs.replace(scenario, hours=hours)
        return _with_progress(lambda progress: run_fast(scenario, seed, devices, progress))
    from fallow.simulator.runner import run_detailed

    changes = {"devices": devices, "hours": hours}
    detailed = msgspec.structs.replace(
        scenario.detailed, **{key: value for key, value in changes.items() if value is not None}
    )
    scenario = msgspec.structs.replace(scenario, detailed=detailed)
    return _with_progress(lambda progress: run_detailed(scenario, seed, progress))


def _with_progress(work: "Callable[[Callable[[float], None]], RunResult]") -> "RunResult":
    bar = Progress(
        TextColumn("Simulating"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(),
        TimeRemainingColumn(), console=notes, transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("simulating", total=1.0)
        return work(lambda share: bar.update(task, completed=share))


def _summarise(result: "RunResult") -> None:
    from fallow.simulator.report_words import counted

    totals = result.totals
    say(
        f"{result.title}: {counted(result.devices, 'device')} in {counted(result.cells, 'cell')}, "
        f"{result.simulated_s / 3600:g} h "
        f"simulated in {result.wall_s:.1f} s: {result.events:,} steps, seed {result.seed}, hash {result.event_hash}."
    )
    say(
        f"{totals.sessions_started:,} sessions were asked for: {totals.sessions_finished:,} finished, "
        f"{totals.sessions_refused:,} were told to come later, {totals.sessions_failed:,} failed "
        f"(success rate {totals.success_rate:.2%})."
    )
    if totals.sessions_altered is not None:
        say(f"{totals.sessions_altered or 'No'} answers differ from what one undisturbed device would have said.")
    if totals.first_token_p50_s is not None and totals.inter_token_p50_s is not None:
        say(
            f"First token after {totals.first_token_p50_s:.1f} s (median) and {totals.first_token_p99_s or 0.0:.1f} s "
            f"(p99), then one every {totals.inter_token_p50_s * 1000:.0f} ms (median), "
            f"{(totals.inter_token_p99_s or 0.0) * 1000:.0f} ms (p99)."
        )
    if totals.stalls and totals.stall_p95_s is not None:
        say(
            f"{totals.stalls:,} answers lost a device half-way and went on; 95 % of them stalled for at most "
            f"{totals.stall_p95_s:.1f} s."
        )
