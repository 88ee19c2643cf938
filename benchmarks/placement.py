"""How near placement comes to the most that a fleet could serve, how fast it is worked out, and what churn does to it.

    python benchmarks/placement.py [--seeds 10] [--milp-s 20] [--churn-h 4] [--only throughput milp churn planner]

Method: a model of 32 layers with the shape of 8 billion parameters in 4 bits, whose head works as long as 4.4 layers;
devices whose speeds are lognormal with a factor of 10 between the 5th and the 95th percentile, and whose memory fits
an eighth to all of the model, drawn evenly or so that half of them fit less than 0.35 of it (`small`). Throughput is
the exact maximum flow over partial spans of what `place` gives (`policy/flow.py`). Beside it, on the same nodes:

- `bound`: the sum of all speeds by the work of a token. `roof`: the same, less what a device cannot bring to bear
  because its memory holds too narrow a span for its speed; no placement whatever exceeds it. Where a few fast devices
  have little memory, the bound itself is out of reach, and the roof says by how much.
- `MILP`: placement and flow as one mixed integer programme in HiGHS with a time limit (up to 30 nodes); its dual bound.
  It need not hold every part twice, as `place` does.
- Node-disjoint pipelines, in three grades (`placement_yardsticks.py`): `Parallax` by its published rules, `levelled`
  with the best spread of whole layers over each of its groups, and `ideal`, which nobody builds.
- `churn`: devices stay for an exponential time with a median of two hours and are replaced by fresh ones; placement
  follows every ten seconds from what is placed. `placed` counts a span at once, `ready` only when it has been fetched
  at 12.5 MB/s. Both by the bound of the devices present, downloading ones included. `levelled`: the pipelines of that
  grade as placed (without downloads), when one that loses a device ends and what is free is grouped anew.
- `planner`: `place` and `plan` together: from nothing, for one join, for one leave.

Results: tables, and JSON in `benchmarks/results/placement.json`. Goals: 0.95 of the bound for 25 to 1,000 nodes, 0.93
at 15, 1.8 times the pipelines, 0.90 under churn, 1 s from nothing and 50 ms for a join or a leave at 1,000 nodes.
"""

import argparse
import heapq
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from placement_yardsticks import (
    DOWNLINK_BYTES_PER_S,
    NEED,
    PARTS,
    WORK,
    Floats,
    Memory,
    filled_rate,
    fleet,
    grouped,
    ideal,
    level_rate,
    milp_bound,
    pipelines,
    roof_of,
    speeds,
)
from rich.console import Console
from rich.table import Table

from fallow.domain.ids import NodeId
from fallow.domain.model import StageSpec
from fallow.policy.flow import throughput_of_sets, throughput_of_spans
from fallow.policy.placement import Placement, place
from fallow.policy.placement_inputs import NodeRoom
from fallow.policy.placement_plan import NodeNow, plan

RESULTS = Path(__file__).parent / "results" / "placement.json"
MEDIAN_STAY_S = 7200.0
STEP_S = 10.0
SIZES = (15, 20, 25, 50, 100, 300, 1000)
MILP_SIZES = (15, 20, 30)
CHURN_SIZES = (25, 100, 300)
PLANNER_SIZES = (100, 300, 1000)


def held_by(stages: Sequence[StageSpec]) -> NDArray[np.bool_]:
    spans = [span for stage in stages for span in stage.spans()]
    return np.array([any(span.covers(part) for span in spans) for part in PARTS.spans])


def flow_of(held: NDArray[np.bool_], speed: Floats) -> float:
    """Tokens a second of devices that hold these parts, `[devices, parts]`."""
    runs = np.count_nonzero(np.diff(np.pad(held.astype(np.int8), ((0, 0), (1, 0))), axis=1) == 1, axis=1)
    if (runs > 1).any():
        return float(throughput_of_sets(held, speed, PARTS.work).rows_per_s)
    first = np.argmax(held, axis=1)
    last = np.where(runs == 0, first, held.shape[1] - np.argmax(held[:, ::-1], axis=1))
    return float(throughput_of_spans(first, last, speed, PARTS.work).rows_per_s)


def served(nodes: Sequence[NodeRoom], placed: Placement) -> float:
    return flow_of(np.array([held_by(placed.stages[node.node]) for node in nodes]), speeds(nodes))


def hosting(nodes: Sequence[NodeRoom], placed: Placement) -> list[NodeRoom]:
    return [msgspec.structs.replace(node, hosted=placed.stages.get(node.node, ())) for node in nodes]


# --- the measurements -----------------------------------------------------------------------------


def throughputs(seeds: int, console: Console) -> list[dict[str, float | str]]:
    names = ("of bound: min", "mean", "of roof: min", "mean", "x Parallax: min", "mean", "x levelled", "x ideal")
    table = Table("memory", "nodes", "seeds", *names)
    rows = []
    for memory, count in itertools.product(Memory, SIZES):
        drawn = range(seeds if count < 1000 else min(seeds, 3))
        ours, roofs, parallax, levelled, ideals = [], [], [], [], []
        for seed in drawn:
            nodes = fleet(count, 1000 * count + seed, memory)
            bound = speeds(nodes).sum() / WORK
            reached = served(nodes, place([NEED], nodes))
            ours.append(reached / bound)
            roofs.append(reached / roof_of(nodes))
            parallax.append(reached / max(pipelines(nodes, filled_rate), 1e-9))
            levelled.append(reached / max(pipelines(nodes, level_rate), 1e-9))
            ideals.append(reached / max(ideal(nodes), 1e-9))
        row = {
            "nodes": count,
            "of_bound_min": min(ours),
            "of_bound_mean": statistics.mean(ours),
            "of_roof_min": min(roofs),
            "of_roof_mean": statistics.mean(roofs),
            "times_parallax_min": min(parallax),
            "times_parallax_mean": statistics.mean(parallax),
            "times_levelled_mean": statistics.mean(levelled),
            "times_ideal_mean": statistics.mean(ideals),
        }
        rows.append({"memory": memory.value, **row})
        table.add_row(memory.value, str(count), str(len(drawn)), *(f"{value:.3f}" for value in list(row.values())[1:]))
    console.print(table)
    return rows


def against_milp(seeds: int, limit_s: float, console: Console) -> list[dict[str, float]]:
    table = Table("nodes", "seeds", "of MILP's dual bound: min", "mean", "dual bound of bound: mean")
    rows = []
    for count in MILP_SIZES:
        ratios, duals = [], []
        for seed in range(seeds):
            nodes = fleet(count, 1000 * count + seed)
            dual = milp_bound(nodes, limit_s)
            ratios.append(served(nodes, place([NEED], nodes)) / dual)
            duals.append(dual / (speeds(nodes).sum() / WORK))
        row = {
            "nodes": count,
            "of_dual_min": min(ratios),
            "of_dual_mean": statistics.mean(ratios),
            "dual_of_bound_mean": statistics.mean(duals),
        }
        rows.append(row)
        table.add_row(str(count), str(seeds), *(f"{value:.3f}" for value in list(row.values())[1:]))
    console.print(table)
    return rows


class Churn:
    """Devices that come and go, and placement that follows."""

    def __init__(self, count: int, seed: int) -> None:
        self._draw = np.random.default_rng(seed)
        self._pool = iter(fleet(count * 40, 7_000_000 + seed))
        self._mean_s = MEDIAN_STAY_S / np.log(2)
        self._between_s = self._mean_s / count
        self._next_s = float(self._draw.exponential(self._between_s))
        self._departures: list[tuple[float, NodeId]] = []
        self.present: dict[NodeId, NodeRoom] = {}
        self.ready_s: dict[NodeId, tuple[float, NDArray[np.bool_]]] = {}
        """When what a device is to hold will be there, and which parts it has until then."""
        self.moved = 0
        self._pipelines: list[list[NodeId]] = []
        for _ in range(count):
            self._arrive(0.0)
        self.place(-1e9)
        self.regroup()

    def _arrive(self, now_s: float) -> None:
        node = next(self._pool)
        self.present[node.node] = node
        heapq.heappush(self._departures, (now_s + float(self._draw.exponential(self._mean_s)), node.node))

    def step(self, now_s: float) -> bool:
        """Whether anybody came or went."""
        changed = False
        while self._departures[0][0] <= now_s:
            _, gone = heapq.heappop(self._departures)
            del self.present[gone]
            changed = True
        while self._next_s <= now_s:
            self._arrive(self._next_s)
            self._next_s += float(self._draw.exponential(self._between_s))
            changed = True
        return changed

    def place(self, now_s: float) -> None:
        placed = place([NEED], list(self.present.values()))
        for node, room in self.present.items():
            if placed.stages[node] == room.hosted:
                continue
            self.moved += bool(room.hosted)
            before, after = held_by(room.hosted), held_by(placed.stages[node])
            fetch_s = float(PARTS.weights[after & ~before].sum()) / DOWNLINK_BYTES_PER_S
            self.ready_s[node] = (now_s + fetch_s, before & after)
            self.present[node] = msgspec.structs.replace(room, hosted=placed.stages[node])

    def regroup(self) -> None:
        """Pipelines that lost a device end, and what is free is grouped anew; the others stay."""
        self._pipelines = [group for group in self._pipelines if all(node in self.present for node in group)]
        taken = {node for group in self._pipelines for node in group}
        free = [room for node, room in self.present.items() if node not in taken]
        self._pipelines += [[room.node for room in group] for group in grouped(free)]

    def ratios(self, now_s: float) -> tuple[float, float, float]:
        """Placed, ready, and the levelled pipelines as placed, by the bound of those present."""
        nodes = list(self.present.values())
        held = np.array([held_by(node.hosted) for node in nodes])
        speed = speeds(nodes)
        ready = held.copy()
        for index, node in enumerate(nodes):
            at_s, until_then = self.ready_s.get(node.node, (0.0, held[index]))
            if at_s > now_s:
                ready[index] = until_then
        bound = speed.sum() / WORK
        disjoint = sum(level_rate([self.present[node] for node in group]) for group in self._pipelines)
        return flow_of(held, speed) / bound, flow_of(ready, speed) / bound, disjoint / bound


def churned(hours: float, console: Console) -> list[dict[str, float]]:
    table = Table("nodes", "hours", "placed: mean", "p5", "min", "ready: mean", "p5", "min", "moves/h", "levelled")
    rows = []
    for count in CHURN_SIZES:
        churn, found = Churn(count, count), []
        for now_s in np.arange(STEP_S, hours * 3600, STEP_S).tolist():
            if churn.step(now_s):
                churn.place(now_s)
                churn.regroup()
            if now_s > 1800:
                found.append(churn.ratios(now_s))
        placed, ready, disjoint = np.array(found).T
        row = {"nodes": count, "hours": hours}
        for name, values in (("placed", placed), ("ready", ready)):
            row |= {f"{name}_mean": values.mean(), f"{name}_p5": np.percentile(values, 5), f"{name}_min": values.min()}
        row |= {"moves_per_h": churn.moved / hours, "levelled_mean": disjoint.mean()}
        rows.append({name: float(value) for name, value in row.items()})
        table.add_row(str(count), f"{hours:g}", *(f"{value:.3f}" for value in list(row.values())[2:]))
    console.print(table)
    return rows


def planner(rounds: int, console: Console) -> list[dict[str, float]]:
    cases = ("from nothing", "one join", "one leave")
    table = Table("nodes", *(title for case in cases for title in (f"{case}: median", "worst", "CPU median")))
    rows = []
    for count in PLANNER_SIZES:
        spent: dict[str, list[tuple[float, float]]] = {case: [] for case in cases}
        for seed in range(rounds):
            nodes = fleet(count + 1, seed)
            settled = hosting(nodes[:-1], place([NEED], nodes[:-1]))
            for case, devices in zip(cases, (nodes[:-1], [*settled, nodes[-1]], settled[1:]), strict=True):
                now = [NodeNow(node=node.node, asked=node.hosted, ready=node.hosted) for node in devices]
                began = time.perf_counter(), time.process_time()
                plan(now, place([NEED], devices).stages)
                spent[case].append(((time.perf_counter() - began[0]) * 1000, (time.process_time() - began[1]) * 1000))
        row: dict[str, float] = {"nodes": count}
        for case, values in spent.items():
            wall, cpu = zip(*values, strict=True)
            row |= {f"{case}: median_ms": statistics.median(wall), f"{case}: worst_ms": max(wall)}
            row[f"{case}: cpu_median_ms"] = statistics.median(cpu)
        rows.append(row)
        table.add_row(str(count), *(f"{value:.0f} ms" for value in list(row.values())[1:]))
    console.print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--milp-s", type=float, default=20.0, help="time limit of each programme")
    parser.add_argument("--milp-seeds", type=int, default=5)
    parser.add_argument("--churn-h", type=float, default=4.0)
    parser.add_argument("--planner-rounds", type=int, default=7)
    parser.add_argument(
        "--only", nargs="+", choices=("throughput", "milp", "churn", "planner"), help="measure only these"
    )
    chosen = parser.parse_args()
    console = Console(width=140)
    parts: dict[str, Callable[[], object]] = {
        "throughput": lambda: throughputs(chosen.seeds, console),
        "milp": lambda: against_milp(chosen.milp_seeds, chosen.milp_s, console),
        "churn": lambda: churned(chosen.churn_h, console),
        "planner": lambda: planner(chosen.planner_rounds, console),
    }
    results = json.loads(RESULTS.read_text()) if chosen.only and RESULTS.exists() else {}
    results |= {name: measure() for name, measure in parts.items() if name in (chosen.only or parts)}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
