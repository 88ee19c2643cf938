"""How a cell answers: served sessions, refusals and latencies at a load, for many cells at once. Pure.

A model of queues instead of single frames. What it says, and where it comes from:

- *Work.* A session costs its completion tokens, and its prompt's at `prompt_weight`: rows of a prompt are computed in
  calls of `PREFILL_CHUNK_ROWS`, decoded ones in calls of about eight, by the engine's measured `BATCH_COST`.
- *A device* is a server that takes whatever waits in one call (a bulk queue with unlimited gated service; Bailey 1954,
  Kleinrock 1975 vol. 1). A call of b rows costs about A + B*b calls of one row. Rows that come at rate r make b = r *
  duration, so that in equilibrium a call takes A / (1 - B*r) times one row's, and never less than one row's. Who comes
  finds the device busy with probability min(1, r * duration) and then waits half a call on average.
- *A cell* routes by max-flow, so that all devices that matter are used alike: the load of each is that of the cell, x,
  sessions' work by `flow.throughput` of what its ready devices hold at eight rows a call.
- *A token's gap* is the sum over a chain's hops of waiting, computing and the way to the next. At low load the fastest
  chains are chosen; `EAGER` is how much faster than the average device they are, fitted on the detailed mode.
- *Admission* lets a gap grow to `AdmissionRules.stretch` times the idle gap, and no request wait longer than
  `wait_max_s`; what comes beyond that is refused. KV room bounds how many answers run.
- *Spread.* Gaps and times to the first token vary within a cell: gaps by jitter, losses and other chains (lognormal,
  `GAP_SPREAD`), and for tokens that meet a chunk of somebody's prompt at a device by what is left of it; first
  tokens by the prompts' lengths, which the scenario gives.

It is quasi-static: within a time step, load and answers are in equilibrium (an answer takes less than a step). Only the
queue of those who wait is carried from step to step.
"""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from fallow.engine.contract import PREFILL_CHUNK_ROWS
from fallow.policy.admission import AdmissionRules
from fallow.simulator.capacity import BATCH_ROWS
from fallow.simulator.engine_model import BATCH_COST, batch_cost
from fallow.simulator.scenario import Traffic

Floats = npt.NDArray[np.float64]

CALL_ROW: Final = (BATCH_COST[-1][1] - BATCH_COST[0][1]) / (BATCH_COST[-1][0] - BATCH_COST[0][0])
"""B: what one more row in a call costs, in calls of one row."""
CALL_BASE: Final = 1.0 - CALL_ROW
"""A"""
FULL_ROWS: Final = BATCH_ROWS / batch_cost(BATCH_ROWS)
"""Rows in the time of a call of one row, at the batch that capacity is reckoned with."""
LOAD_MAX: Final = 0.98 / (CALL_ROW * FULL_ROWS)
"""Of the capacity at eight rows a call, what ever larger calls reach."""
PREFILL_ROW: Final = batch_cost(PREFILL_CHUNK_ROWS) / PREFILL_CHUNK_ROWS
"""Calls of one row that a prompt's row costs."""

EAGER: Final = 0.68
"""Time of a layer on the chains that are chosen when nobody is there, by that of the average device. Fitted."""
EAGER_PREFILL: Final = 0.58
"""The same for a prompt's rows. Fitted."""
CROWDED: Final = 0.5
"""The load from which on there is no choosing: sessions take average devices and meet other people's prompts as often
as these are there; below, in proportion. Fitted."""
GAP_SPREAD: Final = 0.18
"""Standard deviation of the logarithm of the gaps within a cell. Fitted."""
OPEN_TRIPS: Final = 3.0
"""Round trips before the first row: to the coordinator, to open the chain, to let it flow."""
HANDLING_S: Final = 0.004
"""Of a frame, beside its way and its bytes. Fitted."""

NEAR_LOAD: Final = 0.5
"""Below this no gap is too long: tokens come at most 2.5 times slower than on an idle cell."""

TAIL: Final = np.array([0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.92, 0.955, 0.975, 0.985, 0.9925, 0.998])
"""The quantiles that stand for a distribution."""
CHUNK_LEFT: Final = np.array([0.125, 0.375, 0.625, 0.875])
"""Of a prompt's chunk, what is left when a token meets it."""
TAIL_SHARE: Final = np.diff(np.concatenate(([0.0], (TAIL[1:] + TAIL[:-1]) / 2, [1.0])))
NORMAL_TAIL: Final = np.array(
    [-1.645, -1.036, -0.674, -0.385, -0.126, 0.126, 0.385, 0.674, 1.036, 1.405, 1.695, 1.960, 2.170, 2.432, 2.878]
)
"""The normal distribution at those."""


class Chains(NamedTuple):
    """What a session meets in each cell, [cells]."""

    capacity_tokens_per_s: Floats
    """At eight rows a call; 0 where a part is held by nobody."""
    layer_s: Floats
    """A layer's time for one row, averaged by the work that devices do."""
    hops: Floats
    leg_s: Floats
    """One way between two devices, its row's bytes included."""
    edge_s: Floats
    """One way between a gateway and a device."""
    row_s: Floats
    """What a row's bytes take on the way to the next device: the uplink's part of a prompt."""
    kv_sessions: Floats
    """How many answers there is KV room for."""


class Demand(NamedTuple):
    """What sessions want."""

    prompt_tokens: float
    """Mean."""
    completion_tokens: float
    """Mean."""
    prompt_median: float
    spread: float
    layers: float
    """Of the model, the head counted by its bytes."""
    prefill_layers: float
    """Without the head, which is not computed for a prompt's rows."""

    @property
    def prompt_weight(self) -> float:
        """Of a prompt's token, in decoded ones."""
        return PREFILL_ROW * FULL_ROWS * self.prefill_layers / self.layers

    @property
    def prompt_share(self) -> float:
        """Of a session's work, what its prompt is."""
        return self.prompt_weight * self.prompt_tokens / self.work_tokens

    @property
    def chunk_rows(self) -> float:
        """Of a mean prompt's chunks."""
        return min(float(PREFILL_CHUNK_ROWS), self.prompt_tokens)

    @property
    def work_tokens(self) -> float:
        """Of a session, in decoded tokens."""
        return self.completion_tokens + self.prompt_weight * self.prompt_tokens


class Answers(NamedTuple):
    """What came of a step, [cells]."""

    begun: Floats
    """Sessions that were accepted."""
    refused: Floats
    waiting: Floats
    """Sessions that wait for the next step."""
    wait_s: Floats
    running: Floats
    """Answers under way at a time."""
    gap_s: Floats
    """Mean time between two tokens."""
    row_s: Floats
    """What a row of a prompt takes through the chain."""
    opening_s: Floats
    met: Floats
    """Share of tokens that meet a chunk of somebody's prompt at a device of their chain."""
    chunk_s: Floats
    """How long such a chunk takes at a device."""


def demand_of(traffic: Traffic, layers: float, prefill_layers: float, cap_tokens: int) -> Demand:
    """Means of the lognormal lengths; `cap_tokens` cuts them."""
    growth = float(np.exp(traffic.spread**2 / 2))
    return Demand(
        prompt_tokens=min(traffic.prompt_tokens * growth, cap_tokens),
        completion_tokens=min(traffic.completion_tokens * growth, cap_tokens),
        prompt_median=float(min(traffic.prompt_tokens, cap_tokens)),
        spread=traffic.spread,
        layers=layers,
        prefill_layers=prefill_layers,
    )


def call_stretch(load: Floats) -> Floats:
    """How long a row's time at a device is, waiting included, in calls of one row, at a load of the cell."""
    rate = FULL_ROWS * np.minimum(load, LOAD_MAX)
    duration = np.maximum(1.0, CALL_BASE / (1.0 - CALL_ROW * rate))
    return np.asarray(duration * (1.0 + np.minimum(1.0, rate * duration) / 2))


def crowd(load: Floats) -> Floats:
    """How little there is to choose, 0 to 1."""
    return np.clip(load / CROWDED, 0.0, 1.0)


def gap_s(chains: Chains, demand: Demand, load: Floats) -> Floats:
    """The mean time between two tokens of an answer."""
    eager = EAGER + (1.0 - EAGER) * crowd(load)
    compute = demand.layers * chains.layer_s * eager * call_stretch(load)
    ways = (chains.hops - 1) * chains.leg_s + 2 * chains.edge_s + (chains.hops + 1) * HANDLING_S
    return np.asarray(compute + ways)


def load_max(chains: Chains, demand: Demand, rules: AdmissionRules) -> Floats:
    """The load at which tokens come `stretch` times slower than when nobody is there, or at which the answers that run
    fill the KV room, by bisection."""
    most = rules.stretch * gap_s(chains, demand, np.zeros_like(chains.hops))
    low, high = np.zeros_like(most), np.full_like(most, LOAD_MAX)
    for _ in range(24):
        middle = (low + high) / 2
        over = (gap_s(chains, demand, middle) > most) | (_running(chains, demand, middle) > chains.kv_sessions)
        low, high = np.where(over, low, middle), np.where(over, middle, high)
    return low


def _running(chains: Chains, demand: Demand, load: Floats) -> Floats:
    """Answers under way at a load (Little's law)."""
    rate = load * chains.capacity_tokens_per_s / demand.work_tokens
    return np.asarray(rate * _lasts_s(demand, gap_s(chains, demand, load), _prefill(chains, demand, load)[0]))


def _lasts_s(demand: Demand, gap: Floats, row_s: Floats) -> Floats:
    """An answer of mean length."""
    return np.asarray(demand.completion_tokens * gap + demand.prompt_tokens * row_s)


def _load_max_where(chains: Chains, demand: Demand, wanted_per_s: Floats, rules: AdmissionRules) -> Floats:
    """`load_max` for the cells that come near it, and for the others just what they are asked for or more."""
    load = wanted_per_s * demand.work_tokens / np.maximum(chains.capacity_tokens_per_s, 1e-9)
    most = np.full_like(load, NEAR_LOAD)
    full = _running(chains, demand, np.minimum(load, NEAR_LOAD)) > chains.kv_sessions
    near = np.flatnonzero(((load > NEAR_LOAD) | full) & (chains.capacity_tokens_per_s > 0))
    if len(near):
        most[near] = load_max(Chains(*(part[near] for part in chains)), demand, rules)
    return most


def answer(
    chains: Chains, demand: Demand, arrived: Floats, waiting: Floats, step_s: float, rules: AdmissionRules
) -> Answers:
    """One time step: `arrived` sessions come to each cell, where `waiting` wait from the step before."""
    by_load = _load_max_where(chains, demand, (arrived + waiting) / step_s, rules) / demand.work_tokens
    rate_max = by_load * chains.capacity_tokens_per_s
    begun = np.minimum(arrived + waiting, rate_max * step_s)
    left = arrived + waiting - begun
    waits = np.minimum(left, rate_max * rules.wait_max_s)
    load = begun * demand.work_tokens / step_s / np.maximum(chains.capacity_tokens_per_s, 1e-9)
    gap = gap_s(chains, demand, np.where(chains.capacity_tokens_per_s > 0, load, 0.0))
    row_s, opening_s = _prefill(chains, demand, load)
    return Answers(
        begun=begun,
        refused=left - waits,
        waiting=waits,
        wait_s=np.where(rate_max > 0, (waiting + waits) / 2 / np.maximum(rate_max, 1e-9), 0.0),
        running=begun / step_s * _lasts_s(demand, gap, row_s),
        gap_s=gap,
        row_s=row_s,
        opening_s=opening_s,
        met=1 - (1 - np.minimum(load * demand.prompt_share, 0.9) * crowd(load)) ** chains.hops,
        chunk_s=demand.prefill_layers * chains.layer_s * PREFILL_ROW * demand.chunk_rows / chains.hops,
    )


def _prefill(chains: Chains, demand: Demand, load: Floats) -> tuple[Floats, Floats]:
    """A prompt's way through the chain, in seconds a row, and what comes before. In the detailed mode times grow with
    the prompt's length through every hop: its chunks hardly overlap."""
    eager = EAGER_PREFILL + (1.0 - EAGER_PREFILL) * crowd(load)
    compute = demand.prefill_layers * chains.layer_s * eager * PREFILL_ROW * call_stretch(load)
    ways = (chains.hops - 1) * chains.leg_s + 2 * chains.edge_s
    opening = OPEN_TRIPS * 2 * chains.edge_s + ways + (chains.hops + 1) * HANDLING_S
    return np.asarray(compute + (chains.hops - 1) * chains.row_s), np.asarray(opening)


def gaps_at(answers: Answers) -> tuple[Floats, Floats]:
    """[cells, n] gaps and their shares: each cell's at the quantiles `TAIL`, and those that meet a prompt's chunk and
    wait for what is left of it."""
    usual = answers.gap_s[:, None] * np.exp(GAP_SPREAD * NORMAL_TAIL - GAP_SPREAD**2 / 2)
    late = answers.gap_s[:, None] + answers.chunk_s[:, None] * CHUNK_LEFT
    usual_share = (1 - answers.met)[:, None] * TAIL_SHARE
    late_share = (answers.met / len(CHUNK_LEFT))[:, None] * np.ones(len(CHUNK_LEFT))
    return np.concatenate((usual, late), axis=1), np.concatenate((usual_share, late_share), axis=1)


def first_tokens_at(answers: Answers, demand: Demand) -> Floats:
    """[cells, len(TAIL)] times to the first token: by the prompts' lengths."""
    rows = demand.prompt_median * np.exp(demand.spread * NORMAL_TAIL)
    return np.asarray((answers.wait_s + answers.opening_s + answers.gap_s)[:, None] + answers.row_s[:, None] * rows)
