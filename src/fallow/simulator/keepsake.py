"""Keeps what failed: the scenario's text, the seed, what was broken, and the command that replays it."""

import shlex
from pathlib import Path
from typing import Final

from fallow.simulator.results import RunResult, write_result

FOLDER: Final = Path("simulation-failures")
KEPT_MAX: Final = 200
"""Failures in the folder; more of them are not kept, and said so."""


def replay_command(scenario: str, result: RunResult, hours: float | None = None) -> str:
    """What runs exactly this again."""
    words = ["fallow", "sim", "run", scenario, "--mode", str(result.mode), "--seed", str(result.seed)]
    words += ["--devices", str(result.devices)]
    return shlex.join([*words, *([] if hours is None else ["--hours", f"{hours:g}"])])


def keep(text: str, result: RunResult, hours: float | None = None, folder: Path = FOLDER) -> Path | None:
    """Write a failing run to the folder of kept failures. `None` when that is full. Raises `OSError`."""
    place = folder / f"{result.scenario}-{result.seed}-{result.event_hash[:8]}"
    if not place.exists() and folder.exists() and sum(1 for _ in folder.iterdir()) >= KEPT_MAX:
        return None
    place.mkdir(parents=True, exist_ok=True)
    (place / "scenario.toml").write_text(text, "utf-8")
    write_result(result, place / "result.json")
    command = replay_command(str(place / "scenario.toml"), result, hours)
    lines = [command, "", *(f"{each.at_s:10.3f} s  {each.invariant}: {each.detail}" for each in result.violations)]
    (place / "README.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return place
