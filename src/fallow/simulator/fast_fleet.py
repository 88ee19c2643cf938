"""The fleet of a fast run, cut into blocks of cells that are simulated apart.

Rules
- Devices are those of the detailed mode: the same lives, speeds and memories for the same seed. Cells are filled by
  region, and within one in a random order of the seed; the number of cells is the detailed mode's.
- What a block holds depends on scenario, seed and `BLOCK_CELLS`, not on who computes it or when.
"""

from typing import Final, NamedTuple
from zlib import crc32

import msgspec
import numpy as np
import numpy.typing as npt

from fallow.simulator.lives import Lives, draw_lives, forced_away, scaled
from fallow.simulator.scenario import Event, EventKind, Population, Scenario

BLOCK_CELLS: Final = 128

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """Some cells and their devices. Arrays are [devices] unless they say otherwise."""

    number: int
    cells: int
    cell: Ints
    """0 to `cells` - 1, ascending."""
    population: Ints
    index: Ints
    """Within its population: names what is drawn for the device."""
    initially: npt.NDArray[np.bool_]
    since_s: Floats
    leaves_at_s: Floats
    edge_device: Ints
    """[edges] by time, from the start on."""
    edge_s: Floats
    edge_leaves_s: Floats
    """[edges] the departure that was declared then."""
    away_device: Ints
    """[forced absences]"""
    away_from_s: Floats
    away_until_s: Floats


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    scenario: Scenario
    """With its populations scaled."""
    seed: int
    devices: int
    cells: int
    blocks: tuple[Block, ...]


def draw_fleet(scenario: Scenario, seed: int, devices: int, until_s: float) -> Fleet:
    """The fleet and its lives from 0 to `until_s`. About 40 µs for a device and a day."""
    populations = scaled(scenario.populations, devices)
    scenario = msgspec.structs.replace(scenario, populations=populations)
    lives = draw_lives(populations, seed, scenario.start_hour_of_week, until_s)
    cells = max(1, round(devices / scenario.cell_devices))
    cell = _cells(populations, lives, seed, cells)
    known = _known(scenario)
    away = forced_away(populations, known, seed)
    blocks = []
    starts = np.searchsorted(np.sort(cell), np.arange(cells + 1))
    by_cell = np.argsort(cell, kind="stable")
    number_of = np.arange(devices) - np.concatenate(([0], np.cumsum([p.count for p in populations])))[lives.population]
    for number, first in enumerate(range(0, cells, BLOCK_CELLS)):
        last = min(cells, first + BLOCK_CELLS)
        chosen = by_cell[starts[first] : starts[last]]
        place = np.full(devices, -1)
        place[chosen] = np.arange(len(chosen))
        hit = place[away.device] >= 0
        edges = _edges(lives, chosen)
        blocks.append(
            Block(
                number=number,
                cells=last - first,
                cell=cell[chosen] - first,
                population=lives.population[chosen].astype(np.int64),
                index=number_of[chosen],
                away_device=place[away.device[hit]],
                away_from_s=away.from_s[hit],
                away_until_s=away.until_s[hit],
                initially=edges.initially,
                since_s=edges.since_s,
                leaves_at_s=edges.leaves_at_s,
                edge_device=edges.device,
                edge_s=edges.at_s,
                edge_leaves_s=edges.leaves_s,
            )
        )
    return Fleet(scenario=scenario, seed=seed, devices=devices, cells=cells, blocks=tuple(blocks))


def _known(scenario: Scenario) -> list[Event]:
    """The events, those that name a population that is too small for this fleet left out."""
    names = {population.name for population in scenario.populations}
    none = Event(kind=EventKind.FLASH_CROWD, at_s=0.0)
    return [event if event.population is None or event.population in names else none for event in scenario.events]


def _cells(populations: tuple[Population, ...], lives: Lives, seed: int, cells: int) -> Ints:
    """Each device's cell."""
    regions = sorted({population.region for population in populations})
    region = np.array([regions.index(population.region) for population in populations])[lives.population]
    shuffle = np.random.default_rng([seed, crc32(b"cells")]).random(lives.devices)
    order = np.lexsort((shuffle, region))
    cell = np.empty(lives.devices, np.int64)
    cell[order] = np.arange(lives.devices) * cells // lives.devices
    return cell


class _Edges(NamedTuple):
    """As in `Block`."""

    initially: npt.NDArray[np.bool_]
    since_s: Floats
    leaves_at_s: Floats
    device: Ints
    at_s: Floats
    leaves_s: Floats


def _edges(lives: Lives, chosen: Ints) -> _Edges:
    """The chosen devices' state at 0 and their edges from then on, by time."""
    counts = np.diff(lives.offsets)[chosen]
    first = lives.offsets[chosen]
    ends = np.cumsum(counts)
    at = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts) + np.repeat(first, counts)
    device = np.repeat(np.arange(len(chosen)), counts)
    times, leaves = lives.edges_s[at], lives.edges_s[at] + lives.leaves_s[at]
    past = times <= 0
    done = np.bincount(device[past], minlength=len(chosen))
    since = np.full(len(chosen), lives.begin_s)
    leaves_at = np.full(len(chosen), np.inf)
    since[device[past]] = times[past]
    leaves_at[device[past]] = leaves[past]
    order = np.argsort(times[~past], kind="stable")
    return _Edges(
        initially=lives.initially[chosen] ^ (done % 2 == 1),
        since_s=since,
        leaves_at_s=leaves_at,
        device=device[~past][order],
        at_s=times[~past][order],
        leaves_s=leaves[~past][order],
    )


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What was drawn for the devices, [devices]."""

    layer_s: Floats
    memory_bytes: Floats
    uplink: Floats
    downlink: Floats
    delay_s: Floats
    """One way to another device of the region, relays included."""


MEAN_PAIR: Final = float(np.exp(0.25**2 / 2))
"""Mean of a pair's factor (`network.PAIR_SPREAD`)."""
MEAN_JITTER: Final = float(np.sqrt(2 / np.pi))
"""Mean of the absolute value of a normal variable."""


def draw_figures(scenario: Scenario, block: Block, seed: int) -> Figures:
    """Speeds and memories from the detailed mode's streams (`population.draw_devices`)."""
    from fallow.simulator.streams import Streams

    streams = Streams(seed)
    populations = scenario.populations
    layer_s, memory = np.empty(len(block.cell)), np.empty(len(block.cell))
    for at, (which, number) in enumerate(zip(block.population.tolist(), block.index.tolist(), strict=True)):
        population = populations[which]
        draw = streams.stream("device", population.name, str(number))
        layer_s[at] = round(draw.lognormvariate(0.0, population.layer_s_spread) * population.layer_s, 7)
        memory[at] = int(draw.lognormvariate(0.0, population.memory_spread) * population.memory_bytes)
    network = scenario.network
    rough = 1 + network.jitter_share * MEAN_JITTER + 3 * network.loss
    delay = [rough * (p.metro_rtt_s / 2 * MEAN_PAIR + p.nat_blocked * network.relay_extra_s) for p in populations]

    def each(values: list[float]) -> Floats:
        return np.array(values)[block.population]

    return Figures(
        layer_s=layer_s,
        memory_bytes=memory,
        uplink=each([population.uplink_bytes_per_s for population in populations]),
        downlink=each([population.downlink_bytes_per_s for population in populations]),
        delay_s=each(delay),
    )
