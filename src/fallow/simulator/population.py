"""Draws the devices of a detailed run: their speed, memory, line, cell, and when they come and go.

Rules
- Everything about a device comes from streams named by its population and its number there, so that a larger fleet
  has the devices of a smaller one.
- How a device departs is drawn from `DEPARTURES` when its life ends a stay. A scripted outage is always silent; a
  reclaim and a rolling update are always polite.
- Cells are filled by region: devices that are near each other share one.
"""

from collections import defaultdict
from typing import Final

from fallow.domain.ids import NodeId
from fallow.simulator.devices import Departure, DeviceFigures, Stay
from fallow.simulator.lives import draw_lives, forced_away, scaled
from fallow.simulator.network import Site
from fallow.simulator.scenario import Event, EventKind, Population, Scenario
from fallow.simulator.streams import Streams

DEPARTURES: Final = ((Departure.POLITE, 0.70), (Departure.KILLED, 0.25), (Departure.SILENT, 0.05))
"""An owner who comes back gets the device from an agent that has time to leave; a switch, a crash or a reboot kills the
process; a flat battery, a closed lid or a lost network says nothing. Assumed shares: nobody has published any."""
AFTER_S: Final = 600.0
"""Lives are drawn beyond the end, because the last sessions are still answered then."""
STAY_MIN_S: Final = 5.0
"""Shorter stays are left out: the agent would not even have started."""
FORCED: Final = {
    EventKind.OUTAGE: Departure.SILENT,
    EventKind.RECLAIM: Departure.POLITE,
    EventKind.ROLLING_UPDATE: Departure.POLITE,
}


def site_of(population: Population) -> Site:
    """Where a population's devices are."""
    return Site(
        region=population.region,
        uplink_bytes_per_s=population.uplink_bytes_per_s,
        downlink_bytes_per_s=population.downlink_bytes_per_s,
        metro_rtt_s=population.metro_rtt_s,
        nat_blocked=population.nat_blocked,
    )


def draw_devices(scenario: Scenario, streams: Streams, until_s: float) -> list[tuple[DeviceFigures, Site]]:
    """The devices of a run that ends at `until_s`, in the order of their cells."""
    populations = scaled(scenario.populations, scenario.detailed.devices)
    lives = draw_lives(populations, streams.seed, scenario.start_hour_of_week, until_s + AFTER_S)
    away = _forced(populations, scenario.events, streams.seed)
    owners = [(population, number) for population in populations for number in range(population.count)]
    order = sorted(
        range(len(owners)), key=lambda index: (owners[index][0].region, streams.node_id(*_names(owners[index])))
    )
    cells = max(1, round(len(owners) / scenario.cell_devices))
    drawn: list[tuple[DeviceFigures, Site]] = []
    for place, index in enumerate(order):
        population, number = owners[index]
        draw = streams.stream("device", population.name, str(number))
        stays = _stays(lives.intervals(index), away[index], streams, _names(owners[index]))
        figures = DeviceFigures(
            node=NodeId(streams.node_id(*_names(owners[index]))),
            name=f"{population.name} {number}",
            population=population.name,
            region=population.region,
            cell=f"cell{place * cells // len(owners)}",
            layer_s=round(draw.lognormvariate(0.0, population.layer_s_spread) * population.layer_s, 7),
            memory_bytes=int(draw.lognormvariate(0.0, population.memory_spread) * population.memory_bytes),
            stays=stays,
        )
        drawn.append((figures, site_of(population)))
    return drawn


def _names(owner: tuple[Population, int]) -> tuple[str, str]:
    return owner[0].name, str(owner[1])


def _forced(
    populations: tuple[Population, ...], events: tuple[Event, ...], seed: int
) -> dict[int, list[tuple[float, float, Departure]]]:
    """For each device, when events take it away and how. Each event is asked for alone, in its own place."""
    silenced = [Event(kind=EventKind.FLASH_CROWD, at_s=0.0)] * len(events)
    found: dict[int, list[tuple[float, float, Departure]]] = defaultdict(list)
    for place, event in enumerate(events):
        if event.kind not in FORCED:
            continue
        away = forced_away(populations, [*silenced[:place], event, *silenced[place + 1 :]], seed)
        for device, from_s, until_s in zip(
            away.device.tolist(), away.from_s.tolist(), away.until_s.tolist(), strict=True
        ):
            found[device].append((from_s, until_s, FORCED[event.kind]))
    return found


def _stays(
    free: list[tuple[float, float]],
    away: list[tuple[float, float, Departure]],
    streams: Streams,
    names: tuple[str, str],
) -> tuple[Stay, ...]:
    """Free times without what events take, each with its end."""
    draw = streams.stream("departures", *names)
    kinds, weights = [kind for kind, _ in DEPARTURES], [weight for _, weight in DEPARTURES]
    stays = [Stay(from_s, until_s, draw.choices(kinds, weights)[0]) for from_s, until_s in free]
    for gone_s, back_s, departure in sorted(away, key=lambda item: item[0]):
        cut: list[Stay] = []
        for stay in stays:
            if back_s <= stay.from_s or stay.until_s <= gone_s:
                cut.append(stay)
                continue
            if stay.from_s < gone_s:
                cut.append(Stay(stay.from_s, gone_s, departure))
            if back_s < stay.until_s:
                cut.append(Stay(back_s, stay.until_s, stay.departure))
        stays = cut
    return tuple(stay for stay in stays if stay.until_s - stay.from_s >= STAY_MIN_S)
