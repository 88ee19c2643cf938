"""How well devices foretell how long they stay, against "uptime so far".

    python benchmarks/availability.py [--devices 300] [--seeds 101 102 103]

Method: the simulator draws three weeks of each habit's devices (`simulator/lives.py` has the distributions and their
sources; the traces are synthetic). Each device learns from its own first two weeks, as an agent does, and foretells at
moments of the third week whether it will still be here after each of the outlook's horizons. The constants of the
policy were chosen on other seeds.

Against it:
- `age`: the share of the fleet's stays that lasted so much longer, given the age of this one: the survival curve
  (Kaplan-Meier) of all training stays of the same habit. That is the best that anybody can do who knows the habit and
  the uptime so far, and a strong opponent: it has seen all devices, and a device only itself.
- `fleet age`: the same curve over all habits together, which is what a coordinator has that is told uptimes only.
- `lindy`: a device will stay as long as it has stayed, a / (a + horizon).
- `stays`: everyone stays, as planners without forecasts assume.
`new` is a device without history: its prior, and what its owner declared.

Figures: mean Brier score and log loss at each horizon as ratios to the opponents (below 1: better), and the calibration
error (mean distance between what was foretold and what came, in ten classes). A table, and JSON in
`benchmarks/results/availability.json`. Goal: clearly below 1 for the fleet and for every habit that has a rhythm;
memoryless and campus devices have none to learn, and may only not be worse.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from fallow.domain.fleet import OUTLOOK_HORIZONS_S
from fallow.policy.availability import HOURS, Present, fit, no_history, rates_of, survival
from fallow.simulator.life_history import PAST_S, learned, spells, window_shares
from fallow.simulator.lives import DAY_S, WEEK_S, Lives, draw_lives
from fallow.simulator.scenario import Habit, Population

RESULTS = Path(__file__).parent / "results" / "availability.json"
LOOK_S = 2.37 * 3600
"""Between two moments of foretelling, so that they fall on all times of the day."""
HORIZONS = np.array(OUTLOOK_HORIZONS_S)
SURE = 1e-3
"""Nobody is believed to be surer than this, or one mistake would be all of the log loss."""
CLASSES = 10
OPPONENTS = ("age", "fleet age", "lindy", "stays")

Array = npt.NDArray[np.float64]
Curve = Callable[[Array], Array]


def curve_of(durations_s: Array, ended: npt.NDArray[np.bool_]) -> Curve:
    """Kaplan and Meier's survival curve of stays, some of which were cut."""
    order = np.argsort(durations_s)
    at_s = durations_s[order]
    alive = np.cumprod(1 - ended[order] / (len(at_s) - np.arange(len(at_s))))

    def survives(age_s: Array) -> Array:
        index = np.searchsorted(at_s, age_s, side="right") - 1
        return np.where(index >= 0, alive[np.maximum(index, 0)], 1.0)

    return survives


def training_stays(lives: Lives) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Durations of the stays that began in the first two weeks, cut at their end."""
    found = spells(lives)
    began = (found.from_s > 0) & (found.from_s < PAST_S)
    ended = (found.until_s < PAST_S) & ~found.cut
    return np.minimum(found.until_s, PAST_S)[began] - found.from_s[began], ended[began]


class Looks(msgspec.Struct):
    """Everything that was foretold, and what came: [looks, horizons]."""

    came: npt.NDArray[np.bool_]
    foretold: dict[str, Array]


def look(lives: Lives, age: Curve, fleet: Curve) -> Looks:
    """Ask all devices of one habit in the third week."""
    shares = window_shares(lives)
    rates, strangers = fit(learned(lives, 0.0, PAST_S), shares), fit(no_history(lives.devices), shares)
    found = spells(lives)
    key = found.device * 1e9 + found.from_s
    came: list[npt.NDArray[np.bool_]] = []
    foretold: list[list[Array]] = []
    for step in lives.walk(PAST_S, LOOK_S):
        here = np.flatnonzero(step.available)
        if step.at_s + HORIZONS[-1] > lives.end_s or not len(here):
            continue
        knows = lives.knowledge(step.at_s, step.since_s, step.leaves_at_s, here)
        now = Present(
            hour_of_week=np.full(len(here), knows.hour_of_week % HOURS),
            age_h=knows.age_s / 3600,
            departs_in_h=knows.departs_in_s / 3600,
            on_battery=~knows.plugged_in,
        )
        ends_s = found.until_s[np.searchsorted(key, here * 1e9 + step.at_s, side="right") - 1]
        came.append(ends_s[:, None] - step.at_s > HORIZONS)
        aged = knows.age_s[:, None]
        foretold.append(
            [
                survival(rates_of(rates, here), now)[0],
                survival(rates_of(strangers, here), now)[0],
                *(curve(aged + HORIZONS) / np.maximum(curve(aged), 1e-9) for curve in (age, fleet)),
                aged / (aged + HORIZONS),
                np.ones((len(here), len(HORIZONS))),
            ]
        )
    columns = [np.concatenate(parts) for parts in zip(*foretold, strict=True)]
    return Looks(np.concatenate(came), dict(zip(("outlook", "new", *OPPONENTS), columns, strict=True)))


def joined(parts: list[Looks]) -> Looks:
    return Looks(
        np.concatenate([part.came for part in parts]),
        {name: np.concatenate([part.foretold[name] for part in parts]) for name in parts[0].foretold},
    )


def figures(looks: Looks) -> dict[str, dict[str, list[float]]]:
    """Brier score, log loss and calibration error of each forecaster at each horizon."""
    found = {}
    for name, raw in looks.foretold.items():
        shares = np.clip(raw, SURE, 1 - SURE)
        hit = np.where(looks.came, shares, 1 - shares)
        errors = []
        for column in range(len(HORIZONS)):
            bucket = np.minimum((shares[:, column] * CLASSES).astype(int), CLASSES - 1)
            gaps = np.bincount(bucket, shares[:, column] - looks.came[:, column], minlength=CLASSES)
            errors.append(float(np.abs(gaps).sum() / len(bucket)))
        found[name] = {
            "brier": ((1 - hit) ** 2).mean(axis=0).tolist(),
            "log_loss": (-np.log(hit)).mean(axis=0).tolist(),
            "calibration_error": errors,
        }
    return found


def run(devices: int, seeds: list[int]) -> dict[str, Looks]:
    by_habit: dict[str, list[Looks]] = {habit.value: [] for habit in Habit}
    for seed in seeds:
        all_lives = {
            habit: draw_lives([Population(name=habit.value, habit=habit, count=devices)], seed, 0.0, 3 * WEEK_S, DAY_S)
            for habit in Habit
        }
        stays = {habit: training_stays(lives) for habit, lives in all_lives.items()}
        fleet = curve_of(*(np.concatenate(parts) for parts in zip(*stays.values(), strict=True)))
        for habit, lives in all_lives.items():
            by_habit[habit.value].append(look(lives, curve_of(*stays[habit]), fleet))
    looks = {habit: joined(parts) for habit, parts in by_habit.items()}
    return {"fleet": joined(list(looks.values())), **looks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=300, help="of each habit")
    parser.add_argument("--seeds", type=int, nargs="*", default=[101, 102, 103])
    arguments = parser.parse_args()
    looks = run(arguments.devices, arguments.seeds)
    results = {name: figures(found) for name, found in looks.items()}
    console = Console()
    for metric in ("brier", "log_loss"):
        table = Table(
            title=f"{metric}, as a ratio to the opponent (below 1: better), at 10 min / 30 min / 1 h / 4 h / 12 h"
        )
        for column in ("devices", "forecaster", *OPPONENTS[: 4 if metric == "brier" else 3]):
            table.add_column(column)
        for name, found in results.items():
            for who in ("outlook", "new"):
                ratios = [
                    " ".join(f"{a / b:.2f}" for a, b in zip(found[who][metric], found[other][metric], strict=True))
                    for other in OPPONENTS[: 4 if metric == "brier" else 3]
                ]
                table.add_row(name, who, *ratios)
        console.print(table)
    table = Table(title="calibration error, percentage points, at the same horizons")
    for column in ("devices", "outlook", "new", *OPPONENTS):
        table.add_column(column)
    for name, found in results.items():
        table.add_row(
            name,
            *(
                " ".join(f"{100 * error:.1f}" for error in found[who]["calibration_error"])
                for who in ("outlook", "new", *OPPONENTS)
            ),
        )
    console.print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    asked = {name: len(found.came) for name, found in looks.items()}
    setup = {"devices_of_each_habit": arguments.devices, "seeds": arguments.seeds, "horizons_s": OUTLOOK_HORIZONS_S}
    RESULTS.write_text(json.dumps({"setup": setup, "looks": asked, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
