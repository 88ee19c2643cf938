"""A block of cells through all of a fast run, in steps of time.

In each step: who went and came (`lives.py`, `forced_away`); who comes is placed, fetches, serves (`fast_place.py`);
what the ready devices can serve (`flow.throughput`); what is asked, served and refused, and how long it takes
(`fast_load.py`). A block's figures are a function of the block, the scenario and the seed.

What happens to answers when a device goes: those on it are mended, which takes a stall (`STALLS`); they fail when no
chain is left in the cell for longer than the gateway tries.
"""

import hashlib
from typing import Final, NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt

from fallow.gateway.chain import REPAIR_TIMEOUT_S
from fallow.policy.admission import AdmissionRules
from fallow.policy.availability_table import OutlookTable
from fallow.policy.coverage import bottleneck
from fallow.policy.placement_inputs import PlacementRules
from fallow.simulator.cell import LEASE_TTL_S
from fallow.simulator.devices import DRAIN_TIMEOUT_S, Departure
from fallow.simulator.fast_figures import Tally, empty, record
from fallow.simulator.fast_fleet import MEAN_JITTER, MEAN_PAIR, Block, draw_figures
from fallow.simulator.fast_load import (
    FULL_ROWS,
    NORMAL_TAIL,
    TAIL,
    TAIL_SHARE,
    Answers,
    Chains,
    answer,
    demand_of,
    first_tokens_at,
    gaps_at,
)
from fallow.simulator.fast_place import Placed, hops_of
from fallow.simulator.model import CONTEXT_TOKENS
from fallow.simulator.population import DEPARTURES
from fallow.simulator.scenario import EventKind, Network, Population, Scenario
from fallow.simulator.traffic import FOLLOW_UP

Floats = npt.NDArray[np.float64]

TURNS: Final = 1 / (1 - FOLLOW_UP)
"""Questions for each conversation."""
FOLLOW_UP_ROWS: Final = 0.25
"""Rows of a prompt that goes on with a conversation, by those of a first one; the rest is kept (`traffic.py`)."""
STALLS: Final = {Departure.POLITE: 0.45, Departure.KILLED: 0.9, Departure.SILENT: 3.3}
"""Median pause of an answer that lost a device in each way. Fitted."""
STALL_SPREAD: Final = 0.4
"""Standard deviation of its logarithm."""
TAKEOVER_S: Final = LEASE_TTL_S + 1.0
"""Without a leading coordinator, new answers wait as long; running ones do not notice."""
KV_PACKING: Final = 0.8
"""Of the KV room, what whole sessions fill."""
ROT_STEPS: Final = 20
HOPS_OVER_SPANS: Final = 1.0
"""Changes from device to device that the router takes, by those that whole spans would take. Fitted."""


class Plan(NamedTuple):
    """How a run is cut in time."""

    until_s: float
    step_s: float
    bin_s: float


def simulate(block: Block, scenario: Scenario, seed: int, plan: Plan, table: OutlookTable) -> tuple[Tally, str]:
    """The block's figures, and a digest of them."""
    return _Run(block, scenario, seed, plan, table).run()


class _Run:
    """One block under way."""

    def __init__(self, block: Block, scenario: Scenario, seed: int, plan: Plan, table: OutlookTable) -> None:
        self.block, self.scenario, self.plan = block, scenario, plan
        self.rng = np.random.default_rng([seed, crc32(b"fast"), block.number])
        self.figures = draw_figures(scenario, block, seed)
        self.placed = Placed(block, self.figures, scenario.model, table, PlacementRules())
        self.rules = AdmissionRules()
        self.tally = empty(int(np.ceil(plan.until_s / plan.bin_s - 1e-9)))
        model = scenario.model
        head = model.head_bytes / model.layer_bytes
        self.demand = demand_of(scenario.traffic, model.layer_count + head, model.layer_count, CONTEXT_TOKENS // 4)
        rows = (self.demand.prompt_tokens * (1 - FOLLOW_UP * (1 - FOLLOW_UP_ROWS)), self.demand.completion_tokens)
        self.mixed = self.demand._replace(prompt_tokens=rows[0])
        """The demand of first questions and of those that follow together."""
        self.sizes = np.bincount(block.cell, minlength=block.cells)
        self.edge_s, self.cross_share, self.cross_s, self.far = _distances(scenario, block)
        self.waiting = np.zeros(block.cells)
        self.running = np.zeros(block.cells)
        self.outlast = np.zeros(block.cells)
        """Share of the answers under way that do not end while a device drains."""
        self.rot = self._rotten()
        self.on = block.initially.copy()
        self.since_s, self.leaves_at_s = block.since_s.copy(), block.leaves_at_s.copy()
        self.away = np.zeros(len(block.cell), np.int64)
        self.away_edges = _away_edges(block)
        self.next_edge = self.next_away = 0
        self.here = np.zeros(len(block.cell), np.bool_)

    # --- time -------------------------------------------------------------------------------------

    def run(self) -> tuple[Tally, str]:
        step_s = self.plan.step_s
        for index in range(int(np.ceil(self.plan.until_s / step_s - 1e-9))):
            self._step(index * step_s, min(step_s, self.plan.until_s - index * step_s))
        digest = hashlib.blake2b(digest_size=16)
        for name in ("started", "orders", "device_s", "begun", "file_bytes"):
            digest.update(np.round(getattr(self.tally, name), 3).tobytes())
        return self.tally, digest.hexdigest()

    def _step(self, at_s: float, lasts_s: float) -> None:
        bin_index = int(at_s / self.plan.bin_s + 1e-9)
        orders, moved = self.placed.orders, self.placed.bytes_moved
        lost = self._come_and_go(at_s)
        self._slow_down(at_s)
        if at_s == 0:
            self.placed.replan(at_s, self.here)
            self.placed.furnish(self.rng, self.here)
            orders, moved = 0, 0.0
        else:
            self.tally.steps[0] += self.placed.replan(at_s, self.here)
            self.placed.advance(self.plan.step_s)
        chains = self._chains()
        answers, asked = self._answer(chains, at_s, lasts_s)
        self._lost(lost, chains, bin_index)
        self._add(chains, answers, asked, at_s, lasts_s, bin_index)
        self.tally.orders[bin_index] += self.placed.orders - orders
        self.tally.file_bytes[bin_index] += self.placed.bytes_moved - moved

    def _come_and_go(self, at_s: float) -> Floats:
        """Everybody's state at this time. How many of each cell's working sessions lost a device, by rate."""
        block = self.block
        until = int(np.searchsorted(block.edge_s, at_s, side="right"))
        device = block.edge_device[self.next_edge : until]
        odd = np.bincount(device, minlength=len(self.on)) % 2 == 1
        self.on ^= odd
        self.since_s[device] = block.edge_s[self.next_edge : until]
        self.leaves_at_s[device] = block.edge_leaves_s[self.next_edge : until]
        self.next_edge = until
        times, who, sign = self.away_edges
        until = int(np.searchsorted(times, at_s, side="right"))
        np.add.at(self.away, who[self.next_away : until], sign[self.next_away : until])
        back = who[self.next_away : until][sign[self.next_away : until] < 0]
        self.since_s[back] = at_s
        self.next_away = until
        here = self.on & (self.away == 0)
        # Between two steps a device may have gone and come again: it starts anew.
        restarted = np.zeros(len(here), np.bool_)
        restarted[device] = True
        restarted[back] = True
        gone = np.flatnonzero(self.here & (~here | restarted))
        came = np.flatnonzero(here & (~self.here | restarted))
        self.here = here
        self.tally.steps[0] += len(gone) + len(came)
        lost = self._share_of(gone)
        self.placed.leave(gone)
        hour = (self.scenario.start_hour_of_week + at_s / 3600) % 168
        self.placed.join(came, hour, at_s - self.since_s[came], self.leaves_at_s[came] - at_s)
        return lost

    def _share_of(self, gone: npt.NDArray[np.int64]) -> Floats:
        """[cells] the share of the work that those who go were doing."""
        placed = self.placed
        serving = gone[placed.serves_last[gone] > placed.serves_first[gone]]
        rate = 1.0 / (self.figures.layer_s[serving] * placed.slowdown[serving])
        total = placed.ready.sum(axis=(1, 2))
        part = np.bincount(self.block.cell[serving], rate, minlength=self.block.cells)
        return np.asarray(np.minimum(part / np.maximum(total, 1e-9), 1.0))

    # --- what serves ------------------------------------------------------------------------------

    def _chains(self) -> Chains:
        placed, cells = self.placed, self.block.cells
        ready = np.flatnonzero(placed.serves_last > placed.serves_first)
        cell = self.block.cell[ready]
        count = np.maximum(np.bincount(cell, minlength=cells), 1)

        def mean(values: Floats) -> Floats:
            return np.asarray(np.bincount(cell, values[ready], minlength=cells) / count)

        rows_per_s = bottleneck(placed.ready, placed.parts.work).rows_per_s
        rate = placed.ready.sum(axis=(1, 2))
        row_bytes = self.scenario.model.activation_bytes_per_row
        row_s = row_bytes * mean(1 / self.figures.uplink)
        hops = hops_of(placed.ready, placed.parts.work)
        kv_token = self.scenario.model.kv_bytes_per_token_layer * self.scenario.model.layer_count
        reserve = self.demand.prompt_tokens + self.demand.completion_tokens
        leg = mean(self.figures.delay_s) * (1 - self.cross_share) + self.cross_s * self.cross_share
        return Chains(
            capacity_tokens_per_s=np.where(rows_per_s > 1e-9, rows_per_s * FULL_ROWS, 0.0),
            layer_s=np.where(rate > 0, count / np.maximum(rate, 1e-9), 0.0),
            hops=1 + (hops - 1) * HOPS_OVER_SPANS,
            leg_s=leg + row_s + row_bytes * mean(1 / self.figures.downlink),
            edge_s=self.edge_s,
            row_s=row_s,
            kv_sessions=np.bincount(cell, KV_PACKING * placed.kv_room[ready], minlength=cells).astype(np.float64)
            / (kv_token * reserve),
        )

    def _rotten(self) -> list[tuple[float, float, float, npt.NDArray[np.bool_]]]:
        """Each slow rot: when it begins, how long it takes, by which factor, and whom it takes."""
        found = []
        for number, event in enumerate(self.scenario.events):
            if event.kind is not EventKind.SLOW_ROT:
                continue
            meant = np.array([_meant(event.population, event.region, p) for p in self.scenario.populations])
            rng = np.random.default_rng([crc32(b"rot"), number, self.block.number])
            chosen = meant[self.block.population] & (rng.random(len(self.block.cell)) < event.share)
            found.append((event.at_s, event.duration_s, event.factor, chosen))
        return found

    def _slow_down(self, at_s: float) -> None:
        if not self.rot:
            return
        slowdown = np.ones(len(self.block.cell))
        for begins_s, duration_s, factor, chosen in self.rot:
            step = np.clip(np.floor((at_s - begins_s) / max(duration_s, 1e-9) * ROT_STEPS), 0, ROT_STEPS) / ROT_STEPS
            slowdown[chosen] *= factor**step
        if not np.array_equal(slowdown, self.placed.slowdown):
            self.placed.slow_down(slowdown)

    # --- what is asked ------------------------------------------------------------------------------

    def _answer(self, chains: Chains, at_s: float, lasts_s: float) -> tuple[Answers, Floats]:
        traffic = self.scenario.traffic
        hour = int(self.scenario.start_hour_of_week + (at_s + lasts_s / 2) / 3600) % 24
        mean = sum(traffic.by_hour) / 24
        rate = traffic.sessions_per_hour_per_device / 3600 * (traffic.by_hour[hour] / mean if mean else 0.0)
        for event in self.scenario.events:
            if event.kind is EventKind.FLASH_CROWD:
                rate *= 1 + (event.factor - 1) * _overlap(event.at_s, event.duration_s, at_s, lasts_s)
        asked = self.rng.poisson(rate * TURNS * self.sizes * lasts_s).astype(np.float64)
        cut = self._cut(at_s, lasts_s)
        open_share = 1 - cut
        answers = answer(chains, self.mixed, asked * open_share, self.waiting, lasts_s, self.rules)
        refused = answers.refused + asked * cut
        self.waiting = answers.waiting
        return answers._replace(refused=refused), asked

    def _cut(self, at_s: float, lasts_s: float) -> Floats:
        """[cells] the share of the step in which a partition is between a cell's devices and its gateways."""
        share = np.zeros(self.block.cells)
        for event in self.scenario.events:
            if event.kind is EventKind.PARTITION and event.region is not None:
                between = self.far.get(event.region, np.zeros(self.block.cells))
                share = np.maximum(share, between * _overlap(event.at_s, event.duration_s, at_s, lasts_s))
        return share

    def _lost(self, lost: Floats, chains: Chains, bin_index: int) -> None:
        """Answers whose device went: mended, or failed where nothing is left to mend them with."""
        hit = np.minimum(self.running * lost * chains.hops, self.running)
        dead = chains.capacity_tokens_per_s <= 0
        failed = np.where(dead, self.running, 0.0)
        mended = float(hit[~dead].sum())
        self.tally.failed[bin_index] += float(failed.sum())
        drained = float((hit * self.outlast)[~dead].sum())
        for kind, share in DEPARTURES:
            count = share * (drained if kind is Departure.POLITE else mended)
            values = STALLS[kind] * np.exp(STALL_SPREAD * NORMAL_TAIL)
            record(self.tally.stalls[bin_index], values, count * TAIL_SHARE)
            self.tally.repairs[bin_index] += count
        self.running[dead] = 0.0

    def _partition_lost(self, at_s: float, lasts_s: float, bin_index: int) -> None:
        """Answers that a partition cuts: they wait for its end, and fail when that takes too long."""
        for event in self.scenario.events:
            begins = event.kind is EventKind.PARTITION and at_s <= event.at_s < at_s + lasts_s
            if not begins or event.region is None:
                continue
            hit = float((self.running * self.far.get(event.region, np.zeros(self.block.cells))).sum())
            if event.duration_s > REPAIR_TIMEOUT_S:
                self.tally.failed[bin_index] += hit
            else:
                record(self.tally.stalls[bin_index], np.array([event.duration_s]), np.array([hit]))

    # --- what came of it ----------------------------------------------------------------------------

    def _add(
        self, chains: Chains, answers: Answers, asked: Floats, at_s: float, lasts_s: float, index: int
    ) -> None:  # fmt: skip
        self._partition_lost(at_s, lasts_s, index)
        self.running = answers.running
        answer_s = self.running * lasts_s / np.maximum(answers.begun, 1e-9)
        self.outlast = np.exp(-DRAIN_TIMEOUT_S / np.maximum(answer_s, 1e-9))
        tally, tokens = self.tally, self.demand.completion_tokens
        tally.device_s[index] += float(self.here.sum()) * lasts_s
        tally.capacity[index] += float(chains.capacity_tokens_per_s.sum()) * lasts_s
        tally.offered[index] += float(asked.sum()) * tokens
        tally.served[index] += float(answers.begun.sum()) * tokens
        tally.started[index] += float(asked.sum())
        tally.begun[index] += float(answers.begun.sum())
        tally.refused[index] += float(answers.refused.sum())
        tally.hops[index] += float((answers.begun * chains.hops).sum())
        used = np.flatnonzero(answers.begun > 0)
        if not len(used):
            return
        begun = answers.begun[used, None]
        gaps, shares = gaps_at(answers)
        record(tally.gaps[index], gaps[used], begun * tokens * shares[used])
        late_s = self._takeover_s(at_s, lasts_s)
        first = self.demand
        for share, rows in ((1 - FOLLOW_UP, 1.0), (FOLLOW_UP, FOLLOW_UP_ROWS)):
            lengths = self.mixed._replace(prompt_median=first.prompt_median * rows)
            values = first_tokens_at(answers, lengths)[used] + late_s
            record(tally.first[index], values, begun * share * TAIL_SHARE)

    def _takeover_s(self, at_s: float, lasts_s: float) -> Floats:
        """[len(TAIL)] what a coordinator's loss adds to the times of those who asked just then. They are spread over
        the quantiles, for whom it hits does not depend on the prompt."""
        share = sum(
            _overlap(event.at_s, TAKEOVER_S, at_s, lasts_s)
            for event in self.scenario.events
            if event.kind is EventKind.COORDINATOR_LOSS
        )
        order = np.argsort(np.argsort((np.arange(len(TAIL)) * 7) % len(TAIL)))
        reached = np.cumsum(TAIL_SHARE[np.argsort(order)])[order]
        return np.where(reached <= share, TAKEOVER_S / 2, 0.0)


# --- helpers ----------------------------------------------------------------------------------------


def _overlap(begins_s: float, duration_s: float, at_s: float, lasts_s: float) -> float:
    """The share of a step that an event takes."""
    return max(0.0, min(begins_s + duration_s, at_s + lasts_s) - max(begins_s, at_s)) / lasts_s


def _meant(population: str | None, region: str | None, one: Population) -> bool:
    return population in (None, one.name) and region in (None, one.region)


def _away_edges(block: Block) -> tuple[Floats, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Beginnings (+1) and ends (-1) of forced absences by time."""
    times = np.concatenate((block.away_from_s, block.away_until_s))
    device = np.concatenate((block.away_device, block.away_device))
    sign = np.repeat(np.array([1, -1]), len(block.away_device))
    order = np.argsort(times, kind="stable")
    return times[order], device[order], sign[order]


def _rtt_s(network: Network, one: str, other: str) -> float:
    """Between two regions, as `network.py` has it."""
    known = network.regions_rtt_s
    return known.get(f"{one}/{other}", known.get(f"{other}/{one}", network.continent_rtt_s))


def _distances(scenario: Scenario, block: Block) -> tuple[Floats, Floats, Floats, dict[str, Floats]]:
    """[cells] one way between a gateway and a device; the share of a cell's pairs that are of two regions; one way
    between those; and for each region, the share of the cell that lies across a cut of it."""
    populations, network = scenario.populations, scenario.network
    regions = sorted({population.region for population in populations})
    weight = {region: sum(p.count for p in populations if p.region == region) for region in regions}
    # As `World._operator`: the first of the regions with most devices.
    operator = max(dict.fromkeys(p.region for p in populations), key=lambda region: weight[region])
    near = next(population for population in populations if population.region == operator)
    rough = (1 + network.jitter_share * MEAN_JITTER + 3 * network.loss) * MEAN_PAIR / 2
    edge = [
        rough
        * ((p.metro_rtt_s + near.metro_rtt_s) / 2 if p.region == operator else _rtt_s(network, p.region, operator))
        for p in populations
    ]
    region = np.array([regions.index(p.region) for p in populations])[block.population]
    size = np.maximum(np.bincount(block.cell, minlength=block.cells), 1)
    shares = np.stack(
        [np.bincount(block.cell[region == at], minlength=block.cells) / size for at in range(len(regions))], axis=1
    )
    edge_s = np.bincount(block.cell, rough * np.array(edge)[block.population], minlength=block.cells) / size
    cross = np.zeros(block.cells)
    for one in range(len(regions)):
        for other in range(len(regions)):
            if one != other:
                cross += shares[:, one] * shares[:, other] * _rtt_s(network, regions[one], regions[other])
    cross_share = 1 - (shares**2).sum(axis=1)
    cross_s = np.where(cross_share > 1e-9, rough * cross / np.maximum(cross_share, 1e-9), 0.0)
    far = {
        name: shares[:, at] if name != operator else 1 - shares[:, at] for at, name in enumerate(regions)
    }  # fmt: skip
    return edge_s, np.maximum(cross_share, 0.0), cross_s, far
