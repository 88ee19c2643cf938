"""What placement is measured against: bounds, node-disjoint pipelines, a mixed integer programme. And the nodes.

A pipeline is as fast as its slowest stage, and all pipelines are kept busy. Three grades:
- `Parallax`: the default of Parallax (Gradient 2025) by its published rules (`GreedyLayerAllocator`, fixed pipelines):
  devices by falling capacity; a whole pipeline on the smallest device that suffices while enough remain, else the
  largest ones until the layers fit; layers spread in proportion to speed within memory, the head not counted.
- `levelled`: the same grouping, but the spread is the best one in whole layers, the head counted.
- `ideal`: the best of four groupings, spare devices join where they help most, layers can be divided at will, and the
  embedding and the head take no room at the ends: an upper bound of greedy disjointness.
"""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import highspy
import numpy as np
from numpy.typing import NDArray

from fallow.domain.ids import Digest, NodeId
from fallow.policy import coverage
from fallow.policy.placement_books import parts_of
from fallow.policy.placement_inputs import ModelNeed, NodeRoom

Floats = NDArray[np.float64]
MIB = 1 << 20
NEED = ModelNeed(
    model=Digest("0" * 64),
    layer_bytes=(118 * MIB,) * 32,
    embedding_bytes=525 * MIB,
    head_bytes=525 * MIB,
    kv_bytes_per_token_layer=8192,
)
PARTS = parts_of(NEED, 2048)
WORK = float(PARTS.work.sum())
SPEED_SIGMA = np.log(10) / (2 * 1.645)
"""A factor of 10 between the 5th and the 95th percentile."""
DOWNLINK_BYTES_PER_S = 12_500_000.0


class Memory(Enum):
    """How the share of the model that devices have memory for is drawn, between an eighth and all of it."""

    EVEN = "even"
    SMALL = "small"
    """Evenly on a logarithmic scale: half of the devices fit less than 0.35."""


def fleet(count: int, seed: int, memory: Memory = Memory.EVEN) -> list[NodeRoom]:
    draw = np.random.default_rng(seed)
    speed = np.exp(draw.normal(0, SPEED_SIGMA, count))
    share = draw.uniform(1 / 8, 1, count) if memory is Memory.EVEN else 8 ** draw.uniform(-1, 0, count)
    return [
        NodeRoom(
            node=NodeId(f"{index:064x}"),
            weights_bytes=round(share[index] * NEED.whole_bytes),
            kv_bytes=1 << 40,
            layer_s=0.004 / speed[index],
            downlink_bytes_per_s=DOWNLINK_BYTES_PER_S,
        )
        for index in range(count)
    ]


def speeds(nodes: Sequence[NodeRoom]) -> Floats:
    return np.array([1 / node.layer_s for node in nodes])


def reach_of(nodes: Sequence[NodeRoom]) -> NDArray[np.int64]:
    return coverage.reach_by_room(PARTS.weights, np.array([float(node.weights_bytes) for node in nodes]))


def roof_of(nodes: Sequence[NodeRoom]) -> float:
    edges = np.concatenate(([0.0], np.cumsum(PARTS.work)))
    widest = (edges[reach_of(nodes)] - edges[:-1]).max(axis=1)
    return coverage.roof(speeds(nodes), widest, PARTS.work)


def pipeline_rate(speed: Sequence[float], room: Sequence[float]) -> float:
    """Tokens a second of one pipeline whose devices have room for so many layers: the rate at which what each can do,
    its room or its speed by the rate, adds up to the model."""
    if sum(room) < WORK:
        return 0.0
    low, high = 0.0, sum(speed) / WORK
    for _ in range(50):
        rate = (low + high) / 2
        enough = sum(min(layers, each / rate) for each, layers in zip(speed, room, strict=True)) >= WORK
        low, high = (rate, high) if enough else (low, rate)
    return low


def layer_caps(nodes: Sequence[NodeRoom]) -> list[int]:
    """How many layers each device of a pipeline has room for, the ends beside embedding and head."""
    last = len(nodes) - 1
    ends = [NEED.embedding_bytes * (i == 0) + NEED.head_bytes * (i == last) for i in range(len(nodes))]
    return [(node.weights_bytes - end) // NEED.layer_bytes[0] for node, end in zip(nodes, ends, strict=True)]


def slowest_stage(nodes: Sequence[NodeRoom], layers: Sequence[int]) -> float:
    """Tokens a second of a pipeline whose devices have so many layers, the last one the head besides."""
    work = [*layers[:-1], layers[-1] + WORK - NEED.layer_count]
    return float(1 / max(each * node.layer_s for each, node in zip(work, nodes, strict=True)))


def filled_rate(nodes: Sequence[NodeRoom]) -> float:
    """Tokens a second of one pipeline whose layers are spread as water fills: in proportion to speed, up to the caps;
    rounded down, and what is left goes by the largest remainders."""
    caps, speed = layer_caps(nodes), speeds(nodes)
    if min(caps) <= 0 or sum(caps) < NEED.layer_count:
        return 0.0
    low, high = 0.0, max(caps) / float(speed.min())
    for _ in range(60):
        level = (low + high) / 2
        enough = np.minimum(caps, level * speed).sum() >= NEED.layer_count
        low, high = (low, level) if enough else (level, high)
    target = np.minimum(caps, high * speed)
    layers = np.floor(target + 1e-9).astype(int)
    for index in np.argsort(layers - target, kind="stable"):
        if layers.sum() < NEED.layer_count and layers[index] < caps[index]:
            layers[index] += 1
    return slowest_stage(nodes, layers.tolist()) if layers.sum() == NEED.layer_count else 0.0


def level_rate(nodes: Sequence[NodeRoom]) -> float:
    """Tokens a second of one pipeline of these devices in their order, whole layers spread as evenly as memory lets."""
    caps, layers = layer_caps(nodes), [0] * len(nodes)
    work = [0.0] * (len(nodes) - 1) + [WORK - NEED.layer_count]
    for _ in range(NEED.layer_count):
        open_to = [i for i in range(len(nodes)) if layers[i] < caps[i]]
        if not open_to:
            return 0.0
        best = min(open_to, key=lambda i: (work[i] + layers[i] + 1) * nodes[i].layer_s)
        layers[best] += 1
    return slowest_stage(nodes, layers)


def grouped(nodes: Sequence[NodeRoom]) -> list[list[NodeRoom]]:
    """Node-disjoint pipelines, grouped as Parallax groups them; devices that are left over are in none."""
    left = sorted(nodes, key=lambda node: -node.weights_bytes)
    capacity = {node.node: node.weights_bytes // NEED.layer_bytes[0] for node in nodes}
    groups: list[list[NodeRoom]] = []
    while sum(capacity[node.node] for node in left) >= NEED.layer_count:
        whole = [node for node in left if node.weights_bytes >= NEED.whole_bytes]
        spare = sum(capacity[node.node] for node in left) - (capacity[whole[-1].node] if whole else 0)
        if whole and spare >= NEED.layer_count:
            group = [whole[-1]]
        else:
            group = next((left[:size] for size in range(1, len(left) + 1) if level_rate(left[:size])), [])
        if not group:
            break
        groups.append(group)
        left = left[len(group) :] if group[0] is left[0] else [node for node in left if node is not group[0]]
    return groups


def pipelines(nodes: Sequence[NodeRoom], rate: Callable[[Sequence[NodeRoom]], float]) -> float:
    """Tokens a second of node-disjoint pipelines."""
    return sum(map(rate, grouped(nodes)))


def ideal(nodes: Sequence[NodeRoom]) -> float:
    """Tokens a second of node-disjoint pipelines with divisible layers, by the best of four greedy groupings."""
    speed = speeds(nodes).tolist()
    room = [node.weights_bytes / NEED.whole_bytes * WORK + 1e-6 for node in nodes]
    orders: list[Callable[[int], float]] = [
        lambda i: -room[i],
        lambda i: -speed[i],
        lambda i: -speed[i] / room[i],
        lambda i: room[i],
    ]
    return max(_ideal(speed, room, sorted(range(len(nodes)), key=order)) for order in orders)


def _ideal(speed: list[float], room: list[float], order: Sequence[int]) -> float:
    groups: list[list[int]] = []
    left = list(order)
    while sum(room[i] for i in left) >= WORK:
        group: list[int] = []
        while (lacking := WORK - sum(room[i] for i in group)) > 0:
            enough = [i for i in left if room[i] >= lacking]
            group.append(min(enough, key=lambda i: room[i]) if enough and group else left[0])
            left.remove(group[-1])
        groups.append(group)
    rates = [pipeline_rate([speed[i] for i in g], [room[i] for i in g]) for g in groups]
    for spare in left:
        better = [pipeline_rate([speed[i] for i in [*g, spare]], [room[i] for i in [*g, spare]]) for g in groups]
        gains = [after - before for after, before in zip(better, rates, strict=True)]
        if gains:
            best = int(np.argmax(gains))
            groups[best].append(spare)
            rates[best] = better[best]
    return sum(rates)


def milp_bound(nodes: Sequence[NodeRoom], limit_s: float) -> float:
    """The dual bound of placement and flow as one programme: each device takes one of its widest spans (`takes`), and
    spends its speed on parts of it (`does`); tokens a second times a part's work is what is done on the part."""
    reach, speed, parts = reach_of(nodes), speeds(nodes), len(PARTS.work)
    unit = speed.sum() / WORK
    solver: Any = highspy.Highs()  # type: ignore[no-untyped-call]
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("time_limit", limit_s)
    tokens = solver.addVariable(lb=0.0, ub=float(roof_of(nodes) / unit), obj=-1.0)
    done: list[list[Any]] = [[] for _ in range(parts)]
    for index in range(len(nodes)):
        starts = np.flatnonzero(coverage.widest(reach[index : index + 1])[0])
        takes = {int(start): solver.addBinary() for start in starts}
        does = [solver.addVariable(lb=0.0, ub=float(speed[index] / unit)) for _ in range(parts)]
        if takes:
            solver.addConstr(sum(takes.values()) <= 1)
        solver.addConstr(sum(does) <= float(speed[index] / unit))
        for part in range(parts):
            over = [take for start, take in takes.items() if start <= part < reach[index, start]]
            solver.addConstr(does[part] <= (sum(over) * float(speed[index] / unit) if over else 0.0))
            done[part].append(does[part])
    for part in range(parts):
        solver.addConstr(sum(done[part]) >= tokens * float(PARTS.work[part]))
    solver.run()
    return float(-solver.getInfo().mip_dual_bound * unit)
