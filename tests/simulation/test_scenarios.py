"""Goal: every shipped scenario runs in the detailed mode, serves its clients and breaks no invariant; the command line
and kept failures work.

Method: minutes of each scenario with a small fleet, around what happens in it; seed 1.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from fallow.cli.app import app
from fallow.domain.errors import ConfigError
from fallow.node.stages import StageRelay
from fallow.simulator import shipped
from fallow.simulator.results import RunResult, read_result
from fallow.simulator.runner import run_detailed
from fallow.simulator.scenario import Scenario

EXPECTED = {
    "home-evenings", "office-nights", "ev-fleet", "flash-crowd", "regional-outage", "rolling-update", "slow-rot",
    "coordinator-loss", "correlated-reclaim",
}  # fmt: skip
MINUTES = 2.0
DEVICES = 20
SESSIONS_MIN = 2


def shortened(scenario: Scenario) -> Scenario:
    """A few minutes around the first event, with enough questions."""
    starts = [event.at_s for event in scenario.events if event.at_s >= scenario.detailed.start_after_s]
    start_s = min(starts) - 60 if starts else scenario.detailed.start_after_s
    detailed = msgspec.structs.replace(
        scenario.detailed, devices=DEVICES, hours=MINUTES / 60, start_after_s=max(0.0, start_s)
    )
    traffic = msgspec.structs.replace(
        scenario.traffic,
        sessions_per_hour_per_device=10.0,
        by_hour=(1.0,) * 24,
        prompt_tokens=60,
        completion_tokens=25,
    )
    return msgspec.structs.replace(scenario, detailed=detailed, traffic=traffic)


def test_what_is_shipped() -> None:
    assert set(shipped.names()) == EXPECTED
    for name in shipped.names():
        scenario = shipped.scenario(name)
        assert scenario.name == name
        assert scenario.devices == 100_000, "the fast mode scales these in proportion"
    with pytest.raises(ConfigError, match="home-evenings"):
        shipped.scenario("nowhere")


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_each_scenario_runs_and_holds(name: str) -> None:
    result = run_detailed(shortened(shipped.scenario(name)), 1)
    totals = result.totals
    assert result.violations == ()
    assert totals.sessions_altered == 0
    assert totals.sessions_finished >= SESSIONS_MIN
    assert sum(sample.sessions_started for sample in result.samples) == totals.sessions_started
    assert totals.sessions_started == totals.sessions_finished + totals.sessions_refused + totals.sessions_failed
    assert 0 < (totals.utilisation or 0.0) < 1


@pytest.fixture
def scenario_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A scenario of seconds, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.toml"
    path.write_text(
        """
name = "tiny"
title = "Tiny"
about = "For a test."
[detailed]
devices = 6
hours = 0.01
heartbeat_interval_s = 2.0
[model]
layer_count = 4
layer_bytes = 1000000
embedding_bytes = 1000000
head_bytes = 1000000
[traffic]
sessions_per_hour_per_device = 100.0
prompt_tokens = 20
completion_tokens = 8
[[populations]]
name = "desktops"
habit = "always"
count = 6
memory_bytes = 500000000
"""
    )
    yield path


def test_a_run_from_the_command_line(scenario_file: Path) -> None:
    done = CliRunner().invoke(app, ["sim", "run", str(scenario_file), "--seed", "3", "--out", "result.json"])
    assert done.exit_code == 0, done.output
    assert "No answers differ" in done.output
    assert "6 devices in 1 cell," in done.output
    result = read_result(Path("result.json"))
    assert (result.seed, result.devices, result.mode) == (3, 6, "detailed")
    assert result.event_hash in done.output
    assert not Path("simulation-failures").exists()


def test_a_failing_run_is_kept_and_can_be_replayed(scenario_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StageRelay, "_on_close", lambda *_: None)
    command = ["sim", "run", str(scenario_file), "--seed", "4", "--hours", "0.02"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert "nothing_outlives_its_session" in done.output
    (kept,) = Path("simulation-failures").iterdir()
    first = read_result(kept / "result.json")
    replay = (kept / "README.txt").read_text().splitlines()[0].split()
    assert replay[:3] == ["fallow", "sim", "run"]
    assert replay[replay.index("--mode") + 1] == "detailed"
    again = CliRunner().invoke(app, [*replay[1:], "--out", "again.json"])
    assert again.exit_code == 1
    assert read_result(Path("again.json")).event_hash == first.event_hash


def test_the_list_and_errors_of_the_command_line(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["sim", "list"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in EXPECTED)
    missing = CliRunner().invoke(app, ["sim", "run", str(tmp_path / "missing.toml")])
    assert missing.exit_code != 0
    assert isinstance(missing.exception, ConfigError)


def test_a_result_is_json_that_others_can_read(scenario_file: Path) -> None:
    CliRunner().invoke(app, ["sim", "run", str(scenario_file), "--out", "result.json"])
    read = json.loads(Path("result.json").read_text())
    assert msgspec.convert(read, RunResult).totals.sessions_altered == 0
