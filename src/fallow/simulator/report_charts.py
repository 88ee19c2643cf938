"""A run's curves as plotly figures: one small figure for each question that a reader has.

Rules
- The horizontal axis is the clock; scripted events are shaded, numbered like the list above the charts.
- A curve that a mode does not model is left out; a chart without curves does not exist.
- Text from files is escaped, for plotly reads a little HTML in labels.
- Colours are of middle lightness: they are read on light and on dark. Text and grid take theirs from the page.
"""

import html
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import numpy as np

from fallow.simulator.report_story import label_of
from fallow.simulator.report_words import clock, day
from fallow.simulator.results import RunResult, Sample

TICKS_MAX: Final = 9
TICK_STEPS_H: Final = (1 / 12, 1 / 6, 0.25, 0.5, 1, 2, 3, 6, 12, 24, 48, 168)
MARKS_DRAWN_MAX: Final = 40
BINS_DRAWN_MAX: Final = 1500
LOG_FROM: Final = 20.0
"""An axis is logarithmic when its greatest value is this many times its least."""

GOLD, GREEN, BLUE, ORANGE, RED, VIOLET, SLATE = (
    "#d3a02c", "#2f9e6e", "#3f7fe0", "#e0703a", "#d9463f", "#9a6fd0", "#6d83c9",
)  # fmt: skip


class Curve(msgspec.Struct, frozen=True):
    """One line, area or row of bars of a chart."""

    name: str
    value: Callable[[Sample], float | None]
    colour: str
    form: str = "line"
    """`line`, `area` or `bar`."""


class Chart(msgspec.Struct, frozen=True):
    """What a chart shows and how to read it."""

    key: str
    title: str
    reading: str
    curves: tuple[Curve, ...]
    unit: str = ""
    latency: bool = False
    """In seconds, and logarithmic where it spreads far."""


def _share(part: Callable[[Sample], int], whole: Callable[[Sample], int]) -> Callable[[Sample], float | None]:
    return lambda sample: 100 * part(sample) / whole(sample) if whole(sample) > 0 else None


def _latency(
    key: str, title: str, reading: str, median: Callable[[Sample], float | None], p99: Callable[[Sample], float | None]
) -> Chart:
    return Chart(
        key, title, reading, (Curve("99th percentile", p99, ORANGE), Curve("median", median, GREEN)), "s", True
    )


CHARTS: Final = (
    Chart(
        "load",
        "Capacity and load",
        "Tokens a second. Gold: what placement and routing could serve. Blue: what was asked. Green: what was served.",
        (
            Curve("could serve", lambda s: s.capacity_tokens_per_s, GOLD, "area"),
            Curve("asked", lambda s: s.offered_tokens_per_s, BLUE),
            Curve("served", lambda s: s.served_tokens_per_s, GREEN),
        ),
        "tokens/s",
    ),
    Chart(
        "devices",
        "Devices at hand",
        "On, and not used by their owners.",
        (Curve("devices", lambda s: s.devices_available, SLATE, "area"),),
    ),
    _latency(
        "first",
        "Time to first token",
        "From the request to the first token of the answer.",
        lambda s: s.first_token_p50_s,
        lambda s: s.first_token_p99_s,
    ),
    _latency(
        "inter",
        "Time between tokens",
        "From one token of an answer to the next.",
        lambda s: s.inter_token_p50_s,
        lambda s: s.inter_token_p99_s,
    ),
    Chart(
        "success",
        "Success rate",
        "Accepted requests that got their whole answer.",
        (
            Curve(
                "finished",
                _share(lambda s: s.sessions_finished, lambda s: s.sessions_finished + s.sessions_failed),
                GREEN,
            ),
        ),
        "%",
    ),
    Chart(
        "refused",
        "Refusals",
        "Requests that were told at once to come again later.",
        (Curve("refused", _share(lambda s: s.sessions_refused, lambda s: s.sessions_started), RED, "area"),),
        "%",
    ),
    Chart("hops", "Hops", "Devices that a chain is made of.", (Curve("hops", lambda s: s.hops_mean, VIOLET),)),
    Chart(
        "orders",
        "Re-placements and repairs",
        "Stages that devices were told to host or drop, and chains mended under a running answer.",
        (
            Curve("orders", lambda s: s.orders, SLATE, "bar"),
            Curve("repairs", lambda s: s.repairs, ORANGE),
        ),
    ),
    Chart(
        "stall",
        "Pauses",
        "The longest gap of answers that lost a device, 95th percentile.",
        (Curve("pause", lambda s: s.stall_p95_s, ORANGE),),
        "s",
        True,
    ),
    Chart(
        "bytes",
        "Bytes moved",
        "Model files that devices fetched.",
        (Curve("fetched", lambda s: s.bytes_moved, VIOLET, "bar"),),
        "bytes",
    ),
)


def figure(chart: Chart, result: RunResult, go: Any) -> Any | None:
    """The chart of a run as a `plotly.graph_objects.Figure` (`go` is that module); `None` when it has no figures."""
    every = max(1, -(-len(result.samples) // BINS_DRAWN_MAX))
    samples = result.samples[::every]
    drawn = [(curve, np.array([_number(curve.value(s)) for s in samples], np.float32)) for curve in chart.curves]
    drawn = [(curve, values) for curve, values in drawn if np.isfinite(values).any()]
    if not drawn:
        return None
    hours = np.array([sample.at_s / 3600 for sample in samples], np.float32)
    clocks = [clock(result.start_hour_of_week + sample.at_s / 3600) for sample in samples]
    traces = [_trace(curve, chart, hours, values, clocks, go) for curve, values in drawn]
    built = go.Figure(traces, _layout(chart, result, drawn))
    _mark(built, result)
    return built


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _trace(curve: Curve, chart: Chart, hours: Any, values: Any, clocks: Sequence[str], go: Any) -> Any:
    unit = f" {chart.unit}" if chart.unit else ""
    hover = f"{html.escape(curve.name)}: %{{y:,.4~s}}{unit}<extra></extra>"
    common = {"x": hours, "y": values, "name": curve.name, "hovertemplate": hover, "customdata": clocks}
    if curve.form == "bar":
        return go.Bar(marker_color=curve.colour, marker_line_width=0, **common)
    fill = {"fill": "tozeroy", "fillcolor": _faint(curve.colour)} if curve.form == "area" else {}
    return go.Scatter(mode="lines", line={"color": curve.colour, "width": 2}, connectgaps=False, **fill, **common)


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.22)"


def _layout(chart: Chart, result: RunResult, drawn: list[tuple[Curve, Any]]) -> dict[str, Any]:
    ticks, begin_h = _ticks(result), begins_s(result) / 3600
    return {
        "template": "none",
        "height": 230,
        "margin": {"l": 48, "r": 10, "t": 26, "b": 26},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": len(drawn) > 1,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 12}},
        "hovermode": "x unified",
        "barmode": "overlay",
        "bargap": 0,
        "dragmode": False,
        "xaxis": {
            "tickvals": [at for at, _ in ticks],
            "ticktext": [text for _, text in ticks],
            "range": [begin_h, begin_h + result.simulated_s / 3600],
            "fixedrange": True,
            "showgrid": False,
            "zeroline": False,
            "unifiedhovertitle": {"text": "%{customdata}"},
        },
        "yaxis": {"fixedrange": True, "zeroline": False, "nticks": 5} | _vertical(chart, drawn),
    }


def _vertical(chart: Chart, drawn: list[tuple[Curve, Any]]) -> dict[str, Any]:
    """The range of the vertical axis: from zero, except for a success rate and for latencies that spread far."""
    least = min(float(np.nanmin(values)) for _, values in drawn)
    most = max(float(np.nanmax(values)) for _, values in drawn)
    if chart.key == "success":
        room = max(100 - least, 0.1)
        return {"range": [max(0.0, 100 - 1.15 * room), 100 + 0.08 * room], "ticksuffix": " %"}
    if chart.unit == "%":
        return {"range": [0, max(1.15 * most, 1.0)], "ticksuffix": " %"}
    if chart.latency and least > 0 and most > LOG_FROM * least:
        return {"type": "log", "dtick": 1, "ticksuffix": "s", "exponentformat": "SI"}
    top = 1.12 * most if most > 0 else 1.0
    return {"range": [0, top], "exponentformat": "SI", "ticksuffix": "s" if chart.latency else ""}


def begins_s(result: RunResult) -> float:
    """When the simulated part begins, in the scenario's seconds: the detailed mode may start late in it."""
    return result.samples[0].at_s if result.samples else 0.0


def _ticks(result: RunResult) -> list[tuple[float, str]]:
    """Where the clock shows a round time, in hours of the scenario, and what it says there: the day at midnight."""
    hours, begin_h = result.simulated_s / 3600, begins_s(result) / 3600
    start = math.fmod(result.start_hour_of_week + begin_h, 168)
    step = next((step for step in TICK_STEPS_H if hours <= step * (TICKS_MAX - 1)), hours / (TICKS_MAX - 1))
    if not math.isfinite(step) or step <= 0:
        return []
    first = math.ceil(start / step - 1e-9)
    ticks = []
    for index in range(TICKS_MAX + 1):
        at = (first + index) * step
        if at - start <= hours * (1 + 1e-9):
            midnight = clock(at) == "00:00"
            ticks.append((at - start + begin_h, day(at) if midnight else clock(at)))
    return ticks


def _mark(built: Any, result: RunResult) -> None:
    """Shade what was scripted. Numbers stand above the plot; the page lists what they mean."""
    shapes, notes = [], []
    begin_h = begins_s(result) / 3600
    end_h = begin_h + result.simulated_s / 3600
    for number, mark in enumerate(result.marks[:MARKS_DRAWN_MAX], start=1):
        first, last = max(mark.at_s / 3600, begin_h), min(max(mark.until_s, mark.at_s) / 3600, end_h)
        if not first <= min(last, end_h):
            continue
        shapes.append(
            {
                "type": "rect", "xref": "x", "yref": "paper", "x0": first,
                "x1": max(last, first + (end_h - begin_h) / 400), "y0": 0, "y1": 1, "fillcolor": "rgba(217,70,63,0.12)",
                "line": {"width": 0}, "layer": "below",
            }
        )  # fmt: skip
        notes.append(
            {
                "x": first, "y": 1, "xref": "x", "yref": "paper", "text": str(number), "showarrow": False,
                "xanchor": "left", "yanchor": "top", "font": {"size": 11, "color": RED},
                "hovertext": html.escape(label_of(mark)),
            }
        )  # fmt: skip
    built.update_layout(shapes=shapes, annotations=notes)
