"""How sessions find their way through a cell: throughput at saturation, hops, latency against Petals, churn, speed.

    python benchmarks/routing.py [--only saturation,hops,latency,churn,choice] [--sizes 15,25,50,100,300,1000]

Method: fleets and model of `benchmarks/placement.py` (speeds lognormal with a factor of 10 between the 5th and the 95th
percentile, memory for an eighth to all of a 32-layer model), placed by the real `place`, routed by the coordinator's
real `Router`, in the event-driven `simulator/cell_model.py`: every token of every session visits its hops, every device
computes calls of up to 16 rows (1 row 1.0, 4 rows 1.7, 8 rows 2.6, 16 rows 4.4), round trips are 6 to 34 ms by place,
heartbeats come every 10 s. Answers are lognormal with a median of 40 tokens; there are no prompts. A device's rate p is
the one at 16 rows; the bound is the sum of p by the layers of work of a token (32 and 4.4 for the head).

- `saturation`: a fixed number of sessions is always open, `SESSIONS_A_NODE` for each device. `placed` is the maximum
  flow of the placement by the bound, `served` what was served by the bound, `routed` the quotient.
- `hops`: sessions arrive at 87 % of what the placement can serve. The fewest hops are those of a linear programme in
  HiGHS: of any flow over partial spans that serves what was served, no device above its rate. It knows nothing of
  chance, queues or batches, so that no router can reach it near saturation.
- `latency`: sessions arrive at 80 % of what the placement can serve. Petals' rule is Dijkstra's over round trips and
  compute of one row, with room in the cache but without queues, by every client for itself; same placement, same
  sessions. A device has cache for `CACHE_SESSIONS` sessions over all its layers. `p99` of seconds a token over tokens,
  and over sessions (a session's mean).
- `churn`: as saturation; devices leave for good after an exponential time with a median of two hours, and a fresh one
  takes the place of each and serves once its files are fetched at 12.5 MB/s. The bound counts devices that download.
- `choice`: CPU time of `Router.route` for a new session with 300 devices at 80 % load, wall time beside it (other work
  on the machine counts there), and the time of a refresh of the weights.

Results: a table of ratios beside their goals, and JSON in `benchmarks/results/routing.json`, where a run replaces the
rows that it measured.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import highspy
import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fallow.coordinator.router import Router
from fallow.domain.fleet import Hop, RouteReply, RouteRequest, Speed
from fallow.domain.ids import NodeId
from fallow.domain.model import Span, StageSpec
from fallow.policy.flow import throughput_of_sets
from fallow.policy.placement import place
from fallow.policy.placement_inputs import ModelNeed, NodeRoom
from fallow.policy.routing import Carrier, ModelShape, RoutingRules, kv_bytes
from fallow.policy.routing_flow import runs_of
from fallow.policy.speed import layers_per_s
from fallow.simulator.cell_model import MODEL, Asked, CellModel, Machine, Seen

RESULTS = Path(__file__).parent / "results" / "routing.json"
MIB = 1 << 20
NEED = ModelNeed(
    model=MODEL,
    layer_bytes=(118 * MIB,) * 32,
    embedding_bytes=525 * MIB,
    head_bytes=525 * MIB,
    kv_bytes_per_token_layer=8192,
)
SHAPE = ModelShape(layer_count=32, kv_bytes_per_token_layer=8192, head_layers=NEED.work(NEED.whole) - 32)
WORK = [1.0] * 31 + [1.0 + SHAPE.head_layers]
SPEED_SIGMA = math.log(10) / (2 * 1.645)
LAYER_S = 0.004
TOKENS_MEDIAN, TOKENS_SIGMA = 40, 0.6
TOKENS_MEAN = TOKENS_MEDIAN * math.exp(TOKENS_SIGMA**2 / 2)
RESERVE_TOKENS = 256
SESSIONS_A_NODE = 48
CACHE_SESSIONS = 512
GATEWAYS = 16
HEARTBEAT_S = 10.0
POLL_S = 0.1
"""How often new heartbeats are looked for, to settle promises."""
DOWNLINK_BYTES_PER_S = 12_500_000.0
MEDIAN_STAY_S = 7200.0
CACHE_AMPLE_BYTES = 1 << 44

Floats = NDArray[np.float64]


# --- the cell -------------------------------------------------------------------------------------


class World:
    """A placed fleet."""

    def __init__(self, count: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.rooms = [self.room(index, draw) for index in range(count)]
        began_s = time.perf_counter()
        self.pieces = pieces_of(self.rooms)
        self.place_s = time.perf_counter() - began_s
        at = draw.uniform(0, 1, (count + GATEWAYS, 2))
        self.rtt_s = 0.006 + 0.02 * np.hypot(*(at[:, None] - at[None]).transpose(2, 0, 1))
        np.fill_diagonal(self.rtt_s, 0.0)
        self.rates = np.array([layers_per_s(speed_of(room), LAYER_S) for room in self.rooms])
        self.bound = float(self.rates.sum() / sum(WORK))
        self.flow = flow_of(self.pieces, self.rates)

    @staticmethod
    def room(index: int, draw: np.random.Generator) -> NodeRoom:
        return NodeRoom(
            node=NodeId(f"{index:064x}"),
            layer_s=LAYER_S / math.exp(draw.normal(0, SPEED_SIGMA)),
            weights_bytes=round(draw.uniform(1 / 8, 1) * NEED.whole_bytes),
            kv_bytes=1 << 40,
            downlink_bytes_per_s=DOWNLINK_BYTES_PER_S,
        )

    def machines(self, cache_sessions: int | None) -> list[Machine]:
        return [machine_of(room, held, cache_sessions) for room, held in zip(self.rooms, self.pieces, strict=True)]


def pieces_of(rooms: Sequence[NodeRoom]) -> list[tuple[Span, ...]]:
    placed = place([NEED], rooms)
    return [stages[0].pieces if (stages := placed.stages[room.node]) else () for room in rooms]


def speed_of(room: NodeRoom) -> Speed:
    one = room.layer_s
    return Speed(layer_s_1=one, layer_s_4=1.7 * one, layer_s_8=2.6 * one)


def machine_of(room: NodeRoom, held: tuple[Span, ...], cache_sessions: int | None) -> Machine:
    layers = Span(0, sum(piece.layer_count for piece in held))
    room_bytes = (
        CACHE_AMPLE_BYTES if cache_sessions is None else cache_sessions * kv_bytes(layers, RESERVE_TOKENS, SHAPE)
    )
    return Machine(speed=speed_of(room), pieces=held, kv_bytes=room_bytes)


def flow_of(pieces: Sequence[tuple[Span, ...]], rates: Floats) -> float:
    edges = sorted({0, 32, *(edge for held in pieces for piece in held for edge in (piece.first, piece.last))})
    parts = [Span(first, last) for first, last in pairwise(edges)]
    held = [[any(piece.covers(part) for piece in mine) for part in parts] for mine in pieces]
    return float(throughput_of_sets(held, rates, [NEED.work(part) for part in parts]).rows_per_s)


def asking(seed: int) -> Callable[[], Asked]:
    draw = random.Random(seed)
    return lambda: Asked(
        draw.randrange(GATEWAYS), max(1, round(draw.lognormvariate(math.log(TOKENS_MEDIAN), TOKENS_SIGMA)))
    )


# --- routers --------------------------------------------------------------------------------------


class Ours:
    """The coordinator's router, refreshed and told of heartbeats as the coordinator does it."""

    def __init__(self, rules: RoutingRules | None = None) -> None:
        self.rules = rules or RoutingRules()
        self.router = Router(self.rules, HEARTBEAT_S)
        self.refreshed_s = self.polled_s = -math.inf
        self.told: dict[NodeId, Carrier] = {}
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []
        self.refresh_s: list[float] = []

    def __call__(self, request: RouteRequest, carriers: Mapping[NodeId, Carrier], now_s: float) -> RouteReply:
        if now_s - self.refreshed_s >= self.rules.refresh_s:
            began_s = time.perf_counter()
            self.router.refresh({MODEL: (SHAPE, carriers)})
            self.refresh_s.append(time.perf_counter() - began_s)
            self.refreshed_s = now_s
        if now_s - self.polled_s >= POLL_S:
            self.polled_s = now_s
            for node, carrier in carriers.items():
                if self.told.get(node) is not carrier:
                    self.told[node] = carrier
                    self.router.settle(node, now_s)
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        reply = self.router.route(request, SHAPE, carriers, now_s)
        self.cpu_s.append(time.thread_time() - cpu_s)
        self.wall_s.append(time.perf_counter() - wall_s)
        return reply


class Petals:
    """Every client takes the path with the least round trips and compute of one row; servers without room are left out.

    As in Petals' `RemoteSequenceManager` with `mode="min_latency"`: a graph of blocks and servers, no queue term.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._chains: dict[tuple[NodeId, frozenset[NodeId]], tuple[Hop, ...]] = {}
        self.rooms: Callable[[], Mapping[NodeId, int]] = dict
        """The room that servers have now. Petals' clients learn of it later: this is in its favour."""

    def __call__(self, request: RouteRequest, carriers: Mapping[NodeId, Carrier], now_s: float) -> RouteReply:
        assert request.origin is not None
        need = {
            node: kv_bytes(Span(0, carrier.stage.layer_count), request.reserve_tokens, SHAPE)
            for node, carrier in carriers.items()
        }
        room = self.rooms()
        full = frozenset(node for node in carriers if room[node] < need[node])
        key = (request.origin, full)
        if key not in self._chains:
            self._chains[key] = self._shortest(request.origin, [c for n, c in carriers.items() if n not in full])
        return RouteReply(hops=self._chains[key])

    def _shortest(self, origin: NodeId, carriers: Sequence[Carrier]) -> tuple[Hop, ...]:
        """Dijkstra's over (edge, server), in the order of edges, all servers of an edge at once."""
        if not carriers:
            return ()
        index = [int(carrier.node, 16) for carrier in carriers]
        half = self._world.rtt_s[np.ix_(index, index)] / 2
        to_client = self._world.rtt_s[int(origin, 16), index] / 2
        layer = np.array([carrier.speed.layer_s_1 if carrier.speed else LAYER_S for carrier in carriers])
        runs = [runs_of(carrier.stage.pieces, 10**6) or [] for carrier in carriers]
        edges = sorted({0, *(run.last for mine in runs for run in mine)})
        best = {edge: np.full(len(carriers), np.inf) for edge in edges}
        came: dict[tuple[int, int], tuple[int, int]] = {}
        for edge in edges:
            if edge == 0:
                entry, before = to_client, np.full(len(carriers), -1)
            else:
                ways = best[edge][:, None] + half
                np.fill_diagonal(ways, np.inf)
                entry, before = ways.min(axis=0), ways.argmin(axis=0)
            for server, mine in enumerate(runs):
                for run in mine:
                    work = run.layer_count + (SHAPE.head_layers if run.last == 32 else 0.0)
                    cost = entry[server] + work * layer[server]
                    if run.first == edge and cost < best[run.last][server]:
                        best[run.last][server] = cost
                        came[run.last, server] = (edge, int(before[server]))
        if 32 not in best or not np.isfinite(best[32]).any():
            return ()
        edge, server = 32, int(np.argmin(best[32] + to_client))
        hops: list[Hop] = []
        while edge:
            start, before_server = came[edge, server]
            hops.append(Hop(address=carriers[server].address, span=Span(start, edge)))
            edge, server = start, before_server
        return tuple(reversed(hops))


# --- yardstick ------------------------------------------------------------------------------------


def fewest_hops_lp(world: World, rows_per_s: float) -> float:
    """The fewest hops a token, of any flow that serves so many tokens a second: a linear programme in HiGHS."""
    solver = highspy.Highs()
    solver.silent()
    kinds: dict[tuple[Span, ...], float] = {}
    for held, rate in zip(world.pieces, world.rates, strict=True):
        kinds[held] = kinds.get(held, 0.0) + float(rate)
    out: dict[int, list[Any]] = {}
    into: dict[int, list[Any]] = {}
    every: list[Any] = []
    for held, rate in kinds.items():
        done = []
        for run in runs_of(held, 10**6) or []:
            share = solver.addVariable(lb=0)
            every.append(share)
            out.setdefault(run.first, []).append(share)
            into.setdefault(run.last, []).append(share)
            done.append(NEED.work(run) * share)
        if done:
            solver.addConstr(sum(done) <= rate / rows_per_s)
    for edge in sorted(out):
        solver.addConstr(sum(out[edge]) - sum(into.get(edge, [])) == (1.0 if edge == 0 else 0.0))
    solver.minimize(sum(every))
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return math.nan
    return float(solver.getInfo().objective_function_value)


# --- runs -----------------------------------------------------------------------------------------


def saturated(world: World, seconds: float, sessions_a_node: float = SESSIONS_A_NODE) -> tuple[Seen, Ours]:
    router = Ours()
    cell = CellModel(world.machines(None), world.rtt_s, SHAPE, router, RESERVE_TOKENS, HEARTBEAT_S, GATEWAYS)
    cell.keep_running(round(sessions_a_node * len(world.rooms)), asking(1))
    cell.run(seconds / 2)
    cell.reset()
    cell.run(seconds)
    return cell.seen, router


def offered(world: World, load: float, seconds: float, router: Any, cache_sessions: int | None) -> Seen:
    """Poisson arrivals at `load` of what the placement can serve; the second half is seen."""
    cell = CellModel(world.machines(cache_sessions), world.rtt_s, SHAPE, router, RESERVE_TOKENS, HEARTBEAT_S, GATEWAYS)
    if isinstance(router, Petals):
        router.rooms = cell.kv_free
    draw, ask, at_s = random.Random(2), asking(3), 0.0
    while at_s < seconds:
        at_s += draw.expovariate(load * world.flow / TOKENS_MEAN)
        cell.offer(at_s, ask())
    cell.run(seconds / 2)
    cell.reset()
    cell.run(seconds)
    return cell.seen


def churned(world: World, seconds: float) -> tuple[float, Seen]:
    """Served by the bound over time, and what was seen."""
    router = Ours()
    cell = CellModel(world.machines(None), world.rtt_s, SHAPE, router, RESERVE_TOKENS, HEARTBEAT_S, GATEWAYS)
    draw = np.random.default_rng(7)
    rooms, pieces, rates = list(world.rooms), list(world.pieces), world.rates.copy()
    history = [(0.0, float(rates.sum()))]

    def leave(index: int) -> Callable[[], None]:
        def act() -> None:
            cell.fail(index)
            rooms[index] = World.room(index, draw)
            hosted = [
                msgspec.structs.replace(room, hosted=() if other == index else stages_of(pieces[other]))
                for other, room in enumerate(rooms)
            ]
            wanted = pieces_of(hosted)
            rates[index] = layers_per_s(speed_of(rooms[index]), LAYER_S)
            history.append((cell.now_s, float(rates.sum())))
            for other, held in enumerate(wanted):
                if other == index or (held != pieces[other] and not cell.use_of(other)):
                    pieces[other] = held
                    fetch_s = sum(NEED.bytes_of(piece) for piece in held) / DOWNLINK_BYTES_PER_S
                    cell.at(cell.now_s + fetch_s, ready(other, rooms[other], held))
            cell.at(cell.now_s + draw.exponential(MEDIAN_STAY_S / math.log(2)), leave(index))

        return act

    def ready(index: int, room: NodeRoom, held: tuple[Span, ...]) -> Callable[[], None]:
        def act() -> None:
            if rooms[index] is room and pieces[index] == held:
                cell.change(index, machine_of(room, held, None))

        return act

    for index in range(len(rooms)):
        cell.at(float(draw.exponential(MEDIAN_STAY_S / math.log(2))), leave(index))
    cell.keep_running(SESSIONS_A_NODE * len(rooms), asking(1))
    cell.run(120.0)
    cell.reset()
    cell.run(seconds)
    ends = [*(at for at, _ in history[1:]), seconds]
    area = sum(rate * max(0.0, end - max(at, 120.0)) for (at, rate), end in zip(history, ends, strict=True))
    return cell.seen.tokens * sum(WORK) / area, cell.seen


def stages_of(held: tuple[Span, ...]) -> tuple[Any, ...]:
    return (StageSpec(model=MODEL, pieces=held),) if held else ()


# --- report ---------------------------------------------------------------------------------------


def quantile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(values, share)) if values else math.nan


class Report:
    """Rows of the table, and the figures behind them."""

    def __init__(self) -> None:
        self.table = Table("what", "cell", "measured", "goal", "met", "beside it")
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, cell: str, value: float, goal: str, met: bool, **beside: float) -> None:
        told = ", ".join(f"{name} {figure:.3g}" for name, figure in beside.items())
        self.table.add_row(what, cell, f"{value:.3f}", goal, "yes" if met else "NO", told)
        self.rows.append({"what": what, "cell": cell, "value": value, "goal": goal, "met": met, **beside})
        print(f"{what:34} {cell:14} {value:8.3f}  goal {goal:8} {'yes' if met else 'NO':4} {told}", flush=True)


def report_saturation(report: Report, sizes: Sequence[int]) -> None:
    for count in sizes:
        world = World(count, seed=count)
        seconds = 240.0 if count <= 100 else 150.0 if count <= 300 else 200.0
        seen, _ = saturated(world, seconds)
        served, goal = seen.tokens_per_s / world.bound, 0.93 if count < 25 else 0.95
        report.add(
            "saturation: served by bound", f"{count} nodes", served, f">= {goal}", served >= goal,
            placed=world.flow / world.bound, routed=seen.tokens_per_s / world.flow, hops=seen.hops_mean,
        )  # fmt: skip


def report_hops(report: Report, sizes: Sequence[int]) -> None:
    for count in sizes:
        world = World(count, seed=count)
        seen = offered(world, 0.87, 240.0, Ours(), None)
        least = fewest_hops_lp(world, seen.tokens_per_s)
        ratio = seen.hops_mean / least
        report.add(
            "hops by the fewest, 87 % load", f"{count} nodes", ratio, "<= 1.1", ratio <= 1.1,
            hops=seen.hops_mean, fewest=least, served_by_flow=seen.tokens_per_s / world.flow,
        )  # fmt: skip


def report_latency(report: Report, sizes: Sequence[int]) -> None:
    for count in sizes:
        world = World(count, seed=count)
        ours = offered(world, 0.8, 240.0, Ours(), CACHE_SESSIONS)
        theirs = offered(world, 0.8, 240.0, Petals(world), CACHE_SESSIONS)
        for what, one, other in (
            ("token", ours.token_s, theirs.token_s),
            ("session", ours.session_token_s, theirs.session_token_s),
        ):
            ratio = quantile(one, 0.99) / quantile(other, 0.99)
            report.add(
                f"latency p99 by Petals', {what}", f"{count} nodes", ratio, "<= 0.5", ratio <= 0.5,
                ours_s=quantile(one, 0.99), petals_s=quantile(other, 0.99), ours_p50_s=quantile(one, 0.5),
                petals_p50_s=quantile(other, 0.5), ours_served=ours.tokens_per_s / world.flow,
                petals_served=theirs.tokens_per_s / world.flow,
                ours_refused=ours.refused, petals_refused=theirs.refused,
            )  # fmt: skip


def report_churn(report: Report, count: int, seconds: float) -> None:
    world = World(count, seed=count)
    ratio, seen = churned(world, seconds)
    report.add(
        "churn: served by bound", f"{count} nodes", ratio, ">= 0.90", ratio >= 0.9, placed=world.flow / world.bound,
        repairs=seen.repairs, stall_p95_s=quantile(seen.stalls_s, 0.95), finished=seen.finished,
    )  # fmt: skip


def report_choice(report: Report) -> None:
    world = World(300, seed=300)
    router = Ours()
    offered(world, 0.8, 60.0, router, CACHE_SESSIONS)
    wall, cpu = quantile(router.wall_s, 0.99) * 1e3, quantile(router.cpu_s, 0.99) * 1e3
    report.add(
        "choosing a chain, p99 in ms", "300 nodes", cpu, "< 1", cpu < 1, wall_p99_ms=wall,
        cpu_p50_ms=quantile(router.cpu_s, 0.5) * 1e3, chains=len(router.cpu_s),
        refresh_ms=quantile(router.refresh_s, 0.5) * 1e3,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="choice,latency,hops,churn,saturation")
    parser.add_argument("--sizes", default="15,25,50,100,300,1000")
    parser.add_argument("--churn-s", type=float, default=1200.0)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    report = Report()
    small = [size for size in sizes if size <= 300]
    steps: dict[str, Callable[[], None]] = {
        "choice": lambda: report_choice(report),
        "latency": lambda: report_latency(report, [size for size in small if size >= 25]),
        "hops": lambda: report_hops(report, [size for size in small if size >= 25]),
        "churn": lambda: report_churn(report, 50, arguments.churn_s),
        "saturation": lambda: report_saturation(report, sizes),
    }
    for name in arguments.only.split(","):
        steps[name]()
    Console(width=200).print(report.table)
    RESULTS.parent.mkdir(exist_ok=True)
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = {(row["what"], row["cell"]): row for row in [*before, *report.rows]}
    RESULTS.write_text(json.dumps(list(rows.values()), indent=1))


if __name__ == "__main__":
    main()
