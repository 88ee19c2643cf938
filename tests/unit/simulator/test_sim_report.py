"""The report says what the figures say, and hostile files stay text."""

import builtins
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.errors import ConfigError
from fallow.simulator.report import RUNS_MAX, render, replay_command, write_report
from fallow.simulator.report_story import steepest_fall, story
from fallow.simulator.report_words import clock, count, counted, day, fraction, share, size, span_of
from fallow.simulator.results import Mark, Mode, RunResult, Sample, Totals, Violation

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{7*7}} \"'&"


def sample(at_s: float, devices: float = 100.0, **figures: Any) -> Sample:
    usual: dict[str, Any] = {
        "capacity_tokens_per_s": 10.0 * devices,
        "offered_tokens_per_s": 400.0,
        "served_tokens_per_s": 400.0,
        "sessions_started": 10,
        "sessions_finished": 10,
        "sessions_refused": 0,
        "sessions_failed": 0,
        "first_token_p50_s": 1.0,
        "first_token_p99_s": 4.0,
        "inter_token_p50_s": 0.2,
        "inter_token_p99_s": 0.5,
        "hops_mean": 2.5,
        "orders": 3,
        "bytes_moved": 1e9,
    }
    return Sample(at_s=at_s, devices_available=devices, **(usual | figures))


def result(*samples: Sample, **changes: Any) -> RunResult:
    totals = Totals(
        sessions_started=1000, sessions_finished=989, sessions_refused=10, sessions_failed=1, sessions_altered=None,
        tokens_served=123_456, utilisation=0.4, success_rate=989 / 990, first_token_p50_s=1.0, first_token_p99_s=4.0,
        inter_token_p50_s=0.2, inter_token_p99_s=0.5, stall_p95_s=1.5, stalls=12, hops_mean=2.5, orders=300,
        repairs=12, bytes_moved=5e12,
    )  # fmt: skip
    figures: dict[str, Any] = {
        "scenario": "evening", "title": "An evening", "about": "People come home.", "mode": Mode.FAST, "seed": 7,
        "devices": 1_000_000, "cells": 3333, "simulated_s": 86400.0, "wall_s": 200.0, "start_hour_of_week": 12.0,
        "bin_s": 600.0, "event_hash": "ab" * 16, "events": 12, "totals": totals,
        "samples": samples or tuple(sample(600.0 * i) for i in range(144)),
    }  # fmt: skip
    return RunResult(**(figures | changes))


class Tags(HTMLParser):
    """What a browser would make of a page: elements, scripts that would run, text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.scripts = 0
        self.json: list[str] = []
        self.text: list[str] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        data = ("type", "application/json") in attrs
        self._inside = "json" if data else "script" if tag == "script" else tag
        self.scripts += tag == "script" and not data

    def handle_data(self, data: str) -> None:
        if self._inside == "json":
            self.json.append(data)
        elif self._inside not in ("script", "style"):
            self.text.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def test_a_file_cannot_put_markup_or_scripts_on_the_page() -> None:
    hostile = result(
        scenario=HOSTILE, title=HOSTILE, about=HOSTILE, event_hash=HOSTILE,
        marks=(Mark(at_s=600.0, until_s=1200.0, label=HOSTILE),),
        violations=(Violation(invariant=HOSTILE, at_s=1.0, detail=HOSTILE),),
    )  # fmt: skip
    page = Tags(render([hostile, result()]))
    clean = Tags(render([result(marks=(Mark(at_s=600.0, until_s=1200.0, label="x"),)), result(scenario="other")]))
    assert page.scripts == clean.scripts == 2
    assert not page.handlers
    assert "img" not in page.tags
    assert HOSTILE in "".join(page.text)
    assert len(page.json) == len(clean.json)
    assert "alert(1)</script>" not in "".join(page.json)


def test_labels_in_plots_are_escaped_for_plotly_reads_html() -> None:
    page = Tags(render([result(marks=(Mark(at_s=600.0, until_s=1200.0, label="<a href='javascript:x'>y</a>"),))]))
    for data in page.json:
        assert "<a" not in json.loads(data)["layout"]["annotations"][0]["hovertext"]


def test_the_page_loads_nothing_and_allows_only_its_own_scripts() -> None:
    page = render([result()])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert "default-src 'none'" in policy[1].replace("&#39;", "'")
    assert policy[1].count("sha256-") == 2
    assert not re.search(r"<(script|link|img)[^>]*\b(src|href)=", page)


def test_broken_invariants_come_first_with_their_replay() -> None:
    broken = result(
        mode=Mode.DETAILED, devices=60, violations=(Violation(invariant="no_token_lost", at_s=62.0, detail="t 7"),)
    )
    page = render([result(), broken])
    first = page.index("Invariants broke")
    assert first < page.index("People come home.")
    alarm = page[first : page.index("</section>", first)]
    assert "no_token_lost" in alarm
    assert "t 7" in alarm
    assert "fallow sim run evening --mode detailed --devices 60 --hours 24 --seed 7" in alarm
    assert "Invariants broke" not in render([result()])


def test_one_thing_is_not_many() -> None:
    assert [counted(number, "cell") for number in (0, 1, 2, 3333)] == ["0 cells", "1 cell", "2 cells", "3,333 cells"]


def test_a_replay_command_cannot_run_anything_else() -> None:
    assert "'a; rm -rf /'" in replay_command(result(scenario="a; rm -rf /"))


def test_the_story_tells_the_fall_and_its_event() -> None:
    levels = [900.0] * 36 + [300.0] * 12 + [900.0] * 24
    samples = [sample(600.0 * i, devices) for i, devices in enumerate(levels)]
    told = " ".join(story(result(*samples, marks=(Mark(at_s=21600.0, until_s=22000.0, label="homecoming"),))))
    assert "two thirds of the devices at hand went away (at the same time: homecoming): from 900 to 300" in told
    assert "and 18:00 two thirds" in told


def test_the_story_tells_a_steady_fleet_and_load() -> None:
    told = " ".join(story(result()))
    assert "went away" not in told
    assert "Load came closest" in told
    assert "40 % of it" in told
    assert "99.9 %" in told


def test_the_story_tells_overload() -> None:
    samples = [sample(600.0 * i, offered_tokens_per_s=3000.0 if i in (3, 4) else 100.0) for i in range(10)]
    told = " ".join(story(result(*samples)))
    assert "For 20 min altogether, more was asked than the fleet could serve; at 12:30 it was 3 times as much" in told


def test_nothing_is_said_of_what_was_not_measured() -> None:
    nothing = sample(0.0, capacity_tokens_per_s=None, first_token_p50_s=None, first_token_p99_s=None,
                     inter_token_p50_s=None, inter_token_p99_s=None, hops_mean=None)  # fmt: skip
    idle = msgspec.structs.replace(
        result().totals, sessions_started=0, sessions_finished=0, sessions_refused=0, sessions_failed=0,
        first_token_p50_s=None, first_token_p99_s=None, inter_token_p50_s=None, inter_token_p99_s=None, stalls=None,
        orders=0, hops_mean=None, utilisation=None,
    )  # fmt: skip
    empty = result(nothing, totals=idle)
    assert story(empty)[0] == "In 24 h nobody asked 1 million devices in 3,333 cells for anything."
    assert "Time to first token" not in render([empty])
    assert "Capacity and load" in render([empty])
    render([result(totals=idle, samples=())])


def test_runs_of_one_scenario_stand_side_by_side() -> None:
    page = render([result(), result(mode=Mode.DETAILED, devices=60), result(scenario="other", title="Other")])
    assert page.count('<section class="scenario"') == 2
    assert page.count("detailed, 60 devices, seed 7") > 5


def test_a_run_that_starts_late_in_its_scenario_is_drawn_where_it_is() -> None:
    samples = [sample(7200.0 + 600.0 * i) for i in range(6)]
    late = result(*samples, simulated_s=3600.0, marks=(Mark(at_s=6600.0, until_s=8000.0, label="late"),))
    page = Tags(render([late]))
    for data in page.json:
        layout = json.loads(data)["layout"]
        assert layout["xaxis"]["range"] == [2.0, 3.0]
        assert layout["xaxis"]["ticktext"][0] == "14:00"
        assert layout["shapes"][0]["x0"] == 2.0
    assert "from Mon 14:00" in "".join(page.text)


def test_a_report_is_written_to_a_file(tmp_path: Path) -> None:
    write_report([result()], tmp_path / "deep" / "page.html")
    assert (tmp_path / "deep" / "page.html").read_text("utf-8").startswith("<!doctype html>")


def test_a_report_of_nothing_or_too_much_is_refused() -> None:
    for runs in ([], [result()] * (RUNS_MAX + 1)):
        with pytest.raises(ConfigError, match=f"1 to {RUNS_MAX} runs"):
            render(runs)


def test_without_plotly_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"fallow\[sim\]"):
        render([result()])


@given(st.floats(0, 1))
def test_a_share_is_never_rounded_to_all_or_none(value: float) -> None:
    shown = float(share(value).removesuffix(" %").strip())
    assert (shown == 100) <= (value > 1 - 1e-10)
    assert (shown == 0) <= (value < 1e-10)


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_words_take_any_number(value: float) -> None:
    for word in (count, size, span_of, share, fraction, clock, day):
        if value == value and abs(value) != float("inf"):
            assert word(value)
    assert clock(value)
    assert day(value)


@given(st.lists(st.floats(0, 1e6), max_size=40))
def test_the_steepest_fall_is_the_steepest(levels: list[float]) -> None:
    samples = tuple(sample(1200.0 * i, devices) for i, devices in enumerate(levels))
    fall = steepest_fall(samples)
    drops = [
        1 - b.devices_available / a.devices_available
        for i, a in enumerate(samples)
        for b in samples[i + 1 :]
        if b.at_s - a.at_s <= 7200 and a.devices_available > 0
    ]
    assert (fall.share if fall else 0.0) == pytest.approx(max([*drops, 0.0]) if fall is None else max(drops))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (span_of(0.18), "180 ms"), (span_of(2.41), "2.41 s"), (span_of(200), "3 min 20 s"),
        (span_of(6000), "1 h 40 min"),
        (count(12_345_678), "12.3 million"), (count(1234), "1,234"), (size(4.75e15), "4.75 PB"),
        (share(0.99996), "99.996 %"), (share(0.5), "50 %"), (fraction(2 / 3), "two thirds"),
        (fraction(0.34), "a third"),
        (fraction(0.58), "about three fifths"), (clock(18.0), "18:00"), (clock(24 * 3 + 7.5), "07:30"),
        (day(24.0), "Tue"),
    ],
)  # fmt: skip
def test_numbers_as_people_read_them(text: str, expected: str) -> None:
    assert text == expected
