"""Placement in many cells at once, by the policy's own kernels: what devices hold, fetch and have ready.

Rules
- A device that comes joins as `policy/placement_spans.py` lets it join: narrow ones and those that stay first, at the
  span that earns most by `coverage.prices`, as wide as memory, KV room and patience allow. The k-th joiners of all
  cells join in one call of the kernels.
- A cell in which a part has too few holders, or that could serve clearly more than it does, is worked out anew by
  `place_spans` itself, cell by cell, at most once in `REPLAN_S` (`GAIN_S` for more throughput).
- What is placed is fetched first (a device's downlink, or its share of what the operator and its peers can send), then
  loaded, then ready. A device that moves serves its old span until then. Files stay on disks.

An outlook is taken when a device joins and not renewed before its cell is worked out anew.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from fallow.domain.fleet import OUTLOOK_HORIZONS_S, Outlook
from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import Span, StageSpec
from fallow.policy import coverage
from fallow.policy.availability_table import OutlookTable, looked_up
from fallow.policy.placement_books import WORTH_MIN, parts_of
from fallow.policy.placement_inputs import FLEETING_HORIZON, ModelNeed, NodeRoom, PlacementRules
from fallow.policy.placement_spans import place_spans
from fallow.simulator.devices import KV_SHARE
from fallow.simulator.engine_model import DISK_BYTES_PER_S, LOAD_MIN_S
from fallow.simulator.fast_fleet import Block, Figures
from fallow.simulator.scenario import SimulatedModel
from fallow.simulator.world import OPERATOR_BYTES_PER_S

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

REPLAN_S: Final = 300.0
GAIN_S: Final = 3600.0
REPLANS_PER_STEP_MAX: Final = 32
"""Cells of a block that are worked out anew in one step, those that lack most first."""
GAINS_PER_STEP_MAX: Final = 8
"""Cells of a block that are looked at for a gain in one step."""
ORDERED_AFTER_S: Final = 1.5
"""From a device's coming to its order."""
DIGEST: Final = Digest("0" * 64)


def need_of(model: SimulatedModel) -> ModelNeed:
    """The scenario's model, as placement sees it."""
    return ModelNeed(
        model=DIGEST,
        layer_bytes=(model.layer_bytes,) * model.layer_count,
        embedding_bytes=model.embedding_bytes,
        head_bytes=model.head_bytes,
        kv_bytes_per_token_layer=model.kv_bytes_per_token_layer,
    )


class Placed:
    """What the devices of a block hold. Arrays are [devices]; a span without parts (0, 0) holds nothing."""

    def __init__(
        self, block: Block, figures: Figures, model: SimulatedModel, table: OutlookTable, rules: PlacementRules
    ) -> None:
        size = len(block.cell)
        self.block, self.figures, self.table, self.rules = block, figures, table, rules
        self.need = need_of(model)
        self.parts = parts_of(self.need, rules.context_tokens)
        self.part_count = len(self.parts.spans)
        self.edges_bytes = np.concatenate(([0.0], np.cumsum(self.parts.weights)))
        self.weights_room = figures.memory_bytes * (1 - KV_SHARE)
        self.kv_room = figures.memory_bytes * KV_SHARE
        self.slowdown = np.ones(size)
        self.first, self.last = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.serves_first, self.serves_last = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.cached = np.zeros((size, self.part_count), np.bool_)
        self.share, self.steady = np.ones(size), np.ones(size, np.bool_)
        self.stay_s = np.full(size, 7200.0)
        self.survival = np.ones((size, len(OUTLOOK_HORIZONS_S)))
        self.fetching = np.zeros(size, np.bool_)
        self.left_bytes, self.left_s = np.zeros(size), np.zeros(size)
        shape = (block.cells, self.part_count, self.part_count)
        self.mass, self.count = np.zeros(shape), np.zeros(shape)
        """What is placed, for prices: speed by expected share of the next hour; number of steady devices."""
        self.ready, self.ready_count = np.zeros(shape), np.zeros(shape)
        """What serves: layers a second, and how many devices."""
        self.replanned_s = np.full(block.cells, -np.inf)
        self.gained_s = np.full(block.cells, -np.inf)
        self.orders = 0
        self.bytes_moved = 0.0

    @property
    def speed(self) -> Floats:
        return np.asarray(1.0 / (self.figures.layer_s * self.slowdown))

    # --- books ----------------------------------------------------------------------------------

    def _book(self, who: Ints, sign: int) -> None:
        cell, first, last = self.block.cell[who], self.first[who], self.last[who]
        speed = self.share[who] / (self.figures.layer_s[who] * self.slowdown[who])
        steady = self.steady[who]
        for flags in (steady, ~steady):
            chosen = np.flatnonzero(flags)
            counted = self.count if flags is steady else np.zeros_like(self.count)
            coverage.add_spans(
                self.mass, counted, cell[chosen], first[chosen], last[chosen], speed[chosen], sign
            )  # fmt: skip

    def _serve(self, who: Ints, sign: int) -> None:
        speed = 1.0 / (self.figures.layer_s[who] * self.slowdown[who])
        coverage.add_spans(
            self.ready,
            self.ready_count,
            self.block.cell[who],
            self.serves_first[who],
            self.serves_last[who],
            speed,
            sign,
        )

    def slow_down(self, slowdown: Floats) -> None:
        """Devices take so many times as long from now on: everything is booked anew."""
        self.slowdown = slowdown
        for table in (self.mass, self.count, self.ready, self.ready_count):
            table[:] = 0.0
        self._book(np.flatnonzero(self.last > self.first), 1)
        self._serve(np.flatnonzero(self.serves_last > self.serves_first), 1)

    # --- leaving ----------------------------------------------------------------------------------

    def leave(self, who: Ints) -> None:
        """Devices go. Their files stay on their disks; a fetch goes on where it was."""
        self._book(who, -1)
        self._serve(who, -1)
        self.first[who] = self.last[who] = self.serves_first[who] = self.serves_last[who] = 0
        self.fetching[who] = False
        # Sums of additions and subtractions: what is nearly nothing is nothing.
        self.mass[self.mass < 1e-6] = 0.0
        self.ready[self.ready < 1e-6] = 0.0

    # --- joining ----------------------------------------------------------------------------------

    def join(self, who: Ints, hour_of_week: float, age_s: Floats, departs_in_s: Floats) -> None:
        """Devices come and are placed."""
        if not len(who):
            return
        self._look_ahead(who, hour_of_week, age_s, departs_in_s)
        reach, worth = self._reach(who)
        room = (reach - np.arange(self.part_count)).max(axis=1)
        cell = self.block.cell[who]
        order = np.lexsort((who, -self.speed[who] * self.share[who], room, ~self.steady[who], cell))
        sorted_cell = cell[order]
        starts = np.flatnonzero(np.concatenate(([True], sorted_cell[1:] != sorted_cell[:-1])))
        turn = np.arange(len(order)) - np.repeat(starts, np.diff(np.concatenate((starts, [len(order)]))))
        by_turn = np.argsort(turn, kind="stable")
        bounds = np.concatenate(([0], np.cumsum(np.bincount(turn))))
        work = self.parts.work
        for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            rows = order[by_turn[first:last]]
            cells = cell[rows]
            mass, count = self.mass[cells], self.count[cells]
            price = coverage.prices(coverage.coverage(mass, work), coverage.holders(count), self.rules.replicas)
            start = coverage.thinnest_start(price, reach[rows], work, worth[rows])
            held = start != coverage.NOWHERE
            chosen, begin = who[rows[held]], start[held]
            self.first[chosen], self.last[chosen] = begin, reach[rows[held], begin]
            # One device a cell and turn: the books' rows are touched once each.
            self._book_once(chosen, cells[held])
        self._fetch(who[self.last[who] > self.first[who]])

    def _book_once(self, who: Ints, cells: Ints) -> None:
        speed = self.share[who] / (self.figures.layer_s[who] * self.slowdown[who])
        self.mass[cells, self.first[who], self.last[who] - 1] += speed
        self.count[cells, self.first[who], self.last[who] - 1] += self.steady[who]

    def _look_ahead(self, who: Ints, hour_of_week: float, age_s: Floats, departs_in_s: Floats) -> None:
        """Their outlooks, from what their population usually does and what they declared."""
        alive, stays_h = looked_up(
            self.table, self.block.population[who], hour_of_week, age_s / 3600, departs_in_s / 3600
        )
        self.survival[who] = alive
        self.stay_s[who] = np.maximum(stays_h * 3600.0, 1.0)
        horizons = np.array([0.0, *(at for at in OUTLOOK_HORIZONS_S if at <= 3600.0)])
        curve: Floats = np.concatenate((np.ones((len(who), 1)), alive[:, : len(horizons) - 1]), axis=1)
        self.share[who] = ((curve[:, 1:] + curve[:, :-1]) / 2 * np.diff(horizons)).sum(axis=1) / horizons[-1]
        self.steady[who] = alive[:, FLEETING_HORIZON] >= 0.5

    def _reach(self, who: Ints) -> tuple[Ints, Floats]:
        """How far each can go from each part, and what downloading leaves of its stay, as `Books.reach` and `worth`."""
        missing = np.where(self.cached[who], 0.0, self.parts.weights)
        downlink = self.figures.downlink[who]
        patience = self.stay_s[who] * downlink * self.rules.download_share_max
        parts = np.arange(self.part_count)
        reach = np.minimum(
            coverage.reach_by_room(self.parts.weights, self.weights_room[who]),
            coverage.reach_by_room(self.parts.kv, self.kv_room[who]),
        )
        reach = np.minimum(reach, np.maximum(coverage.reach_by_room(missing, patience), parts + 1))
        reach = np.maximum(reach, parts)
        edges = np.concatenate((np.zeros((len(who), 1)), np.cumsum(missing, axis=1)), axis=1)
        fetch_s = (np.take_along_axis(edges, reach, axis=1) - edges[:, :-1]) / downlink[:, None]
        return reach, np.maximum(1.0 - fetch_s / self.stay_s[who, None], WORTH_MIN)

    def _fetch(self, who: Ints) -> None:
        """Order devices to hold their new spans."""
        parts = np.arange(self.part_count)
        wanted = (parts >= self.first[who, None]) & (parts < self.last[who, None])
        self.left_bytes[who] = np.where(wanted & ~self.cached[who], self.parts.weights, 0.0).sum(axis=1)
        self.bytes_moved += float(self.left_bytes[who].sum())
        held = self.edges_bytes[self.last[who]] - self.edges_bytes[self.first[who]]
        self.left_s[who] = ORDERED_AFTER_S + LOAD_MIN_S + held / DISK_BYTES_PER_S
        self.fetching[who] = True
        self.orders += len(who)

    # --- time -------------------------------------------------------------------------------------

    def furnish(self, rng: np.random.Generator, here: Bools) -> None:
        """Before the first second: what is placed is ready, and who is away has the files of somebody of its cell."""
        who = np.flatnonzero(self.fetching)
        self._finish(who)
        self.orders, self.bytes_moved = 0, 0.0
        starts = np.searchsorted(self.block.cell, np.arange(self.block.cells + 1))
        for cell in range(self.block.cells):
            members = np.arange(starts[cell], starts[cell + 1])
            present, absent = members[here[members]], members[~here[members]]
            if len(present) and len(absent):
                self.cached[absent] = self.cached[rng.choice(present, len(absent))]

    def advance(self, duration_s: float) -> None:
        """Fetches and loads go on; what is done serves."""
        who = np.flatnonzero(self.fetching)
        if not len(who):
            return
        cell = self.block.cell[who]
        loading = self.left_bytes[who] > 0
        fetchers = np.bincount(cell[loading], minlength=self.block.cells)
        serving = self.serves_last > self.serves_first
        peers = np.bincount(self.block.cell[serving], self.figures.uplink[serving], minlength=self.block.cells)
        supply = (OPERATOR_BYTES_PER_S + peers) / np.maximum(fetchers, 1)
        rate = np.minimum(self.figures.downlink[who], supply[cell])
        takes_s = self.left_bytes[who] / rate
        after_s = np.maximum(duration_s - takes_s, 0.0)
        self.left_bytes[who] = np.maximum(self.left_bytes[who] - rate * duration_s, 0.0)
        self.left_s[who] -= after_s
        self._finish(who[(self.left_bytes[who] <= 0) & (self.left_s[who] <= 0)])

    def _finish(self, who: Ints) -> None:
        self._serve(who, -1)
        self.serves_first[who], self.serves_last[who] = self.first[who], self.last[who]
        self._serve(who, 1)
        self.fetching[who] = False
        parts = np.arange(self.part_count)
        self.cached[who] |= (parts >= self.first[who, None]) & (parts < self.last[who, None])

    # --- looking again ------------------------------------------------------------------------------

    def replan(self, now_s: float, here: Bools) -> int:
        """Work out anew the cells that need it. How many."""
        lacking = (self.rules.replicas - np.minimum(coverage.holders(self.count), self.rules.replicas)).sum(axis=1)
        lacking[now_s - self.replanned_s < REPLAN_S] = 0.0
        due = np.argsort(-lacking, kind="stable")[:REPLANS_PER_STEP_MAX]
        chosen = due[lacking[due] > 0]
        chosen = np.concatenate((chosen, self._worth_moving(now_s)[: REPLANS_PER_STEP_MAX - len(chosen)]))
        for cell in chosen.tolist():
            self.replanned_s[cell] = self.gained_s[cell] = now_s
            self._work_out(int(cell), here)
        return len(chosen)

    def _worth_moving(self, now_s: float) -> Ints:
        """Cells that were not looked at for `GAIN_S` and serve clearly less than their devices' speed would allow."""
        waits: Ints = np.flatnonzero(now_s - self.gained_s >= GAIN_S)[:GAINS_PER_STEP_MAX]
        self.gained_s[waits] = now_s
        flow = coverage.bottleneck(self.mass[waits], self.parts.work).rows_per_s
        most = self.mass[waits].sum(axis=(1, 2)) / self.parts.work.sum()
        clear: npt.NDArray[np.bool_] = flow * (1 + self.rules.gain_min) < most
        return waits[clear]

    def _work_out(self, cell: int, here: Bools) -> None:
        low, high = np.searchsorted(self.block.cell, [cell, cell + 1])
        who = low + np.flatnonzero(here[low:high])
        if not len(who):
            return
        nodes = [self._node(device) for device in who.tolist()]
        placement = place_spans([self.need], nodes, self.rules)
        if placement.unplaceable:
            return
        edges = [span.first for span in self.parts.spans] + [self.need.layer_count]
        moved: list[int] = []
        spans: list[tuple[int, int]] = []
        for device, node in zip(who.tolist(), nodes, strict=True):
            stages = placement.stages[node.node]
            span = (0, 0)
            if stages:
                pieces = stages[0].pieces
                span = (edges.index(pieces[0].first), edges.index(pieces[-1].last))
            if span != (self.first[device], self.last[device]):
                moved.append(device)
                spans.append(span)
        if moved:
            self._move(np.array(moved, np.int64), np.array(spans, np.int64))

    def _move(self, who: Ints, spans: Ints) -> None:
        self._book(who, -1)
        self.first[who], self.last[who] = spans[:, 0], spans[:, 1]
        self._book(who, 1)
        self._fetch(who)

    def _node(self, device: int) -> NodeRoom:
        first, last = int(self.first[device]), int(self.last[device])
        pieces = self.parts.spans[first:last]
        cached = tuple(self.parts.spans[part] for part in np.flatnonzero(self.cached[device]).tolist())
        return NodeRoom(
            node=NodeId(f"{device:08x}"),
            weights_bytes=int(self.weights_room[device]),
            kv_bytes=int(self.kv_room[device]),
            layer_s=float(self.figures.layer_s[device] * self.slowdown[device]),
            hosted=(StageSpec(model=DIGEST, pieces=pieces),) if pieces else (),
            cached={DIGEST: _joined(cached)} if cached else {},
            outlook=Outlook(
                survival=tuple(self.survival[device].tolist()), expected_s=float(self.stay_s[device])
            ),
            downlink_bytes_per_s=float(self.figures.downlink[device]),
        )  # fmt: skip


def _joined(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].last == span.first:
            joined[-1] = Span(joined[-1].first, span.last)
        else:
            joined.append(span)
    return tuple(joined)


def hops_of(mass: Floats, work: Floats) -> Floats:
    """About how many devices a chain through each cell takes, `[cells]`, 1 where there is none: the model's work by the
    span of a device, averaged by speed, for a chain that uses whole spans; and never fewer than by the furthest reach
    from each edge. `mass[cells, parts, parts]` as in `coverage.py`."""
    edges = np.concatenate(([0.0], np.cumsum(work)))
    spans = np.maximum(edges[None, 1:] - edges[:-1, None], 0.0)
    total = mass.sum(axis=(1, 2))
    mean = (mass * spans).sum(axis=(1, 2)) / np.maximum(total, 1e-9)
    return np.maximum(np.where(total > 0, work.sum() / np.maximum(mean, 1e-9), 1.0), _fewest_hops(mass > 0))


def _fewest_hops(held: Bools) -> Floats:
    cells, parts = held.shape[0], held.shape[-1]
    # From each edge, the furthest end of any span that begins there or before.
    begun = np.logical_or.accumulate(held, axis=1)
    ends = np.where(begun.any(axis=2), parts - np.argmax(begun[:, :, ::-1], axis=2), 0)
    at, hops = np.zeros(cells, np.int64), np.zeros(cells)
    for _ in range(parts):
        reach = ends[np.arange(cells), np.minimum(at, parts - 1)]
        going = (at < parts) & (reach > at)
        if not going.any():
            break
        hops += going
        at = np.where(going, reach, parts)
    return np.maximum(hops, 1.0)
