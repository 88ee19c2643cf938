"""One HTML page about one or several runs: what happened in words, totals in a table, curves over the clock.

Rules
- The page is one file and loads nothing: plotly's script lies in it. Its content security policy allows only the
  scripts that were written with it, by their digests.
- Everything that comes from a result file is text, never markup: Jinja escapes it on the page, `report_charts.py` in
  labels, and data for scripts is JSON in which no tag can be closed.
- Broken invariants stand first, with the command that replays them.

Words come from `report_story.py`, curves from `report_charts.py`. It computes no figure of its own.
"""

import base64
import hashlib
import shlex
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final

import jinja2
import msgspec

from fallow.domain.errors import ConfigError
from fallow.simulator.report_charts import CHARTS, MARKS_DRAWN_MAX, begins_s, figure
from fallow.simulator.report_story import MODE_WORDS, label_of, story
from fallow.simulator.report_words import NOTHING, clock, count, day, optional_span, share, size, span_of
from fallow.simulator.results import Mode, RunResult

RUNS_MAX: Final = 60
"""Runs on one page: more make it too heavy to open."""
VIOLATIONS_SHOWN_MAX: Final = 50


class Run(msgspec.Struct, frozen=True):
    """A run as the page shows it."""

    result: RunResult
    label: str
    story: tuple[str, ...]
    tiles: tuple[tuple[str, str], ...]
    marks: tuple[tuple[str, str], ...]
    replay: str


class Panel(msgspec.Struct, frozen=True):
    """One chart of one run."""

    title: str
    reading: str
    label: str
    data: str
    """JSON in which no tag can begin or end; the template writes it as it is."""


class Section(msgspec.Struct, frozen=True):
    """The runs of one scenario, side by side."""

    anchor: str
    title: str
    about: str
    runs: tuple[Run, ...]
    table: tuple[tuple[str, tuple[str, ...]], ...]
    rows: tuple[tuple[Panel, ...], ...]
    """One row of panels for each chart; a run that lacks it leaves it out."""


def write_report(results: Sequence[RunResult], path: Path) -> None:
    """Write the page. Raises `ConfigError` without results, with too many, or without the extra `sim`."""
    page = render(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def render(results: Sequence[RunResult]) -> str:
    """The page as text. Raises as `write_report`."""
    if not 1 <= len(results) <= RUNS_MAX:
        raise ConfigError(f"a report shows 1 to {RUNS_MAX} runs, not {len(results)}")
    go, plotly_js = _plotly()
    sections = _sections(results, go)
    scripts = [text.replace("\r", "") for text in (plotly_js, _own("report.js"))]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_own("report_page.html")).render(
        heading=results[0].title if len(sections) == 1 else "The fleet, simulated",
        sections=sections,
        broken=[run for section in sections for run in section.runs if run.result.violations],
        violations_shown_max=VIOLATIONS_SHOWN_MAX,
        overview=_overview(sections) if len(results) > 1 else (),
        style=_own("report.css"),
        scripts=scripts,
        policy=_policy(scripts),
        when=lambda run, at_s: _when(run.result, at_s),
    )


def _plotly() -> tuple[Any, str]:
    """Plotly's figures and its script. They come with the extra `sim`."""
    try:
        import plotly.graph_objects as go
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError(
            "reports are drawn with plotly, which is not installed: install Fallow with the extra `sim` "
            "(pip install 'fallow[sim]'); results are written as JSON without it"
        ) from error
    return go, get_plotlyjs()


def _own(name: str) -> str:
    return resources.files("fallow.simulator").joinpath(name).read_text("utf-8")


def _policy(scripts: Sequence[str]) -> str:
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def replay_command(result: RunResult) -> str:
    """What makes this run again."""
    words = ["fallow", "sim", "run", result.scenario, "--mode", str(result.mode), "--devices", str(result.devices)]
    return shlex.join([*words, "--hours", f"{result.simulated_s / 3600:g}", "--seed", str(result.seed)])


# --- sections -------------------------------------------------------------------------------------


def _sections(results: Sequence[RunResult], go: Any) -> tuple[Section, ...]:
    by_scenario: dict[str, list[RunResult]] = {}
    for result in results:
        by_scenario.setdefault(result.scenario, []).append(result)
    return tuple(_section(f"s{index}", runs, go) for index, runs in enumerate(by_scenario.values()))


def _section(anchor: str, results: Sequence[RunResult], go: Any) -> Section:
    runs = tuple(_run(result) for result in results)
    rows = []
    for chart in CHARTS:
        panels = [
            Panel(chart.title, chart.reading, run.label if len(runs) > 1 else "", _embedded(built.to_json()))
            for run in runs
            if (built := figure(chart, run.result, go)) is not None
        ]
        if panels:
            rows.append(tuple(panels))
    first = results[0]
    return Section(anchor, first.title, first.about, runs, _table(results), tuple(rows))


def _embedded(text: str) -> str:
    """JSON inside a script element: no tag can begin or end in it."""
    for character, escape in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(character, escape)
    return text


def _run(result: RunResult) -> Run:
    return Run(
        result=result,
        label=f"{result.mode}, {count(result.devices)} devices, seed {result.seed}",
        story=story(result),
        tiles=_tiles(result),
        marks=tuple(
            (_when(result, mark.at_s) + (f" to {_when(result, mark.until_s)}" if mark.until_s > mark.at_s else ""),
             label_of(mark))
            for mark in result.marks[:MARKS_DRAWN_MAX]
        ),
        replay=replay_command(result),
    )  # fmt: skip


def _when(result: RunResult, at_s: float) -> str:
    hour = result.start_hour_of_week + at_s / 3600
    return f"{day(hour)} {clock(hour)}"


def _tiles(result: RunResult) -> tuple[tuple[str, str], ...]:
    """The five figures that are looked at first."""
    totals = result.totals
    peak = max((sample.served_tokens_per_s for sample in result.samples), default=0.0)
    refused = totals.sessions_refused / max(totals.sessions_started, 1)
    tiles = [(share(totals.success_rate), "of accepted requests finished"), (share(refused), "refused")]
    tiles.append((count(peak), "tokens a second at the peak"))
    if totals.first_token_p50_s is not None:
        tiles.append((span_of(totals.first_token_p50_s), "to the first token, median"))
    if totals.inter_token_p50_s is not None:
        tiles.append((span_of(totals.inter_token_p50_s), "between tokens, median"))
    return tuple(tiles)


_FIGURES: Final[tuple[tuple[str, Callable[[RunResult], str]], ...]] = (
    ("Mode", lambda r: f"{r.mode} ({MODE_WORDS[r.mode]})"),
    ("Devices, cells", lambda r: f"{r.devices:,}, {r.cells:,}"),
    ("Simulated", lambda r: f"{span_of(r.simulated_s)} from {_when(r, begins_s(r))}"),
    ("Sessions asked for", lambda r: f"{r.totals.sessions_started:,}"),
    ("Finished", lambda r: f"{r.totals.sessions_finished:,}"),
    ("Refused", lambda r: f"{r.totals.sessions_refused:,}"),
    ("Failed", lambda r: f"{r.totals.sessions_failed:,}"),
    ("Altered", lambda r: NOTHING if r.totals.sessions_altered is None else f"{r.totals.sessions_altered:,}"),
    ("Success rate", lambda r: share(r.totals.success_rate)),
    ("Tokens served", lambda r: f"{r.totals.tokens_served:,}"),
    ("Utilisation", lambda r: NOTHING if r.totals.utilisation is None else share(r.totals.utilisation)),
    ("First token, median", lambda r: optional_span(r.totals.first_token_p50_s)),
    ("First token, p99", lambda r: optional_span(r.totals.first_token_p99_s)),
    ("Between tokens, median", lambda r: optional_span(r.totals.inter_token_p50_s)),
    ("Between tokens, p99", lambda r: optional_span(r.totals.inter_token_p99_s)),
    ("Answers that lost a device", lambda r: NOTHING if r.totals.stalls is None else f"{r.totals.stalls:,}"),
    ("Their pause, p95", lambda r: optional_span(r.totals.stall_p95_s)),
    ("Hops, mean", lambda r: NOTHING if r.totals.hops_mean is None else f"{r.totals.hops_mean:.2f}"),
    ("Orders", lambda r: f"{r.totals.orders:,}"),
    ("Repairs", lambda r: NOTHING if r.totals.repairs is None else f"{r.totals.repairs:,}"),
    ("Model files fetched", lambda r: size(r.totals.bytes_moved)),
    ("Broken invariants", lambda r: f"{len(r.violations):,}" if r.mode is Mode.DETAILED or r.violations else NOTHING),
    ("Steps", lambda r: f"{r.events:,}"),
    ("Computed in", lambda r: span_of(r.wall_s)),
    ("Event hash", lambda r: r.event_hash[:16]),
    ("Again", replay_command),
)


def _table(results: Sequence[RunResult]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((name, tuple(value(result) for result in results)) for name, value in _FIGURES)


OVERVIEW: Final = (
    "Success rate", "Refused", "Utilisation", "First token, median", "First token, p99", "Between tokens, median",
    "Between tokens, p99", "Model files fetched", "Computed in",
)  # fmt: skip


def _overview(sections: Sequence[Section]) -> tuple[tuple[Section, Run, tuple[str, ...]], ...]:
    values = dict(_FIGURES) | {
        "Refused": lambda r: share(r.totals.sessions_refused / max(r.totals.sessions_started, 1)),
    }
    return tuple(
        (section, run, tuple(values[name](run.result) for name in OVERVIEW))
        for section in sections
        for run in section.runs
    )
